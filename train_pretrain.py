"""Train a MiniMindLM from zero on documents: python train_pretrain.py --data_path my.jsonl"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.errors import run
from core.options import option, parse
from core.paths import TOKENIZER_DIR, base_path, bundled_data
from trainer.options import TrainOptions

BUNDLED = (bundled_data("pretrain_mini.jsonl"),)


@dataclass
class Options(TrainOptions):
    """Train a language model from zero on {"text": ...} rows and save out/pretrain_<dim>.pth."""

    data_path: tuple[Path, ...] = option(BUNDLED, "pretraining files", group="most used")
    dim: int = option(512, "width of the model", group="most used")
    n_layers: int = option(8, "number of blocks", group="most used")
    batch_size: int = 8
    learning_rate: float = 2e-3
    optimizer: Literal["muon", "adamw"] = option("muon", "of Linear layers; AdamW updates others")
    n_heads: int = option(8, "query heads", group="training")
    n_kv_heads: int = option(2, "key/value heads", group="training")
    dropout: float = option(0.0, "dropout while training", group="training")
    tokenizer_path: Path | None = option(TOKENIZER_DIR, "tokenizer folder")


def main(argv: list[str] | None = None) -> Path:
    options = parse(Options, argv)
    from dataset.batches import PretrainDataset
    from dataset.tokenizer import load_tokenizer
    from model.LMConfig import LMConfig, check_length
    from model.model import MiniMindLM
    from model.weights import RunRecord, save_base
    from trainer.runtime import Runtime
    from trainer.stage import read_data, run_facts, run_stage, validation_of

    runtime = Runtime.start(options.device, options.dtype, options.seed)
    tokenizer = load_tokenizer(options.tokenizer_path)
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "dropout")
    sizes = {name: getattr(options, name) for name in names}
    config = LMConfig(**sizes, vocab_size=len(tokenizer))
    check_length(config, options.max_seq_len)
    data = read_data(PretrainDataset, options, tokenizer, runtime)
    model = MiniMindLM(config).to(runtime.device)
    path = base_path(options.out_dir, "pretrain", options.dim)
    facts = run_facts("pretrain", options, tokenizer)
    validation = validation_of(model, {"val": data.val}, tokenizer, options, runtime)
    result = {"path": path, "record": RunRecord(**facts, val_ratio=options.val_ratio)}
    result["write"] = lambda record: save_base(path, model, record)
    return run_stage(model, data.train, options, runtime, validation=validation, **result)


if __name__ == "__main__":
    run(main, keep_working=True)
