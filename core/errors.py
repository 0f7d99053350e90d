"""What a user did wrong, or the machine refuses, is one sentence and exit code 2; the rest keeps
its traceback.
"""

import contextlib
import errno
import io
import os
import signal
import sys
import time
from collections.abc import Callable

from core.output import drop

INSTALL_HINT = "run `python scripts/quickstart.py` once, then use the Python in .venv"
REQUIRED_PACKAGES = {
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "tqdm",
    "wandb",
    "matplotlib",
    "numpy",
}

# What asks work to stop. SIGHUP: the terminal was closed, or its connection lost; Windows has none.
STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
)  # PyTorch's words: GPU, POSIX, Windows
ECHO_SECONDS = (
    3.0  # torchrun passes on a Ctrl-C that the terminal has already sent to every process
)


class UserError(Exception):
    """A mistake in a flag, a file or the machine's set-up.

    The message is one sentence that names the place (file:line, flag, key) and the way out.
    """


def reason_of(error: BaseException, limit: int = 200) -> str:
    """The first line of a library's words, at most ``limit`` characters; its type's name if it has
    none.
    """
    lines = str(error).splitlines()
    return lines[0][:limit] if lines else type(error).__name__


class Stopped(Exception):
    """Work ended early but in good order, because the signal ``signum`` asked for it; it has said
    so itself.
    """

    def __init__(self, signum: int):
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum


def run(main: Callable[[], object]) -> None:
    """Run a command's ``main`` and end the process.

    Exit codes: 0 when ``main`` returns, 2 with one line on stderr for a ``UserError``, a missing
    package, memory that does not suffice, and a file or an output that the system refuses, 130 for
    Ctrl-C, 128 + its number for a signal that ``Stopped`` the work. Any other exception is a bug
    and propagates with its traceback.
    """
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # output sent to a file on Windows may not know every character
        sys.stdout.reconfigure(errors="backslashreplace")
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started this process
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (until the process ends)
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        message, code = " ".join(str(error).split()), 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in REQUIRED_PACKAGES:
            raise
        message, code = f"the Python package {package!r} is not installed here: {INSTALL_HINT}", 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except Stopped as stopped:
        sys.exit(128 + stopped.signum)
    except (
        BrokenPipeError
    ):  # the reader of our output has left, as `| head` does: nobody is there to be told
        drop(sys.stdout)
        sys.exit(141)
    except OSError as error:
        # A file that is not there may be our mistake; what the system forbids, or has no room for,
        # is none. Python names no file when a write to an open one fails, be it the output's or
        # another.
        full = error.filename is None and error.errno in (errno.ENOSPC, errno.EFBIG)
        if isinstance(error, FileNotFoundError) or (error.filename is None and not full):
            raise
        if full:
            drop(sys.stdout)  # or its rest would fail again when the process ends
        place = "the output, or a file" if full else error.filename
        message, code = (
            f"{place}: {error.strerror}; choose a place with room that you may read and write",
            2,
        )
    except (MemoryError, RuntimeError) as error:
        reason = reason_of(error)
        if not isinstance(error, MemoryError) and not any(words in reason for words in NO_MEMORY):
            raise
        message, code = (
            f"the memory does not suffice ({reason}): take a smaller model, --batch_size or --micro_tokens",
            2,
        )
    else:
        return
    if (
        os.environ.get("LOCAL_RANK", "0") != "0"
    ):  # torchrun ends this process at once if the first one says the same
        time.sleep(ECHO_SECONDS)
    with contextlib.suppress(OSError):  # nobody need be there to read it
        print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
