"""Speed, time left, and the loss since the last log line."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.runtime import Runtime

UNCOUNTED_STEPS = 3  # the first steps allocate memory and warm caches: speed and time left leave them out


class LossWindow:
    """The token mean of the loss since it was last taken."""

    def __init__(self):
        self._nats, self._targets = 0.0, 0

    def add(self, loss: float, n_targets: int) -> None:
        self._nats, self._targets = self._nats + loss * n_targets, self._targets + n_targets

    def take(self) -> float:
        loss = self._nats / max(self._targets, 1)
        self._nats, self._targets = 0.0, 0
        return loss


class Clock:
    """Training time without validation and saving."""

    def __init__(self, runtime: Runtime):
        self._runtime = runtime
        self._started = self._counted_from = time.perf_counter()
        self.steps = self.tokens = self._counted_tokens = self._counted_steps = 0

    def tick(self, tokens: int) -> None:
        """One optimizer step over ``tokens`` tokens, padding left out, is done."""
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens
        if self.steps <= UNCOUNTED_STEPS:
            self._runtime.synchronize()
            self._counted_from, self._counted_tokens, self._counted_steps = time.perf_counter(), self.tokens, self.steps

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    def tokens_per_second(self) -> float:
        if self.steps <= UNCOUNTED_STEPS:
            return self.tokens / self.elapsed()
        return (self.tokens - self._counted_tokens) / (time.perf_counter() - self._counted_from)

    def left(self, steps: int) -> str:
        """``, 12 min left`` for ``steps`` more steps; empty while it cannot be told."""
        if self.steps <= UNCOUNTED_STEPS:
            return ""
        pace = (time.perf_counter() - self._counted_from) / (self.steps - self._counted_steps)
        return f", {duration(pace * steps)} left"

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
