"""Small training runs in processes of their own, that can be killed: at a time, or at a call to the
system.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from core.errors import run
from core.files import sha256_file
from core.paths import REPOSITORY, base_path, checkpoints_dir, metrics_path

STEPS, INTERVAL = 40, 2
RUN = "pretrain_64"
CLOCK = {"seconds", "seconds_left", "tokens_per_second", "matmul_share", "peak_memory_mb"}
CALLS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.chmod",
}  # audit events; fsync has none


@dataclass
class Outcome:
    """How a process ended: its exit code (minus the signal that killed it) and its output.

    ``seconds``: since its first step. ``stopping``: of these, the ones after it was sent a signal.
    """

    code: int
    lines: list[str]
    seconds: float
    stopping: float

    @property
    def step(self) -> int:
        """The last step that it reported."""
        return max(
            (int(line[5:].partition("/")[0]) for line in self.lines if _is_step(line)), default=0
        )


def argv(out: Path, data: Path, steps: int, *words: str) -> list[str]:
    shape = [
        "--dim",
        "64",
        "--n_layers",
        "2",
        "--n_heads",
        "4",
        "--dropout",
        "0.1",
        "--max_seq_len",
        "64",
    ]
    pace = [
        "--batch_size",
        "4",
        "--max_steps",
        str(steps),
        "--save_interval",
        str(INTERVAL),
        "--log_interval",
        "1",
    ]
    where = [
        "--out_dir",
        str(out),
        "--data_path",
        str(data),
        "--epochs",
        "99",
        "--device",
        "cpu",
        "--val_tokens",
        "256",
    ]
    return [*where, *shape, *pace, *words]


def forked(
    words: list[str],
    prepare: Callable[[], None] = lambda: None,
    disturb: tuple[float, int] | None = None,
) -> Outcome:
    """Run the pretraining door in a fork of this process, which has imported everything already.

    ``disturb``: seconds after the first step, and the signal that is sent then.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.dup2(writing, 1), os.dup2(writing, 2)
            sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb"), encoding="utf-8", line_buffering=True)
            prepare()
            import train_pretrain

            run(lambda: train_pretrain.main(words))
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8", errors="replace") as output:
        lines, began, sent = _follow(
            output, disturb[0] if disturb else None, lambda: os.kill(child, disturb[1])
        )
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Outcome(code, lines, time.monotonic() - began, time.monotonic() - sent)


def _follow(
    output: TextIO, after: float | None, disturb: Callable[[], None]
) -> tuple[list[str], float, float]:
    """All lines of ``output``, the time of the first step, and that at which ``disturb`` was
    called: ``after`` it.
    """
    lines, began = [], 0.0
    sent = began
    for line in output:
        lines.append(line)
        if _is_step(line) and not began:
            began = sent = time.monotonic()
            if after is not None:
                time.sleep(after)
                sent = time.monotonic()
                disturb()
    return lines, began, sent


def torchrun(words: list[str], disturb_after: float | None = None) -> Outcome:
    """The same in two processes that torchrun starts; SIGTERM goes to torchrun."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command = [*launcher, str(REPOSITORY / "train_pretrain.py"), *words]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "encoding": "utf-8"}
    with subprocess.Popen(command, env=settings, **pipes) as child:
        lines, began, sent = _follow(
            child.stdout, disturb_after, lambda: child.send_signal(signal.SIGTERM)
        )
    return Outcome(child.returncode, lines, time.monotonic() - began, time.monotonic() - sent)


def left_in(out: Path) -> list:
    """What a run leaves, but for the clock."""
    weights = base_path(out, "pretrain", 64)
    records = [
        json.loads(line) for line in metrics_path(out, RUN).read_text(encoding="utf-8").splitlines()
    ]
    records[-1].update(records[-1].pop("summary"))
    losses = [record["loss"].hex() for record in records[:-1] if "loss" in record]
    rest = [{key: value for key, value in record.items() if key not in CLOCK} for record in records]
    return [sha256_file(weights), sha256_file(weights.with_suffix(".json")), losses, rest]


def saved_step(out: Path) -> int:
    """The step of the newest whole state."""
    from trainer.state_files import newest_state

    found = newest_state(checkpoints_dir(out, RUN))
    return found.manifest["progress"]["step"] if found else 0


def watch_calls(out: Path, kill_at: int | None = None, listing: Path | None = None) -> None:
    """Count the calls that change something in ``out``; die before number ``kill_at``, or list them
    at the end.
    """
    calls: list[str] = []

    def note(call: str) -> None:
        if len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(call)
        if listing:
            listing.write_text(json.dumps(calls), encoding="utf-8")

    def on_event(event: str, arguments: tuple) -> None:
        if event not in CALLS:
            return
        path = str(arguments[0])
        if event == "open" and not (
            isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            return
        inside = str(out) in path and "cache" not in path and "png" not in path
        if inside or event in ("os.remove", "os.rmdir"):  # these may be relative to an open folder
            note(f"{event} {Path(path).name}")

    fsync = os.fsync
    os.fsync = lambda descriptor: (note("fsync"), fsync(descriptor))[1]
    sys.addaudithook(on_event)


def kill_in_half(number: int) -> None:
    """Die when half of the ``number``-th state's tensors are on disk."""
    from trainer import state_files

    whole, saves = state_files.save_file, []

    def save_half(tensors: dict, path: Path) -> None:
        saves.append(path)
        whole(tensors, path)
        if len(saves) == number:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    state_files.save_file = save_half


def _is_step(line: str) -> bool:
    return line.startswith("step ") and "/" in line.partition(":")[0]
