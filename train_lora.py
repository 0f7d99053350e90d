"""Teach a frozen base one skill: python train_lora.py --lora_name mine --data_path mine.jsonl"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from core.errors import run
from core.options import given, option, parse
from core.paths import bundled_data, lora_path, skill_name
from model.lora.config import LoRAConfig
from trainer.options import KeepOptions, TrainOptions

SKILL_DATA = (bundled_data("lora_identity.jsonl"),)
DATA_HELP = "chat files or folders; scripts/inspect_data.py --help lists the styles"
BASE_HELP = "file, Hugging Face folder or owner/model (default: skill's, or newest full_sft_*)"
TEMPLATE_HELP = r"how a base without chat template is asked: 'Q: {user}\nA: '"
LORA_PLUS_HELP = "times the rate of A that B learns at (LoRA+)"


@dataclass
class Options(LoRAConfig, KeepOptions, TrainOptions):
    """Freeze a chat base, train rank-16 LoRA on chats and save out/lora/lora_<name>_<dim>.pth."""

    lora_name: str = option("identity", "name of the skill; it names the file", group="most used")
    data_path: tuple[Path, ...] = option(SKILL_DATA, DATA_HELP, group="most used")
    base: Path | None = option(None, BASE_HELP, group="most used")
    skill: Path | None = option(None, "skill file to go on with, in its rank", group="skill")
    keep_best: bool = True
    prompt_template: str | None = option(None, TEMPLATE_HELP, group="data")
    load_in_4bit: bool = option(False, "QLoRA; needs requirements-4bit.txt", group="device")
    loraplus_lr_ratio: float = option(1.0, LORA_PLUS_HELP, group="training", above=0)
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
    from model.lora.layer import output_parameters
    from model.lora.skill_file import SkillMeta
    from model.lora.targets import table_of
    from model.model_lora import apply_lora, save_lora
    from trainer import keeping, stage
    from trainer.runtime import Runtime

    runtime = Runtime.start(options.device, options.dtype, options.seed)
    base = stage.open_skill_base(options, runtime, given(Options, argv))
    model, tokenizer = base.model, base.tokenizer
    path = lora_path(options.out_dir, options.lora_name, model.config.hidden_size)
    stage.check_apart(path, options.skill)
    data = stage.read_data(SFTDataset, options, tokenizer, runtime)
    if base.skill:
        stage.attach_skill(model, options, base.skill)
    else:
        apply_lora(model, config=options)
    print(table_of(model))
    plugged = keeping.plugged(options, base, data, runtime)
    facts = stage.run_facts("lora", options, tokenizer, base)
    facts |= {"prompt_template": options.prompt_template, "load_in_4bit": options.load_in_4bit}
    skill = {"path": path, "record": SkillMeta(**facts), "write": partial(save_lora, model, path)}
    skill["lora_plus"] = output_parameters(model), options.loraplus_lr_ratio
    # run_stage opens the run's saved states, makes batches and parameter groups, and calls train.
    return stage.run_stage(model, data.train, options, runtime, **plugged, **skill)


if __name__ == "__main__":
    run(main, keep_working=True)
