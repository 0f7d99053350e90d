"""Makes the project's own Python environment, .venv, and runs commands. Standard library only."""

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from core.errors import UserError
from core.files import atomic_write, read_object, sha256_file, try_lock

ROOT = Path(__file__).resolve().parent.parent
STAMP = "requirements-stamp.json"
SUPPORTED = (
    "PyTorch is built for 64-bit CPython 3.10 to 3.14 from python.org on Linux (x86-64 or arm64,"
    " glibc), macOS 14 or newer (Apple silicon) and Windows (x86-64)"
)


def choose_python(requirements: Sequence[str], arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The Python to run, .venv's or with ``--use_this_python`` this one, and other arguments."""
    others = [argument for argument in arguments if argument != "--use_this_python"]
    is_own = len(others) == len(arguments)
    return ensure_environment(requirements) if is_own else sys.executable, others


def ensure_environment(requirements: Sequence[str], root: Path = ROOT) -> str:
    """Install the requirement files (names in ``root``) in ``root/.venv``; return its Python.

    The stamp (JSON: the Python version, each file's SHA-256) is removed before anything changes and
    written last, so the next run finishes an interrupted installation: by pip if that Python runs,
    else from nothing. Concurrent runs wait. Raises ``UserError`` when venv or pip fails.
    """
    folder, stamp = root / ".venv", root / ".venv" / STAMP
    python = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    wanted = {name: sha256_file(root / name) for name in requirements}

    def is_ready() -> bool:
        return (wanted | {"python": _version(python)}).items() <= read_object(stamp).items()

    if is_ready():
        return python
    with (root / ".venv.lock").open("a") as lock:
        if not try_lock(lock):
            print("environment: another run is preparing it; waiting")
            while not try_lock(lock):
                time.sleep(0.5)
        if not is_ready():  # another run may have finished it while this one waited
            before = read_object(stamp)
            stamp.unlink(missing_ok=True)
            _install(folder, python, [str(root / name) for name in requirements])
            wanted["python"] = _version(python)
            kept = before if before.get("python") == wanted["python"] else {}
            text = json.dumps(kept | wanted, indent=1)
            atomic_write(stamp, lambda file: file.write(text.encode()))
    return python


def run(
    command: Sequence[str],
    variables: dict[str, str] | None = None,
    hear: Callable[[str], None] | None = None,
) -> int:
    """Run a command to its end; return its exit code: 130 after Ctrl-C, 128 + n for signal n.

    With ``hear`` each line that it prints, errors included, goes there and to no terminal.
    """
    environment = {**os.environ, "PYTHONUTF8": "1", "PIP_USER": "0", **(variables or {})}
    for name in ("PYTHONHOME", "PYTHONPATH"):  # they would mix in another environment's packages
        environment.pop(name, None)
    pipes = {}
    if hear:
        environment["PYTHONUNBUFFERED"] = "1"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        pipes |= {"encoding": "utf-8", "errors": "replace"}
    process = subprocess.Popen(command, env=environment, **pipes)
    before = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    code, interrupted = None, False
    try:
        while code is None:
            try:
                for line in process.stdout or ():
                    hear(line)
                code = process.wait()
            except KeyboardInterrupt:
                interrupted = True
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:  # ``hear`` has failed: nobody would know of the command any more
            process.terminate()
            process.wait()
        if process.stdout:
            process.stdout.close()
    return 130 if interrupted else (128 - code if code < 0 else code)


def _install(folder: Path, python: str, files: Sequence[str]) -> None:
    if _version(python) is None:
        print(f"environment: making {folder} with Python {platform.python_version()}")
        cure = f"Debian and Ubuntu need `sudo apt install python3.{sys.version_info[1]}-venv`"
        command = [sys.executable, "-m", "venv", "--clear", str(folder)]
        _succeed(command, f"cannot make {folder} ({cure})")
    if sys.platform == "linux" and not shutil.which("nvidia-smi"):
        print("environment: if pip downloads gigabytes of CUDA, which is useless without an NVIDIA")
        print("  GPU: Ctrl-C, set PIP_EXTRA_INDEX_URL to pytorch.org's CPU index, start again")
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    lines = [line for path in files for line in Path(path).read_text("utf-8").splitlines()]
    # torch comes first and alone: whatever needs it then finds this build and installs no other.
    for pin in (line for line in lines if line.startswith("torch==")):
        _succeed([*pip, pin], f"pip could not install {pin} ({SUPPORTED})")
    _succeed([*pip, *(f"--requirement={path}" for path in files)], f"pip could not install {files}")


def _succeed(command: Sequence[str], failure: str) -> None:
    code = run(command)
    if code == 130:
        raise KeyboardInterrupt
    if code:
        way_out = "check network and disk space, then start again to go on from here"
        raise UserError(f"{failure}; its messages are above: {way_out}")


def _version(python: str) -> str | None:
    """``3.12`` for an environment's Python that runs and has pip, else None."""
    # The list of pip's files is what its installation writes last.
    question = "import sys; from importlib.metadata import files; files('pip')[0];"
    command = [python, "-I", "-c", question + "print('%d.%d' % sys.version_info[:2])"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    return None
