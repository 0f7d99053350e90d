"""The flags that every training door has. Standard library only, so that --help answers at once."""

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal

from core.options import option, require


@dataclass
class TrainOptions:
    out_dir: Path = option(Path("out"), "folder of all results, made if missing")
    epochs: int = option(1, "passes over the data")
    batch_size: int = option(16, "rows of a micro-batch")
    accumulation_steps: int = option(1, "micro-batches of an optimizer step")
    learning_rate: float = option(1e-3, "peak learning rate")
    optimizer: Literal["muon", "adamw", "paged_adamw"] = option(
        "adamw",
        "of the Linear layers' weights; AdamW has all others. Paged: its state may move to RAM (NVIDIA GPUs)",
    )
    warmup_iters: int = option(
        0, "optimizer steps of linear warm-up; 0: --warmup_ratio of all steps"
    )
    warmup_ratio: float = option(0.01, "share of the steps in which the rate rises")
    decay_ratio: float = option(
        0.4, "share of the steps after the warm-up in which the rate falls to 0"
    )
    weight_decay: float = option(0.1, "decoupled weight decay of matrices (not of norms)")
    grad_clip: float = option(1.0, "largest gradient norm; 0 clips nothing")
    max_seq_len: int = option(512, "tokens of a row or window")
    max_steps: int = option(0, "stop after so many optimizer steps; 0: all epochs")
    device: str = option(
        "auto", "auto (cuda, then mps, then cpu), or a torch device such as cuda:1"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "autocast type; auto is bfloat16 where the GPU has it, else float32"
    )
    seed: int = option(1337, "of initial weights, order of rows and dropout")
    num_workers: int = option(0, "processes that prepare batches")
    micro_tokens: int = option(
        0, "tokens computed at once, padding included; 0: 2048 on a CPU, 32768 on a GPU"
    )
    compile: bool = option(False, "compile the model's blocks (needs a C++ compiler on a CPU)")
    log_interval: int = option(10, "optimizer steps between two log lines")
    save_interval: int = option(200, "optimizer steps between two validations and saves")
    val_ratio: float = option(0.02, "share of rows held out for validation; 0: none")
    val_tokens: int = option(16384, "how many held-out tokens a validation reads")
    bad_rows: Literal["stop", "skip"] = option("stop", "what to do about unusable rows")
    tokenizer_path: Path | None = option(
        None, "tokenizer folder (default: the one the base was trained with)"
    )
    resume: bool = option(False, "go on from the newest saved state of this run, if there is one")
    dry_run: bool = option(False, "measure a few steps and write nothing (but the cache of tokens)")
    use_wandb: bool = option(False, "also log to Weights & Biases (WANDB_MODE=offline works)")
    wandb_project: str = option("MiniMind", "Weights & Biases project")

    def __post_init__(self):
        for name in (
            "epochs",
            "batch_size",
            "accumulation_steps",
            "log_interval",
            "save_interval",
            "val_tokens",
        ):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)} must be at least 1")
        for name in ("warmup_iters", "max_steps", "num_workers", "micro_tokens", "seed"):
            require(
                getattr(self, name) >= 0, f"--{name} {getattr(self, name)} must not be negative"
            )
        for name in ("weight_decay", "grad_clip"):
            require(
                0 <= getattr(self, name) < inf,
                f"--{name} {getattr(self, name)} must be a number of at least 0",
            )
        for name, most in (("epochs", 10**6), ("num_workers", 256)):
            require(
                getattr(self, name) <= most,
                f"--{name} {getattr(self, name)} must be at most {most}",
            )
        require(
            not (self.dry_run and self.resume),
            "--dry_run begins a run that is thrown away: leave out --resume",
        )
        require(self.seed < 2**63, f"--seed {self.seed} must be below 2^63")
        require(
            0 < self.learning_rate < inf,
            f"--learning_rate {self.learning_rate} must be a positive number",
        )
        require(
            0 <= self.warmup_ratio < 1, f"--warmup_ratio {self.warmup_ratio} must lie in [0, 1)"
        )
        require(0 < self.decay_ratio <= 1, f"--decay_ratio {self.decay_ratio} must lie in (0, 1]")
        require(0 <= self.val_ratio < 1, f"--val_ratio {self.val_ratio} must lie in [0, 1)")
        require(self.max_seq_len >= 2, f"--max_seq_len {self.max_seq_len} must be at least 2")


# What a resumed run may change: on one machine none of it alters the arithmetic or the order of the
# rows. Files are compared by their content instead.
MAY_CHANGE = {
    "data_path",
    "general_data",
    "val_path",
    "base",
    "tokenizer_path",
    "out_dir",
    "device",
    "num_workers",
}
MAY_CHANGE |= {"log_interval", "save_interval", "resume", "dry_run", "use_wandb", "wandb_project"}
