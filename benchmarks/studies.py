"""What the studies of skills share: runs in processes of their own that are made once, and what a
method costs.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from benchmarks.result_file import measured_on, results_so_far, write_results
from core.errors import UserError
from core.files import sha256_file
from core.options import option, require
from core.paths import REPOSITORY


@dataclass
class SkillStudy:
    """Flags of a study that trains one skill on one base, again and again; defaults are each
    study's own.
    """

    base: Path | None = option(None, "chat base of our own kind")
    data: Path | None = option(None, "chats of the skill")
    max_steps: int = option(40, "optimizer steps of a run")
    batch_size: int = option(8, "rows of a step")
    val_tokens: int = option(8192, "how many held-out tokens a score reads")
    jobs: int = option(2, "runs at once; they share the cores")
    out_dir: Path = option(Path("out/study"), "folder of the runs")

    def __post_init__(self):
        require(self.base is not None, "name a chat base with --base")
        require(self.data is not None, "name the skill's chats with --data")
        require(
            self.base.with_suffix(".json").is_file(),
            f"--base {self.base} is no base of ours with its .json",
        )
        require(self.data.is_file(), f"--data {self.data} does not exist")
        least = min(self.max_steps, self.batch_size, self.val_tokens, self.jobs)
        require(least >= 1, "--max_steps, --batch_size, --val_tokens and --jobs begin at 1")

    def settings(self) -> dict:
        """What the figures depend on. Raises ``UserError`` for a base or data that cannot be
        read.
        """
        from model.weights import read_record

        found = {"base": read_record(self.base).fingerprint, "data": sha256_file(self.data)}
        return found | {
            name: getattr(self, name) for name in ("max_steps", "batch_size", "val_tokens")
        }

    def train(
        self, name: str, flags: list, base: Path | None = None, jobs: int | None = None
    ) -> str:
        """Train the skill ``name`` into ``out_dir``, on another ``base`` if given; returns what was
        printed.
        """
        command = [
            "--base",
            base or self.base,
            "--data_path",
            self.data,
            "--out_dir",
            self.out_dir,
            "--lora_name",
            name,
        ]
        command += [
            "--max_steps",
            self.max_steps,
            "--batch_size",
            self.batch_size,
            "--val_tokens",
            self.val_tokens,
        ]
        return said_by(
            "train_lora.py", [*command, "--device", "cpu", *flags], name, jobs or self.jobs
        )


class Runs:
    """The runs of a study in its result file: what is there is not made again.

    Raises ``UserError`` if the file was made with other ``settings``.
    """

    def __init__(self, path: Path, settings: dict, packages: tuple[str, ...]):
        self.path, self.lock = path, Lock()
        self.found = results_so_far(path, settings)
        self.made = self.found.setdefault("runs", {})
        origin, origins = measured_on(packages), self.found.setdefault("measured_on", [])
        if origin not in origins:  # a study may go on elsewhere, or on another day
            origins.append(origin)

    def get(self, key: str, make: Callable[[], dict]) -> dict:
        """The figures of the run ``key``, from the file or from ``make``. Threads may call it at
        once.
        """
        if key not in self.made:
            figures = make()
            with self.lock:
                self.made[key] = figures
                write_results(self.path, self.found)
                print(f"{key}: {figures}", flush=True)
        return self.made[key]


def at_once(jobs: int, work: Callable, items: Iterable) -> None:
    """``work`` on each of ``items``, ``jobs`` at a time; the first failure is raised when those
    under way are done.
    """
    pool = ThreadPoolExecutor(jobs)
    try:
        for _ in pool.map(work, items):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def said_by(script: str, flags: list, called: str, jobs: int = 1) -> str:
    """What a training script prints, in a process that leaves room for ``jobs`` such.

    Raises ``UserError`` with its last words if it fails.
    """
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    done = subprocess.run(
        [sys.executable, *map(str, (REPOSITORY / script, *flags))],
        env=os.environ | {"PYTHONUTF8": "1", "OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(f"{called} failed: {reason}")
    return done.stdout


def costs(methods: Iterable[str], rounds: int, dry_run: Callable[[str], str]) -> dict[str, dict]:
    """Tokens a second and peak memory in MB of each method, measured in turn, one at a time; what
    it trains, and bits a parameter where it quantises.

    ``dry_run`` gives what the training script prints for a method with ``--dry_run``.
    """
    found = {
        method: {"trainable": 0, "tokens_per_second": [], "peak_memory_mb": []}
        for method in methods
    }
    for _ in range(rounds):
        for method, figures in found.items():
            said = dry_run(method)
            speed, memory = re.search(
                r"([\d,]+) tokens/s \(.*peak memory ([\d,]+) MB", said
            ).groups()
            figures["trainable"] = number(re.search(r"training ([\d,]+) of", said)[1])
            if bits := re.search(
                r"NF4: ([\d.]+) bits a parameter there, ([\d.]+) in the whole base", said
            ):
                figures |= {
                    "bits_per_parameter": float(bits[1]),
                    "bits_of_the_whole_base": float(bits[2]),
                }
            figures["tokens_per_second"].append(number(speed))
            figures["peak_memory_mb"].append(number(memory))
    return found


def number(text: str) -> int:
    return int(text.replace(",", ""))
