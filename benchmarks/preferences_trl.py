"""Do we and TRL learn the same from pairs? python benchmarks/preferences_trl.py --base FILE

Trains the bundled pairs for a few steps on one base: by train_dpo.py, and by TRL's DPOTrainer on
the same base as a Hugging Face Llama, with the same rows in the same order and the same optimizer.

    pip install trl

Exit code 1: the losses of a step differ by more than 1e-4.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.result_file import measured_on, write_results
from core.errors import UserError, run
from core.options import CheckedOptions, option, parse
from core.paths import bundled_data, cache_dir, metrics_path

ALLOWED = 1e-4
BETA, RATE, ROWS = 0.1, 1e-4, 8  # the learning rate is constant
PAIRS = bundled_data("pairs_mini.jsonl")


@dataclass
class Options(CheckedOptions):
    """Compare the loss of each step with TRL's."""

    base: Path | None = option(None, "a chat base of ours")
    steps: int = option(10, "optimizer steps", at_least=1)
    result: Path | None = option(
        Path("benchmarks/results/preferences_trl.json"), "file of the figures"
    )


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    if options.base is None:
        raise UserError("name a chat base by --base")
    import train_dpo
    from scripts import convert_model

    with tempfile.TemporaryDirectory() as folder:
        out, llama = Path(folder), Path(folder) / "llama"
        flags = f"--out_dir {out} --max_steps {options.steps} --batch_size {ROWS} --beta {BETA} "
        flags += f"--learning_rate {RATE} --warmup_ratio 0 --decay_ratio 1e-9 --val_ratio 0 "
        flags += "--keep 0 --log_interval 1 --device cpu --max_seq_len 256"
        path = train_dpo.main(["--base", str(options.base), *flags.split()])
        words = ["--to", "huggingface", "--base", str(options.base), "--output", str(llama)]
        convert_model.main(words)
        lines = metrics_path(out, path.stem).read_text(encoding="utf-8").splitlines()
        ours = [r["loss"] for r in map(json.loads, lines) if "grad_norm" in r]
        theirs = losses_of_trl(llama, in_order(llama, options.steps, out), out, options.steps)
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    figures = {"ours": ours, "trl": theirs, "largest difference": max(apart)}
    print(json.dumps(figures, indent=1))
    write_results(options.result, figures | measured_on(("torch", "transformers", "trl")))
    if max(apart) > ALLOWED:
        raise SystemExit(1)
    return figures


def in_order(tokenizer: Path, steps: int, out: Path) -> list[dict]:
    """The prompts and answers, as texts, of the pairs of ``steps`` steps in our order."""
    from dataset.batches import Batches
    from dataset.preferences import PreferenceDataset
    from dataset.tokenizer import load_tokenizer
    from trainer.options import TrainOptions

    tokenizer = load_tokenizer(tokenizer)
    pairs = PreferenceDataset((PAIRS,), tokenizer, 256, cache=cache_dir(out), val_ratio=0).train
    source = Batches(pairs, ROWS, 1, TrainOptions.seed)
    found = []
    for _, batches in zip(range(steps), source.steps(0), strict=False):
        for batch in batches:
            ids, learned = batch.inputs["input_ids"], batch.labels >= 0
            for n in range(batch.n_targets):
                row = {}
                for name, side in (("chosen", n), ("rejected", n + batch.n_targets)):
                    first = int(learned[side].int().argmax())
                    row["prompt"] = tokenizer.decode(ids[side, :first])
                    row[name] = tokenizer.decode(ids[side, learned[side]])
                found.append(row)
    return found


def losses_of_trl(llama: Path, rows: list[dict], out: Path, steps: int) -> list[float]:
    """The loss of each step."""
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from trainer.optimizer import BETAS

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset if dataset is None else dataset)

    model, reference = (AutoModelForCausalLM.from_pretrained(llama) for _ in range(2))
    settings = {"max_steps": steps, "per_device_train_batch_size": ROWS, "beta": BETA}
    settings |= {"logging_steps": 1, "max_grad_norm": 1.0, "use_cpu": True, "bf16": False}
    settings |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    optimizer = torch.optim.AdamW(model.parameters(), RATE, BETAS, weight_decay=0.0)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = InOrder(
        model,
        reference,
        DPOConfig(output_dir=str(out / "trl"), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(llama),
        optimizers=(optimizer, constant),
    )
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


if __name__ == "__main__":
    run(main)
