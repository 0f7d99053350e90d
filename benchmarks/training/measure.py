"""What the training measurements share: spread over rounds, FLOP counts, the real loop with a clock
in it.
"""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path


def spread(values: Iterable[float], digits: int = 3) -> dict[str, float]:
    """Smallest, median and largest of the rounds' figures."""
    values = sorted(values)
    figures = {"min": values[0], "median": statistics.median(values), "max": values[-1]}
    return {name: round(value, digits) for name, value in figures.items()}


def ratios(over: Iterable[float], under: Iterable[float]) -> dict[str, float]:
    """Spread of the quotients of figures that were measured in the same round."""
    return spread(a / b for a, b in zip(over, under, strict=True))


def training_mflop(config, length: int) -> float:
    """MFLOP a token of a forward and backward pass over full windows, every position supervised.

    Six a weight of a matrix product; causal attention multiplies with (length + 1) / 2 keys on
    average.
    """
    weights = sum(inputs * outputs for inputs, outputs in linear_shapes(config))
    return 6 * (weights + config.n_layers * config.dim * (length + 1)) / 1e6


def linear_shapes(config) -> list[tuple[int, int]]:
    """(inputs, outputs) of every matrix product with weights, the head last."""
    keys = config.dim // config.n_heads * config.n_kv_heads
    attention = [
        (config.dim, config.dim),
        (config.dim, keys),
        (config.dim, keys),
        (config.dim, config.dim),
    ]
    feed_forward = [(config.dim, config.hidden_dim)] * 2 + [(config.hidden_dim, config.dim)]
    return (attention + feed_forward) * config.n_layers + [(config.dim, config.vocab_size)]


class Paced:
    """A ``BatchSource`` that lets the caller stand between the optimizer steps of
    ``trainer.loop.train``.

    ``rounds()`` is a generator of optimizer steps; what it does between two of them happens between
    two steps of the real training loop: it can read a clock, measure something else, or wait for an
    order. The run ends with it, by ``Finished``. The first call is the loop's look at ``warm_up``
    (one step), by which it estimates its time.
    """

    def __init__(
        self, warm_up: list, rounds: Callable[[], Iterator[list]], steps_per_epoch: int = 10**9
    ):
        self.warm_up, self.rounds, self.steps_per_epoch = warm_up, rounds, steps_per_epoch
        self.rows_per_step = sum(len(batch.labels) for batch in warm_up)
        self._was_looked_at = False

    def steps(self, epoch: int, start: int = 0) -> Iterator[list]:
        if not self._was_looked_at:
            self._was_looked_at = True
            yield self.warm_up
            return
        yield from self.rounds()
        raise Finished


def train_paced(model, source: Paced, door, runtime, loss_sum, log_to: Path) -> None:
    """Train as a door does, but for validation and saving."""
    from trainer.evaluation import Metrics
    from trainer.loop import train
    from trainer.optimizer import param_groups
    from trainer.run_state import RunStates

    nothing = Metrics(math.nan, math.nan, 0, 0)
    groups = param_groups(model, door.weight_decay, door.optimizer)
    quiet = replace(door, save_interval=10**9)
    states = RunStates(log_to.with_suffix(".states"), {}, {}, resume=False)
    hooks = {
        "loss_sum": loss_sum,
        "on_save": lambda step: None,
        "validate": lambda: nothing,
        "log_to": log_to,
    }
    with contextlib.suppress(Finished):
        train(model, source, groups, quiet, runtime, **hooks, states=states)


class Finished(Exception):
    """Leaves ``train`` when the rounds are over."""
