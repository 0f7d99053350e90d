"""How far a run is, how fast it goes, and how long it will take."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from trainer.runtime import Runtime

UNCOUNTED_STEPS = (
    3  # the first steps allocate memory and warm caches: speed and time left leave them out
)


@dataclass
class Progress:
    """Plain numbers that are saved with a run's state and put back on a resume.

    ``nats`` and ``targets`` are those since the last log line, over all ranks. ``overflows``: fp16
    steps skipped in a row. ``tokens`` and ``seconds`` since the run began, without what a kill
    undid.
    """

    step: int = 0
    nats: float = 0.0
    targets: int = 0
    overflows: int = 0
    first_loss: float = math.nan
    last_loss: float = math.nan
    tokens: int = 0
    seconds: float = 0.0

    def add(self, loss: float, n_targets: int, tokens: int) -> None:
        """One optimizer step with a token mean of ``loss``; ``tokens`` are those that are no
        padding.
        """
        self.nats, self.targets = self.nats + loss * n_targets, self.targets + n_targets
        self.tokens += tokens

    def take_loss(self) -> float:
        """The token mean of the loss since it was last taken."""
        self.last_loss = self.nats / max(self.targets, 1)
        self.nats, self.targets = 0.0, 0
        return self.last_loss


class Clock:
    """Training time without validation and saving; ``seconds`` of it passed before this process
    began.
    """

    def __init__(self, runtime: Runtime, seconds: float = 0.0):
        self._runtime, self._before = runtime, seconds
        self._started = self._counted_from = time.perf_counter()
        self._steps = self._tokens = self._counted_tokens = self._counted_steps = 0

    def tick(self, tokens: int) -> None:
        """One optimizer step over ``tokens`` tokens, padding left out, is done."""
        self._steps, self._tokens = self._steps + 1, self._tokens + tokens
        if self._steps <= UNCOUNTED_STEPS:
            self._runtime.synchronize()
            self._counted_from = time.perf_counter()
            self._counted_tokens, self._counted_steps = self._tokens, self._steps

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self._before + time.perf_counter() - self._started

    def tokens_per_second(self) -> float:
        if self._steps <= UNCOUNTED_STEPS:
            return self._tokens / (time.perf_counter() - self._started)
        return (self._tokens - self._counted_tokens) / (time.perf_counter() - self._counted_from)

    def seconds_for(self, steps: int) -> float | None:
        """How long ``steps`` more steps take; None while it cannot be told."""
        if self._steps <= UNCOUNTED_STEPS:
            return None
        return (
            steps * (time.perf_counter() - self._counted_from) / (self._steps - self._counted_steps)
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as training time."""
        before = time.perf_counter()
        yield
        away = time.perf_counter() - before
        self._started, self._counted_from = self._started + away, self._counted_from + away


def duration(seconds: float) -> str:
    """``45 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
