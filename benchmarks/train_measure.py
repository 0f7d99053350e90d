"""What the training measurements share: spread over rounds, sgemm, steps that a clock can stand between."""

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

SGEMM_SIZE = 2048
SGEMM_RUNS = 2  # a round; the best of all rounds counts


def spread(values: Iterable[float], digits: int = 3) -> dict[str, float]:
    """Smallest, median and largest of the rounds' figures."""
    values = sorted(values)
    figures = {"min": values[0], "median": statistics.median(values), "max": values[-1]}
    return {name: round(value, digits) for name, value in figures.items()}


def ratios(over: Iterable[float], under: Iterable[float]) -> dict[str, float]:
    """Spread of the quotients of figures that were measured in the same round."""
    return spread(a / b for a, b in zip(over, under, strict=True))


def sgemm_gflops() -> float:
    """GFLOP/s of the best of a few fp32 products of square matrices, in this process and its threads."""
    a, b = torch.randn(2, SGEMM_SIZE, SGEMM_SIZE).unbind()
    out = torch.empty_like(a)
    best = min(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(SGEMM_RUNS))
    return 2 * SGEMM_SIZE**3 / best / 1e9


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def training_mflop(config, length: int) -> float:
    """MFLOP a token of a forward and backward pass over full windows, every position supervised.

    Six a weight of a matrix product; causal attention multiplies with (length + 1) / 2 keys on average.
    """
    weights = sum(inputs * outputs for inputs, outputs in linear_shapes(config))
    return 6 * (weights + config.n_layers * config.dim * (length + 1)) / 1e6


def linear_shapes(config) -> list[tuple[int, int]]:
    """(inputs, outputs) of every matrix product with weights, the head last."""
    keys = config.dim // config.n_heads * config.n_kv_heads
    attention = [(config.dim, config.dim), (config.dim, keys), (config.dim, keys), (config.dim, config.dim)]
    feed_forward = [(config.dim, config.hidden_dim)] * 2 + [(config.hidden_dim, config.dim)]
    return (attention + feed_forward) * config.n_layers + [(config.dim, config.vocab_size)]


class Paced:
    """A ``BatchSource`` for ``trainer.loop.train`` that hands over to ``rounds`` between optimizer steps.

    ``rounds(warm_up)`` is a generator of optimizer steps; whatever it does between two of them is between two steps of
    the real training loop: it can read a clock, measure something else, or wait. It ends the run by returning.
    ``warm_up`` is one step (a list of micro-batches), which is trained on once before ``rounds`` begins.
    """

    steps_per_epoch = 10**9  # rounds end the run, not the count; the learning rate stays near zero

    def __init__(self, warm_up: list, rounds: Callable[[], Iterator[list]]):
        self.warm_up, self.rounds = warm_up, rounds

    def steps(self, epoch: int, start: int = 0) -> Iterator[list]:
        yield self.warm_up
        yield from self.rounds()
        raise Finished


class Finished(Exception):
    """Leaves ``train`` when the rounds are over."""


def merge_results(path: Path, name: str, figures: dict) -> None:
    """Put one measurement's figures into the results file and leave the others there as they are."""
    from core.files import atomic_write

    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    text = json.dumps(results | {name: figures}, ensure_ascii=False, indent=1) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))
