"""Fine-tune all weights of a base on chats: python train_full_sft.py --data_path my_chats.jsonl"""

from dataclasses import dataclass
from pathlib import Path

from core.errors import run
from core.options import option, parse
from core.paths import base_path, bundled_data
from trainer.options import TrainOptions

BUNDLED = (bundled_data("sft_mini"),)
DATA_HELP = "chat files or folders; scripts/inspect_data.py --help lists the styles"
BASE_HELP = "base to start from (default: the newest pretrain_*.pth in out_dir)"


@dataclass
class Options(TrainOptions):
    """Fine-tune all weights of a pretrained base on chats and save out/full_sft_<dim>.pth."""

    data_path: tuple[Path, ...] = option(BUNDLED, DATA_HELP, group="most used")
    base: Path | None = option(None, BASE_HELP, group="most used")
    epochs: int = 2
    learning_rate: float = 5e-4


def main(argv: list[str] | None = None) -> Path:
    options = parse(Options, argv)
    from dataset.batches import SFTDataset
    from trainer import stage
    from trainer.runtime import Runtime

    runtime = Runtime.start(options.device, options.dtype, options.seed)
    base = stage.open_base(options, runtime, "pretrain")
    model, tokenizer = base.model, base.tokenizer
    path = base_path(options.out_dir, "full_sft", model.config.dim)
    stage.check_apart(path, base.path)
    data = stage.read_data(SFTDataset, options, tokenizer, runtime)
    validation = stage.validation_of(model, {"val": data.val}, tokenizer, options, runtime)
    result = stage.base_result("full_sft", path, model, options, base, options.val_ratio)
    return stage.run_stage(model, data.train, options, runtime, validation=validation, **result)


if __name__ == "__main__":
    run(main, keep_working=True)
