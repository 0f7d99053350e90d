"""One line on how far a run of several stages is, with the time left of the whole."""

import re
import shutil
import sys
import time
from collections.abc import Mapping

STEP = re.compile(r"step (\d+)/(\d+)")  # of a trainer's line
ITS_OWN = re.compile(r", [\d.]+ (s|min|h) left$")  # the time that a trainer says itself
PLAIN_SECONDS = 20  # between two lines where no terminal lets a line be written over
SURE_AFTER = 60  # seconds of work that count as much as the guess that this machine is typical


class Progress:
    """Writes over one line of the terminal; elsewhere a new line every ``PLAIN_SECONDS``.

    ``typical`` maps the stages, in their order, to the seconds that they take on some machine; how
    much slower this one is follows from what it has done so far.
    """

    def __init__(self, typical: Mapping[str, float]):
        self.typical = dict(typical)
        self.total = len(self.typical)
        self.name, self.steps, self.shown, self.width = "", [], 0.0, 0
        self.passed = self.done = 0.0  # seconds of the finished stages, here and typically
        self.began = time.monotonic()

    def skip(self, name: str) -> None:
        """The stage was finished before."""
        self.typical.pop(name)
        print(f"[{self.total - len(self.typical)}/{self.total}] {name}: finished before")

    def begin(self, name: str) -> None:
        """Start the stage's clock."""
        self.name, self.steps, self.began = name, [], time.monotonic()
        self._show("")

    def hear(self, line: str) -> None:
        """Show ``line``, which the stage has printed, unless its width is unknown."""
        if found := STEP.match(line):
            step, steps = int(found[1]), int(found[2])
            self.steps = [*self.steps[:1], (time.monotonic(), step, steps)]
        elif self.steps and self.steps[-1][1] == self.steps[-1][2]:
            return  # a table that ends the training
        is_soon = time.monotonic() - self.shown < PLAIN_SECONDS and not sys.stdout.isatty()
        if line.strip() and line.isascii() and not is_soon:
            self._show(": " + ITS_OWN.sub("", line.strip()))

    def end(self) -> None:
        """The stage is finished: a line that stays."""
        seconds = time.monotonic() - self.began
        self.passed, self.done = self.passed + seconds, self.done + self.typical.pop(self.name)
        number = self.total - len(self.typical)
        self.clear()
        print(f"[{number}/{self.total}] {self.name}: {in_words(seconds)}", flush=True)

    def left(self) -> float:
        """The seconds that all stages will still take, as far as one can tell."""
        now, typical = time.monotonic() - self.began, self.typical[self.name]
        later = sum(self.typical.values()) - typical
        if len(self.steps) < 2:
            return max(typical * self.slowness() - now, 0) + later * self.slowness()
        (first_time, first, _), (last_time, last, steps) = self.steps  # set-up comes before steps
        this = (last_time - first_time) / (last - first) * (steps - last)
        return this + later * self.slowness(now, typical * now / (now + this))

    def slowness(self, seconds: float = 0.0, typical: float = 0.0) -> float:
        """Seconds here for a typical one; ``seconds`` are those of the stage so far."""
        return (SURE_AFTER + self.passed + seconds) / (SURE_AFTER + self.done + typical)

    def clear(self) -> None:
        """Empty the line, for others to print."""
        if self.width:
            print("\r" + " " * self.width + "\r", end="", flush=True)
        self.width = 0

    def _show(self, what: str) -> None:
        self.shown, number = time.monotonic(), self.total - len(self.typical) + 1
        text = f"[{number}/{self.total}] {self.name}, {in_words(self.left())} left of all{what}"
        if not sys.stdout.isatty():
            print(text, flush=True)
            return
        text = text[: shutil.get_terminal_size().columns - 1]
        print("\r" + text + " " * (self.width - len(text)), end="", flush=True)
        self.width = len(text)


def in_words(seconds: float) -> str:
    """``45 s`` or ``3 min 20 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
