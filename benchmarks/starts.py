"""Starts, ranks and scales of LoRA, each at its best rate.

python benchmarks/starts.py --base out/quickstart/full_sft_256.pth --data_path FILE [FILE ...]

Skills are trained plainly, at equal steps. The rate is chosen with a seed of its own; the held-out
losses that are compared come from other seeds.
"""

import functools
import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks.result_file import measured_on, read_results, write_results
from core.errors import run
from core.options import CheckedOptions, option, parse, require
from dataset.batches import Batch, validation_batches
from model.lora.layer import adapted
from scripts.quickstart_stages import flag_words

ROWS_TOKENS = 16384  # of the rows that a start reads
RANKS = (4, 8, 16, 32, 64)
ARMS = {"minimind": {}, "pissa": {"init_lora_weights": "pissa"}, "eva": {}, "gradient": {}}
ARMS |= {f"rank {rank}, alpha {rank}": {"rank": rank} for rank in RANKS}
ARMS |= {f"rank {rank}, alpha 16": {"rank": rank, "alpha": 16} for rank in RANKS if rank != 16}
# As many ranks as 16 each, where the singular values of dL/dW are largest.
ARMS |= {"ranks by importance": {}}
ARMS |= {f"all-linear, rank {r}": {"rank": r, "target_modules": "all-linear"} for r in (4, 16)}
TUNING_SEED = 7


@dataclass(unsafe_hash=True)
class Options(CheckedOptions):
    """Train each of ``ARMS`` at each rate, then at its best rate with each seed."""

    base: Path | None = option(None, "chat base that learns")
    data_path: tuple[Path, ...] = option((), "chats of the skill")
    out_dir: Path = option(Path("out/starts"), "folder of the skills")
    arms: tuple[str, ...] = option(tuple(ARMS), "which of ARMS")
    rates: tuple[float, ...] = option((3e-3, 1e-2, 3e-2), "learning rates to choose from")
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

    flags = shared_flags(options) | {"learning_rate": rate, "seed": seed, "epochs": 1000}
    flags |= {"max_steps": options.max_steps, "val_interval": options.max_steps}
    flags |= {"save_interval": 10**6, "log_interval": 10**6, **ARMS[arm]}
    if arm == "ranks by importance":
        flags["rank_pattern"] = ranks_by_importance(options)
    with started_by(STARTS.get(arm)):
        path = train_lora.main(flag_words(flags))
    return read_lora(path)[1].metrics["domain"]["last"]["loss"]


def shared_flags(options: Options) -> dict:
    """What says, in every run, which rows are held out, and that nothing holds the skill."""
    flags = {"base": options.base, "out_dir": options.out_dir, "data_path": options.data_path}
    flags |= {"lora_name": "tried", "max_seq_len": 256, "batch_size": 8, "val_ratio": 0.15}
    return flags | {"keep": 0, "keep_best": False}


Start = Callable[[nn.Module, list[Batch]], None]


@contextmanager
def started_by(start: Start | None):
    """Inside, a run lets ``start`` change its new LoRA, as the rows that it trains on suggest."""
    from trainer import keeping

    usual = keeping.plugged

    def plugged(options, base, data, runtime) -> dict:
        start(base.model, validation_batches(data.train, options.batch_size, ROWS_TOKENS))
        return usual(options, base, data, runtime)

    keeping.plugged = plugged if start else usual
    try:
        yield
    finally:
        keeping.plugged = usual


@functools.cache
def ranks_by_importance(options: Options) -> tuple[str, ...]:
    """A ``rank_pattern`` with a rank for each of the square Linears, at least 1."""
    import train_lora

    found, names = [], {}

    def watched(model: nn.Module, batches: list[Batch]) -> None:
        names.update((linear.lora, name) for name, linear in adapted(model))
        for lora, gradient in weight_gradients(model, batches).items():
            found.extend((float(size), names[lora]) for size in torch.linalg.svdvals(gradient)[1:])

    with started_by(watched):
        train_lora.main(flag_words(shared_flags(options) | {"max_steps": 1}))
    ranks = Counter(names.values())  # one each: for the largest
    for _, name in sorted(found, reverse=True)[: 15 * len(names)]:
        ranks[name] += 1
    return tuple(f"{re.escape(name)}={rank}" for name, rank in ranks.items())


def start_from_gradient(model: nn.Module, batches: list[Batch]) -> None:
    """A from the first right singular vectors of dL/dW (in the manner of LoRA-GA, Wang 2024)."""
    for lora, gradient in weight_gradients(model, batches).items():
        set_rows(lora, torch.linalg.svd(gradient, full_matrices=False).Vh)


def start_from_inputs(model: nn.Module, batches: list[Batch]) -> None:
    """A from the first right singular vectors of each Linear's inputs (EVA, Paischer 2024)."""
    for lora, gram in summed(model, batches, lambda x, slope: x.T @ x).items():
        set_rows(lora, torch.linalg.eigh(gram).eigenvectors.T.flip(0))


def set_rows(lora: nn.Module, V: Tensor) -> None:
    """The first rows of ``V`` as A, as long as N(0, 0.02) makes them."""
    with torch.no_grad():
        lora.A.weight.copy_(0.02 * V.size(1) ** 0.5 * V[: lora.rank])


def weight_gradients(model: nn.Module, batches: list[Batch]) -> dict[nn.Module, Tensor]:
    """dL/dW (outputs, inputs) of each Linear that carries a LoRA, as if W were trained."""
    return summed(model, batches, lambda x, slope: slope.T @ x)


def summed(
    model: nn.Module, batches: list[Batch], product: Callable[[Tensor, Tensor], Tensor]
) -> dict[nn.Module, Tensor]:
    """For each LoRA, ``product`` of its inputs (N, inputs) and the loss's slope at its outputs."""
    from trainer.loop import causal_loss_sum

    found = {}

    def watch(lora: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        x = args[0].detach().flatten(0, -2)

        def add(slope: Tensor) -> None:
            found[lora] = found.get(lora, 0) + product(x, slope.flatten(0, -2))

        output.register_hook(add)

    was_training = model.training
    model.eval()
    hooks = [linear.lora.register_forward_hook(watch) for _, linear in adapted(model)]
    for batch in batches:
        causal_loss_sum(model, batch).backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return found


STARTS = {"eva": start_from_inputs, "gradient": start_from_gradient}


if __name__ == "__main__":
    run(main)
