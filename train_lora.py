"""Teach a frozen base one skill: python train_lora.py --lora_name mine --data_path mine.jsonl"""

from dataclasses import dataclass
from pathlib import Path

from core.errors import run
from core.options import given, option, parse
from core.paths import bundled_data, lora_path, skill_name
from trainer.options import SkillOptions

SKILL_DATA = (bundled_data("lora_identity.jsonl"),)
DATA_HELP = "chat files or folders; scripts/inspect_data.py --help lists the styles"


@dataclass
class Options(SkillOptions):
    """Freeze a chat base, train rank-16 LoRA on chats and save out/lora/lora_<name>_<dim>.pth."""

    lora_name: str = option("identity", "name of the skill; it names the file", group="most used")
    data_path: tuple[Path, ...] = option(SKILL_DATA, DATA_HELP, group="most used")
    epochs: int = 20
    learning_rate: float = 3e-3  # 5e-5 teaches nothing: results/sweep_lora_lr.json
    weight_decay: float = 0.0
    val_ratio: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        skill_name(self.lora_name)


def main(argv: list[str] | None = None) -> Path:
    """Open the base, read the data, add LoRA, train; return the path of the skill file."""
    options = parse(Options, argv)
    from dataset.batches import SFTDataset
    from trainer import keeping, stage
    from trainer.runtime import Runtime

    runtime = Runtime.start(options.device, options.dtype, options.seed)
    base = stage.open_skill_base(options, runtime, given(Options, argv))
    path = lora_path(options.out_dir, options.lora_name, base.model.config.hidden_size)
    stage.check_apart(path, options.skill)
    data = stage.read_data(SFTDataset, options, base.tokenizer, runtime)
    stage.add_lora(base, options)
    plugged = keeping.plugged(options, base, data, runtime)
    skill = stage.skill_result(path, options, base)
    # run_stage opens the run's saved states, makes batches and parameter groups, and calls train.
    return stage.run_stage(base.model, data.train, options, runtime, **plugged, **skill)


if __name__ == "__main__":
    run(main, keep_working=True)
