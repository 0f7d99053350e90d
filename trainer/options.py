"""The options of every training run. Standard library only, so that help is shown at once."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from core.options import CheckedOptions, option, require
from model.lora.config import LoRAConfig

SKILL_BASE_HELP = "file, Hugging Face folder or owner/model (default: skill's, or newest chat base)"
TEMPLATE_HELP = r"how a base without chat template is asked: 'Q: {user}\nA: '"
LORA_PLUS_HELP = "times the rate of A that B learns at (LoRA+)"


@dataclass
class TrainOptions(CheckedOptions):
    """What every training run can be told. Raises ``UserError`` for values that no run can have."""

    out_dir: Path = option(Path("out"), "folder of all results, made if missing", group="most used")
    epochs: int = option(1, "passes over the data", group="most used", at_least=1, at_most=10**6)
    # Passes are cut by micro_tokens, too; that changes memory and speed, not the step.
    batch_size: int = option(
        16, "rows a step = this x accumulation_steps x processes", group="most used", at_least=1
    )
    learning_rate: float = option(1e-3, "peak learning rate", group="most used", above=0)
    max_seq_len: int = option(512, "tokens of a row or window", group="most used", at_least=2)
    resume: bool = option(False, "go on from this run's newest saved state", group="most used")

    val_ratio: float = option(0.02, "held-out share; 0: none", group="data", at_least=0, below=1)
    val_tokens: int = option(16384, "tokens that a validation reads", group="data", at_least=1)
    bad_rows: Literal["stop", "skip"] = option(
        "stop", "stop at unusable rows, or skip them", group="data"
    )
    control_text: Literal["keep", "drop", "refuse"] = option(
        "keep", "control tokens that a row spells as text; refuse: a bad row", group="data"
    )
    tokenizer_path: Path | None = option(None, "folder (default: the base's)", group="data")
    num_workers: int = option(
        0, "processes that prepare batches", group="data", at_least=0, at_most=256
    )

    optimizer: Literal["muon", "adamw", "paged_adamw"] = option(
        "adamw", "of the Linear layers; paged_adamw can use RAM beside the GPU's", group="training"
    )
    accumulation_steps: int = option(
        1, "multiplies the rows of an optimizer step", group="training", at_least=1
    )
    micro_tokens: int = option(
        0, "most tokens of a pass; 0: 2048 on a CPU, 32768 on a GPU", group="training", at_least=0
    )
    warmup_iters: int = option(
        0, "steps in which the rate rises; 0: warmup_ratio", group="training", at_least=0
    )
    warmup_ratio: float = option(
        0.01, "share of the steps in which the rate rises", group="training", at_least=0, below=1
    )
    decay_ratio: float = option(
        0.4, "share of the other steps in which it falls to 0", group="training", above=0, at_most=1
    )
    weight_decay: float = option(0.1, "of matrices, not of norms", group="training", at_least=0)
    grad_clip: float = option(1.0, "largest gradient norm; 0: any", group="training", at_least=0)
    seed: int = option(
        1337, "of weights, order and dropout", group="training", at_least=0, below=2**63
    )

    val_interval: int = option(
        0, "steps between two validations; 0: about 10 a run", group="run", at_least=0
    )
    keep_best: bool = option(False, "save the weights of the best validation", group="run")
    patience: int = option(
        0, "validations without a better one that end the run; 0: none do", group="run", at_least=0
    )
    max_steps: int = option(0, "most optimizer steps; 0: all epochs", group="run", at_least=0)
    log_interval: int = option(10, "optimizer steps between two log lines", group="run", at_least=1)
    save_interval: int = option(200, "steps between two saves", group="run", at_least=1)
    dry_run: bool = option(False, "measure a few steps, write only the cache", group="run")
    use_wandb: bool = option(
        False, "log to Weights & Biases; WANDB_MODE=offline works", group="run"
    )
    wandb_project: str = option("MiniMind", "Weights & Biases project", group="run")

    device: str = option("auto", "cuda, else mps, else cpu; or one such as cuda:1", group="device")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "of products; auto: bfloat16 where a GPU has it, else float32", group="device"
    )
    compile: bool = option(False, "compile the blocks; a CPU needs a C++ compiler", group="device")

    def __post_init__(self):
        super().__post_init__()
        waits = self.patience > 0
        require(self.keep_best or not waits, "patience waits for a better validation: keep_best it")
        require(self.val_ratio > 0 or not waits, "patience needs held-out rows: raise val_ratio")


@dataclass
class KeepOptions(CheckedOptions):
    """How a skill is held to what its base can do, on chats that have nothing to do with it."""

    keep: float = option(
        3.0, "weight of general chats that hold it to its base; 0: none", group="skill", at_least=0
    )
    keep_rows: int = option(6, "general chats of a step", group="skill", at_least=1)
    general_data: tuple[Path, ...] = option(
        (),
        "chats that hold it and judge it (default: bundled, or the base's own answers to those)",
        group="data",
    )
    keep_questions: tuple[Path, ...] = option(
        (), "chats, of other skills, whose questions it shall answer as its base", group="data"
    )

    def __post_init__(self):
        super().__post_init__()
        useless = self.keep_questions and not self.keep
        require(not useless, "keep_questions hold nothing with keep 0: leave out one of them")


@dataclass
class SkillOptions(LoRAConfig, KeepOptions, TrainOptions):
    """What a run can be told that trains LoRA on a frozen base."""

    base: Path | None = option(None, SKILL_BASE_HELP, group="most used")
    skill: Path | None = option(None, "skill file to go on with, in its rank", group="skill")
    keep_best: bool = True
    prompt_template: str | None = option(None, TEMPLATE_HELP, group="data")
    load_in_4bit: bool = option(False, "QLoRA; needs requirements-4bit.txt", group="device")
    loraplus_lr_ratio: float = option(1.0, LORA_PLUS_HELP, group="training", above=0)


# The options of a LoRA, which a run that trains all weights has no use for.
SKILL_ONLY = {each.name for each in fields(SkillOptions)}
SKILL_ONLY -= {each.name for kind in (TrainOptions, KeepOptions) for each in fields(kind)}
SKILL_ONLY -= {"base"}

# What a resumed run may change: on one machine it alters neither the arithmetic nor the order of
# the rows. The base, the tokenizer and data files are compared by their content instead.
MAY_CHANGE = {
    *("base", "tokenizer_path", "out_dir"),
    *("device", "num_workers", "log_interval", "save_interval"),
    *("resume", "dry_run", "use_wandb", "wandb_project"),
}
