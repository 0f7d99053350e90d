"""Fine-tune a pretrained base on chats, all weights: python train_full_sft.py --data_path
my_chats.jsonl
"""

from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError, run
from core.options import option, parse
from core.paths import bundled_data
from trainer.options import TrainOptions


@dataclass
class Options(TrainOptions):
    """Fine-tune all weights of a pretrained base on chats and save out/full_sft_<dim>.pth."""

    data_path: tuple[Path, ...] = option(
        (bundled_data("sft_mini.jsonl"),), "chat files", group="most used"
    )
    base: Path | None = option(
        None,
        "base to start from (default: the newest pretrain_*.pth in out_dir)",
        group="most used",
    )
    epochs: int = 2
    learning_rate: float = 5e-4


def main(argv: list[str] | None = None) -> Path:
    options = parse(Options, argv)
    from dataset.batches import SFTDataset
    from model.model import MiniMindLM
    from model.weights import RunRecord, save_base
    from trainer.runtime import Runtime
    from trainer.stage import (
        open_stage_base,
        read_data,
        result_path,
        run_facts,
        run_stage,
        validation_of,
    )

    runtime = Runtime.start(options.device, options.dtype, options.seed)
    base = open_stage_base(options, runtime, "pretrain")
    model, tokenizer = base.model, base.tokenizer
    if not isinstance(model, MiniMindLM):
        raise UserError(
            f"--base {base.path} is no MiniMindLM, and this trains no other; train_lora.py does"
        )
    path = result_path(options, "full_sft", base)
    data = read_data(SFTDataset, options, tokenizer, runtime)
    facts = run_facts("full_sft", options, tokenizer, base)
    return run_stage(
        model,
        data.train,
        options,
        runtime,
        path=path,
        record=RunRecord(**facts, val_ratio=options.val_ratio),
        validation=validation_of(model, {"val": data.val}, tokenizer, options, runtime),
        write=lambda record: save_base(path, model, record),
    )


if __name__ == "__main__":
    run(main, keep_working=True)
