"""Output whose reader may leave before the work is done: `| head`, a Ctrl-C that also ends `| tee`,
a lost terminal.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO


@contextmanager
def unread_output_dropped() -> Iterator[None]:
    """Inside, a print that fails is no error: all that goes to that stream from then on goes
    nowhere.
    """
    with redirect_stdout(_Dropping(sys.stdout)), redirect_stderr(_Dropping(sys.stderr)):
        yield


def drop(stream: TextIO) -> None:
    """From now on what ``stream`` is given, or still holds in its buffer, goes nowhere."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


class _Dropping:
    """A text stream whose ``write`` and ``flush`` do not fail."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            drop(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            drop(self._stream)
