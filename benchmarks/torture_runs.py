"""Small training runs in processes of their own that can be killed: at a time, or at a call to the
system.
"""

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

from core.errors import run
from core.files import sha256_file
from core.paths import REPOSITORY, base_path, checkpoints_dir, metrics_path

INTERVAL = 2  # optimizer steps between two saves
RUN = "pretrain_64"
CLOCK = {"seconds", "seconds_left", "tokens_per_second", "matmul_share", "peak_memory_mb"}
# Audit events; fsync has none.
CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}


@dataclass
class Outcome:
    """How a process ended: its exit code (minus the signal that killed it), its output and the
    last step in its metrics.

    ``seconds``: since its first step. ``stopping``: of these, the ones after it was sent a signal.
    """

    code: int
    output: str
    step: int
    seconds: float
    stopping: float


@dataclass
class Job:
    """A pretraining run of ``steps`` steps on ``data`` with its results in ``out``."""

    out: Path
    data: Path
    steps: int

    def words(self, *more: str) -> list[str]:
        shape = f"--dim 64 --n_layers 2 --n_heads 4 --dropout 0.1 --max_steps {self.steps}"
        pace = f"--batch_size 4 --epochs 99 --save_interval {INTERVAL} --log_interval 1"
        rest = f"{shape} {pace} --max_seq_len 64 --val_tokens 256 --device cpu".split()
        return ["--out_dir", str(self.out), "--data_path", str(self.data), *rest, *more]

    def forked(
        self,
        *more: str,
        prepare: Callable[[], None] = lambda: None,
        disturb: tuple[float, int] | None = None,
    ) -> Outcome:
        """Run the door in a fork of this process, which has imported everything already.

        ``prepare``: called in the fork. ``disturb``: seconds after the first step, and the signal
        that is sent then.
        """
        with self._output().open("wb") as output:
            child = os.fork()
            if child == 0:
                os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
                _end_with(self.words(*more), prepare)

        def exit_code() -> int | None:
            pid, status = os.waitpid(child, os.WNOHANG)
            return os.waitstatus_to_exitcode(status) if pid else None

        after, signum = disturb or (None, 0)
        return self._follow(exit_code, after, lambda: os.kill(child, signum))

    def torchrun(self, *more: str, after: float | None = None) -> Outcome:
        """The same in two processes of torchrun, which is sent SIGTERM ``after`` the first step."""
        launcher = "-m torch.distributed.run --standalone --nproc_per_node 2"
        command = [sys.executable, *launcher.split(), str(REPOSITORY / "train_pretrain.py")]
        settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
        pipes = {"stderr": subprocess.STDOUT, "env": settings}
        with (
            self._output().open("wb") as output,
            subprocess.Popen([*command, *self.words(*more)], stdout=output, **pipes) as child,
        ):
            return self._follow(child.poll, after, child.terminate)

    def _output(self) -> Path:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        return self.out.parent / "output.txt"

    def _follow(
        self,
        exit_code: Callable[[], int | None],
        after: float | None,
        disturb: Callable[[], None],
    ) -> Outcome:
        """Wait until a process has an exit code; ``disturb`` it ``after`` its first step."""
        began = sent = 0.0
        while (code := exit_code()) is None:
            if not began and self.last_step():
                began = sent = time.monotonic()
            if began and after is not None and time.monotonic() >= began + after:
                sent, after = time.monotonic(), None
                disturb()
            time.sleep(0.002)
        output = self._output().read_text(encoding="utf-8", errors="replace")
        now = time.monotonic()
        return Outcome(code, output, self.last_step(), now - began, now - sent)

    def last_step(self) -> int:
        """The last step in the metrics, those of a run that has saved nothing included."""
        steps = [0]
        for path in metrics_path(self.out, RUN).parent.glob("*.jsonl"):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            steps += [json.loads(line)["step"] for line in lines if line.endswith("\n")]
        return max(steps)

    def saved_step(self) -> int:
        """The step of the newest whole state."""
        from trainer.checkpoints import newest_state

        found = newest_state(checkpoints_dir(self.out, RUN))
        return found.manifest["progress"]["step"] if found else 0

    def left(self) -> list:
        """What the run has left, but for the clock."""
        weights = base_path(self.out, "pretrain", 64)
        lines = metrics_path(self.out, RUN).read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        records[-1].update(records[-1].pop("summary"))
        losses = [record["loss"].hex() for record in records[:-1] if "loss" in record]
        rest = [{key: record[key] for key in record.keys() - CLOCK} for record in records]
        return [sha256_file(weights), sha256_file(weights.with_suffix(".json")), losses, rest]


def _end_with(words: list[str], prepare: Callable[[], None]) -> None:
    """In a fork: run the door and leave without what the parent would do at its end."""
    code = 70
    try:
        sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
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
    seen = set()

    def on_event(event: str, arguments: tuple) -> None:
        if event not in CALLS:
            return
        tensors = Path(str(arguments[0])).with_name("state.safetensors")
        if not tensors.exists():
            return
        seen.add(tensors)
        if len(seen) == number:
            os.truncate(tensors, tensors.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)
