"""Teach a frozen base one skill: python train_lora.py --lora_name mine --data_path mine.jsonl"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from core.errors import run
from core.options import option, parse
from core.paths import bundled_data, lora_path, skill_name
from model.lora.config import LoRAConfig
from trainer.options import TrainOptions

SKILL_DATA = (bundled_data("lora_identity.jsonl"),)
GENERAL_DATA = (bundled_data("sft_mini.jsonl"),)
BASE_HELP = "file, Hugging Face folder or owner/model (default: newest full_sft_*)"
TEMPLATE_HELP = r"how a base without chat template is asked: 'Q: {user}\nA: '"
LORA_PLUS_HELP = "times the rate of A that B learns at (LoRA+)"


@dataclass
class Options(LoRAConfig, TrainOptions):
    """Freeze a chat base, train rank-16 LoRA on chats and save out/lora/lora_<name>_<dim>.pth."""

    lora_name: str = option("identity", "name of the skill; it names the file", group="most used")
    data_path: tuple[Path, ...] = option(SKILL_DATA, "chat files of the skill", group="most used")
    general_data: tuple[Path, ...] = option(GENERAL_DATA, "chats that show its cost", group="data")
    base: Path | None = option(None, BASE_HELP, group="most used")
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
    from model.quantized import quantize
    from trainer.runtime import Runtime
    from trainer.stage import open_stage_base, read_data, run_facts, run_stage, validation_of

    runtime = Runtime.start(options.device, options.dtype, options.seed)
    base = open_stage_base(options, runtime, "full_sft", options.prompt_template)
    model, tokenizer = base.model, base.tokenizer
    if options.load_in_4bit:
        quantize(model, runtime.dtype)
    data = read_data(SFTDataset, options, tokenizer, runtime)
    # To see what the skill costs: general chats that the base was not trained on.
    general_options = replace(options, data_path=options.general_data, bad_rows="skip")
    general_options.val_ratio = base.held_out_share
    general_data = read_data(SFTDataset, general_options, tokenizer, runtime)
    apply_lora(model, config=options)
    print(table_of(model))
    held_out = {"domain": data.val, "general": general_data.val}
    validation = validation_of(model, held_out, tokenizer, options, runtime)
    if not options.dry_run:
        runtime.on_first(lambda: validation(step=0))
    path = lora_path(options.out_dir, options.lora_name, model.config.hidden_size)
    facts = run_facts("lora", options, tokenizer, base)
    facts |= {"prompt_template": options.prompt_template, "load_in_4bit": options.load_in_4bit}
    skill = {"path": path, "record": SkillMeta(**facts), "write": partial(save_lora, model, path)}
    skill["lora_plus"] = output_parameters(model), options.loraplus_lr_ratio
    # run_stage opens the run's saved states, makes batches and parameter groups, and calls train.
    return run_stage(model, data.train, options, runtime, validation=validation, **skill)


if __name__ == "__main__":
    run(main, keep_working=True)
