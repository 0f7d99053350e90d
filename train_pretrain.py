"""Train a MiniMindLM, new or trained before: python train_pretrain.py --data_path my.jsonl"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.errors import UserError, run
from core.options import given, option, parse
from core.paths import TOKENIZER_DIR, base_path, bundled_data
from trainer.options import TrainOptions

BUNDLED = (bundled_data("pretrain_mini.jsonl"),)
BASE_HELP = "base file to go on with, in its sizes (default: a new model)"
TOKENIZER_HELP = "folder (default: the base's; of a new model, the one that ships with the code)"
SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "dropout")


@dataclass
class Options(TrainOptions):
    """Train a language model on {"text": ...} rows and save out/pretrain_<dim>.pth."""

    data_path: tuple[Path, ...] = option(BUNDLED, "pretraining files", group="most used")
    base: Path | None = option(None, BASE_HELP, group="most used")
    dim: int = option(512, "width of the model", group="most used")
    n_layers: int = option(8, "number of blocks", group="most used")
    batch_size: int = 8
    learning_rate: float = 2e-3
    optimizer: Literal["muon", "adamw"] = option("muon", "of Linear layers; AdamW updates others")
    n_heads: int = option(8, "query heads", group="training")
    n_kv_heads: int = option(2, "key/value heads", group="training")
    dropout: float = option(0.0, "dropout while training", group="training")
    tokenizer_path: Path | None = option(None, TOKENIZER_HELP)


def main(argv: list[str] | None = None) -> Path:
    options, base = parse(Options, argv), None
    from dataset.batches import PretrainDataset
    from dataset.tokenizer import load_tokenizer
    from model.LMConfig import LMConfig, check_length
    from model.model import MiniMindLM
    from model.weights import RunRecord, save_base
    from trainer import stage
    from trainer.runtime import Runtime

    runtime = Runtime.start(options.device, options.dtype, options.seed)
    if options.base:
        base = stage.open_base(options, runtime, "pretrain")
        model, tokenizer = base.model, base.tokenizer
        take_sizes(options, model.config, given(Options, argv))
    else:
        tokenizer = load_tokenizer(options.tokenizer_path or TOKENIZER_DIR)
        sizes = {name: getattr(options, name) for name in SIZES}
        config = LMConfig(**sizes, vocab_size=len(tokenizer))
        check_length(config, options.max_seq_len)
        model = MiniMindLM(config).to(runtime.device)
    path = base_path(options.out_dir, "pretrain", options.dim)
    stage.check_apart(path, options.base)
    data = stage.read_data(PretrainDataset, options, tokenizer, runtime)
    facts = stage.run_facts("pretrain", options, tokenizer, base)
    validation = stage.validation_of(model, {"val": data.val}, tokenizer, options, runtime)
    result = {"path": path, "record": RunRecord(**facts, val_ratio=options.val_ratio)}
    result["write"] = lambda record: save_base(path, model, record)
    return stage.run_stage(model, data.train, options, runtime, validation=validation, **result)


def take_sizes(options: Options, config, asked: dict[str, object]) -> None:
    """Give ``options`` a base's sizes. Raises ``UserError`` where the user ``asked`` for others."""
    found = {name: getattr(config, name) for name in SIZES}
    others = [name for name in SIZES if asked.get(name, found[name]) != found[name]]
    if others:
        wrong = ", ".join(f"--{name} {asked[name]} (it has {found[name]})" for name in others)
        raise UserError(f"--base {options.base} keeps its sizes: leave out {wrong}")
    vars(options).update(found)


if __name__ == "__main__":
    run(main, keep_working=True)
