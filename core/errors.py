"""How a command starts and ends: a mistake is one sentence, a bug keeps its traceback."""

import contextlib
import errno
import hashlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from core.threads import limit_spinning

NEEDED = {"torch", "transformers", "datasets", "tokenizers", "tqdm", "wandb", "matplotlib", "numpy"}
INSTALL_HINT = "run `python scripts/quickstart.py` once, then use the Python in .venv"
# The signals that ask work to stop. SIGHUP says that the terminal is gone; Windows has none.
STOPPING = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
ECHO_SECONDS = 3.0  # torchrun repeats a Ctrl-C that the terminal has already sent to every process
# PyTorch's words on a GPU, on POSIX and on Windows.
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class UserError(Exception):
    """A mistake that the user can mend: one sentence with its place (file:line, flag, key)."""


class Stopped(Exception):
    """Work ended early but in good order, as the signal ``signum`` asked, and has said so."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum


def run(main: Callable[[], object], *, keep_working: bool = False) -> None:
    """Run a command's ``main`` and end the process.

    Exit codes: 0 when ``main`` returns; 2 with one line on stderr for a ``UserError``, a missing
    package, too little memory, and a file that the system refuses; 130 for Ctrl-C; 128 + its number
    for a signal that ``Stopped`` the work; 141 when nobody reads the output any more, unless the
    command is to ``keep_working``. Any other exception is a bug and keeps its traceback.
    """
    limit_spinning()
    _open_streams()
    if keep_working:
        sys.stdout, sys.stderr = _Unfailing(sys.stdout), _Unfailing(sys.stderr)
    try:
        main()
        sys.stdout.flush()
        return
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except Stopped as stopped:
        sys.exit(128 + stopped.signum)
    except BrokenPipeError:
        if keep_working:  # then the pipe was not that of our output
            raise
        _drop(sys.stdout)
        sys.exit(141)
    except Exception as error:
        message, code = _sentence_for(error), 2
        if not message:
            raise
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(ECHO_SECONDS)  # torchrun ends this process as soon as the first one ends
    with contextlib.suppress(OSError):  # nobody need be there to read it
        if not _is_said(message):
            print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def reason_of(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's message, at most ``limit`` characters, else its type's name."""
    lines = str(error).splitlines()
    return lines[0][:limit] if lines else type(error).__name__


def _sentence_for(error: Exception) -> str:
    """What to tell the user, who can do something about ``error``; "" where nobody but us can."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        missing = f"the Python package {package!r} is not installed here: {INSTALL_HINT}"
        return missing if package in NEEDED else ""
    if isinstance(error, OSError):
        # A missing file may be our mistake; what the system forbids or has no room for is not.
        # Python names no file when writing to an open one fails, be it the output or another.
        full = error.filename is None and error.errno in (errno.ENOSPC, errno.EFBIG)
        if full:
            _drop(sys.stdout)  # or the rest of it would fail again when the process ends
        elif isinstance(error, FileNotFoundError) or error.filename is None:
            return ""
        place = "the output, or a file" if full else error.filename
        return f"{place}: {error.strerror}; choose a place with room that you may read and write"
    reason = reason_of(error)
    no_memory = isinstance(error, RuntimeError) and any(words in reason for words in NO_MEMORY)
    if no_memory or isinstance(error, MemoryError):
        return f"out of memory ({reason}): take a smaller model, batch_size or micro_tokens"
    return ""


def _is_said(message: str) -> bool:
    """Whether another process that the same torchrun started has said this; now one has."""
    if not (own := os.environ.get("TORCHELASTIC_ERROR_FILE")):  # .../<this start>/<rank>/error.json
        return False
    name = hashlib.sha256(message.encode(errors="replace")).hexdigest()
    try:
        (Path(own).parents[1] / name).touch(exist_ok=False)
    except OSError as error:
        return isinstance(error, FileExistsError)
    return False


def _open_streams() -> None:
    """Replace closed streams; print each line at once, and spell what the output cannot."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # on Windows a file may not know every character
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)


class _Unfailing:
    """A text stream whose ``write`` and ``flush`` never fail: what cannot be written is dropped."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            _drop(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _drop(self._stream)


def _drop(stream: TextIO) -> None:
    """From now on what ``stream`` is given, or still holds in its buffer, goes nowhere."""
    with contextlib.suppress(io.UnsupportedOperation), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
