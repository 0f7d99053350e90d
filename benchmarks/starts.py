"""Starts, ranks and scales of LoRA, each at its best rate.

python benchmarks/starts.py --base out/quickstart/full_sft_256.pth --data_path FILE [FILE ...]

Skills are trained plainly, at equal steps. The rate is chosen with a seed of its own; the held-out
losses that are compared come from other seeds.
"""

import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks.domain import words
from benchmarks.result_file import measured_on, read_results, write_results
from core.errors import run
from core.options import CheckedOptions, option, parse, require
from model.lora import starts
from model.lora.layer import adapted

STARTS = ("minimind", "pissa", "eva", "gradient")
RANKS = (4, 8, 16, 32, 64)
ARMS = {start: {"init_lora_weights": start} for start in STARTS}
ARMS |= {f"rank {rank}, alpha {rank}": {"rank": rank} for rank in RANKS}
ARMS |= {f"rank {rank}, alpha 16": {"rank": rank, "alpha": 16} for rank in RANKS if rank != 16}
ARMS |= {f"all-linear, rank {r}": {"rank": r, "target_modules": "all-linear"} for r in (4, 16)}
TUNING_SEED = 7


@dataclass
class Options(CheckedOptions):
    """Train each of ``ARMS`` at each rate, then at its best rate with each seed."""

    base: Path | None = option(None, "chat base that learns")
    data_path: tuple[Path, ...] = option((), "chats of the skill")
    out_dir: Path = option(Path("out/starts"), "folder of the skills")
    arms: tuple[str, ...] = option(tuple(ARMS), "which of ARMS")
    rates: tuple[float, ...] = option((1e-3, 3e-3, 1e-2), "learning rates to choose from")
    seeds: tuple[int, ...] = option((1, 2, 3), "of the runs that are compared")
    max_steps: int = option(100, "optimizer steps of 8 rows", at_least=1)
    result: Path | None = option(Path("benchmarks/results/starts.json"), "file of the figures")

    def __post_init__(self):
        super().__post_init__()
        require(self.base is not None and self.base.is_file(), "name a base with --base FILE")
        require(bool(self.data_path), "name chats with --data_path FILE")
        unknown = set(self.arms) - ARMS.keys()
        require(not unknown, f"there is no arm {', '.join(unknown)}; there are {', '.join(ARMS)}")


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    name = ", ".join(path.name for path in options.data_path)
    settings = {"rates": list(options.rates), "seeds": list(options.seeds), "batch_size": 8}
    settings |= {"tuning_seed": TUNING_SEED, "max_steps": options.max_steps}
    before = read_results(options.result)
    found = before.get("found", {}) if before.get("settings") == settings else {}
    losses = found.setdefault(name, {})
    for arm in (arm for arm in options.arms if arm not in losses):
        tuned = {rate: held_out_loss(options, arm, rate, TUNING_SEED) for rate in options.rates}
        best = min(tuned, key=tuned.get)
        runs = [held_out_loss(options, arm, best, seed) for seed in options.seeds]
        by_rate = {str(rate): loss for rate, loss in tuned.items()}
        losses[arm] = {"loss": mean(runs), "rate": best, "runs": runs, "by rate": by_rate}
        print(f"== {name}, {arm}: {mean(runs):.4f} at {best}; tuned {by_rate}", flush=True)
        figures = {"settings": settings, "arms": ARMS, "found": found}
        write_results(options.result, figures | measured_on(("torch",)))
    return losses


def held_out_loss(options: Options, arm: str, rate: float, seed: int) -> float:
    """Nats per token of the held-out rows after the last step of a plain run."""
    import train_lora
    from model.lora.skill_file import read_lora

    flags = {"base": options.base, "out_dir": options.out_dir, "lora_name": "tried", "seed": seed}
    flags |= {"max_seq_len": 256, "batch_size": 8, "epochs": 1000, "learning_rate": rate}
    flags |= {"max_steps": options.max_steps, "val_interval": options.max_steps, "val_ratio": 0.15}
    flags |= {"keep": 0, "keep_best": False, "save_interval": 10**6, "log_interval": 10**6}
    flags |= ARMS[arm]
    with eva_in_place_of_gradient(flags):
        path = train_lora.main(words(flags | {"data_path": options.data_path}))
    return read_lora(path)[1].metrics["domain"]["last"]["loss"]


@contextmanager
def eva_in_place_of_gradient(flags: dict):
    """Inside, the start ``gradient`` is EVA's if ``flags`` ask for that one."""
    usual = starts.start_from_gradient
    if flags.get("init_lora_weights") == "eva":
        flags["init_lora_weights"] = "gradient"
        starts.start_from_gradient = start_from_inputs
    try:
        yield
    finally:
        starts.start_from_gradient = usual


def start_from_inputs(model: nn.Module, losses: Iterable[Callable[[], Tensor]]) -> None:
    """Set each A to the first right singular vectors of its Linear's inputs (EVA, Paischer 2024).

    As long as the product's own start makes its rows; ranks stay equal.
    """
    grams = {}

    def watch(lora: nn.Module, args: tuple[Tensor], _: Tensor) -> None:
        x = args[0].flatten(0, -2).float()
        grams[lora] = grams.get(lora, 0) + x.T @ x

    hooks = [linear.lora.register_forward_hook(watch) for _, linear in adapted(model)]
    with torch.no_grad():
        for loss in losses:
            loss()
        for hook in hooks:
            hook.remove()
        for lora, gram in grams.items():
            V = torch.linalg.eigh(gram).eigenvectors.T.flip(0)[: lora.rank]
            lora.A.weight.copy_(starts.STD * V.size(1) ** 0.5 * V)


if __name__ == "__main__":
    run(main)
