"""Kill a training run wherever it hurts, damage what it saved, and see whether it still ends as if
nothing had been.

    python benchmarks/torture.py [--quick] [--result FILE]

Every run is a real front door in a process of its own, on one thread, with a very small model. What
counts as equal: the bytes of the weights and of their record, and every logged number but the
clock's. Exit code 1 when one differs.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.torture_runs import (
    INTERVAL,
    RUN,
    STEPS,
    argv,
    forked,
    kill_in_half,
    left_in,
    saved_step,
    torchrun,
    watch_calls,
)
from core.errors import UserError, run
from core.options import option, parse, require
from core.paths import bundled_data, checkpoints_dir

POINT_STEPS = (
    6  # of the runs that are killed at each call: enough for a save that deletes an older state
)


@dataclass
class Options:
    """Kill, damage and resume small training runs; report how many ended as an undisturbed one."""

    kills: int = option(50, "SIGKILLs at random times")
    terms: int = option(20, "SIGTERMs at random times, one process")
    terms_2: int = option(5, "SIGTERMs at random times, two processes")
    every: int = option(1, "kill at each so many-th call of the saves")
    damages: int = option(200, "truncations, and as many flipped bits")
    seed: int = option(0, "of all random choices")
    quick: bool = option(False, "a tenth of everything, for the test suite")
    result: Path | None = option(None, "write the figures to this JSON file")

    def __post_init__(self):
        require(hasattr(os, "fork"), "this needs a system with fork and SIGKILL: Linux or macOS")
        if self.quick:
            self.kills, self.terms, self.terms_2, self.every, self.damages = 3, 1, 0, 20, 10


class Campaign:
    """The runs, in ``folder``, and the count of what came out."""

    def __init__(self, folder: Path, data: Path, seed: int):
        self.folder, self.data, self.rng = folder, data, random.Random(seed)
        self.failures: list[str] = []

    def out(self, name: str) -> Path:
        """A new place for a run, of the same name as all others: it stands in the files."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name / "out"

    def check(self, fine: bool, what: str) -> bool:
        if not fine:
            self.failures.append(what)
            print(f"FAILED: {what}", flush=True)
        return fine

    def resumes(self, out: Path, steps: int, expected: list, what: str) -> bool:
        """Does the run in ``out`` go on to the same end?"""
        end = forked(argv(out, self.data, steps, "--resume"))
        if not self.check(
            end.code == 0, f"{what}: resume ended with {end.code}: {''.join(end.lines[-3:])}"
        ):
            return False
        return self.check(left_in(out) == expected, f"{what}: another end")

    def at_random(self, signum: int, count: int, expected: list, seconds: float) -> dict:
        """Send ``signum`` at ``count`` random times within a run whose steps take ``seconds``;
        resume each.
        """
        good, lost, slowest = 0, [], 0.0
        while len(lost) < count:
            what, out = f"{signal.Signals(signum).name} {len(lost) + 1}", self.out("cut")
            after = self.rng.uniform(0, seconds)
            end = forked(argv(out, self.data, STEPS), disturb=(after, signum))
            if end.code == 0:
                continue  # the run was faster
            wanted = -signum if signum == signal.SIGKILL else 128 + signum
            if signum == signal.SIGTERM and end.step == STEPS and end.code == -signum:
                continue  # it came after the last step, when nothing was left to save
            lost.append(end.step - saved_step(out))
            fine = self.check(
                end.code == wanted, f"{what}: exit code {end.code}: {''.join(end.lines[-3:])}"
            )
            allowed = INTERVAL if signum == signal.SIGKILL else 0
            fine &= self.check(0 <= lost[-1] <= allowed, f"{what}: {lost[-1]} steps lost")
            good += fine & self.resumes(out, STEPS, expected, f"{what} after {after:.2f} s")
            slowest = max(slowest, end.stopping)
        steps_lost = {str(steps): times for steps, times in sorted(Counter(lost).items())}
        return {
            "runs": count,
            "equal": good,
            "steps_lost": steps_lost,
            "slowest_stop_seconds": round(slowest, 2),
        }

    def at_every_call(self, every: int) -> dict:
        """Kill the process at each call to the system that its saves make, before the call."""
        listing = self.folder / "calls.json"
        out = self.out("cut")
        end = forked(argv(out, self.data, POINT_STEPS), lambda: watch_calls(out, listing=listing))
        self.check(end.code == 0, f"undisturbed: {end.code} {''.join(end.lines[-5:])}")
        expected, calls = left_in(out), json.loads(listing.read_text(encoding="utf-8"))
        good = 0
        points = list(islice(enumerate(calls), self.rng.randrange(every), None, every))
        for number, call in [
            *points,
            *((number, "half of state.safetensors") for number in range(1, 4)),
        ]:
            what, out = f"kill at call {number}, {call}", self.out("cut")
            half = call.startswith("half")
            prepare = (
                (lambda: kill_in_half(number))
                if half
                else (lambda: watch_calls(out, kill_at=number))
            )
            end = forked(argv(out, self.data, POINT_STEPS), prepare)
            lost = end.step - saved_step(out)
            fine = self.check(end.code == -signal.SIGKILL, f"{what}: exit code {end.code}")
            fine &= self.check(lost <= INTERVAL, f"{what}: {lost} steps lost")
            good += fine & self.resumes(out, POINT_STEPS, expected, what)
        kinds = Counter(call.split()[0] for _, call in points)
        return {"points": len(points) + 3, "equal": good, "calls": dict(kinds), "half_written": 3}

    def damage(self, whole: Path, count: int) -> dict:
        """Truncate, and flip single bits of, every file of a state in turn."""
        out = self.out("damaged")
        shutil.copytree(whole, out)
        newest = checkpoints_dir(out, RUN) / f"step-{STEPS}"
        files = sorted(newest.iterdir())
        found = Counter()
        with contextlib.redirect_stdout(io.StringIO()):  # a line for each damaged state
            for number in range(count):
                path = files[number % len(files)]
                good = path.read_bytes()
                at = self.rng.randrange(len(good))
                flipped = (
                    good[:at] + bytes([good[at] ^ 1 << self.rng.randrange(8)]) + good[at + 1 :]
                )
                for kind, bad in (("truncation", good[:at]), ("flipped bit", flipped)):
                    path.write_bytes(bad)
                    step = saved_step(out)
                    found["silent" if step == STEPS else "fell back to the state before"] += 1
                    self.check(
                        step == STEPS - INTERVAL, f"{kind} of {path.name} at {at}: step {step}"
                    )
                path.write_bytes(good)
            for state in (newest, newest.with_name(f"step-{STEPS - INTERVAL}")):
                (state / files[0].name).write_bytes(b"")
            try:
                saved_step(out)
            except UserError:
                found["refused, all states damaged"] += 1
        self.check(found["refused, all states damaged"] == 1, "two damaged states were not refused")
        return {"damages": 2 * count, "files": [path.name for path in files], **found}

    def two_processes(self, count: int) -> dict:
        """SIGTERM to torchrun at random times; resumed by torchrun."""
        whole = self.out("whole-2")
        undisturbed = torchrun(argv(whole, self.data, STEPS))
        self.check(undisturbed.code == 0, f"two processes: {undisturbed.code}")
        expected, good, ends = left_in(whole), 0, Counter()
        while ends.total() < count:
            out, number = self.out("cut-2"), ends.total()
            end = torchrun(
                argv(out, self.data, STEPS), disturb_after=self.rng.uniform(0, undisturbed.seconds)
            )
            if end.code == 0 or end.step == STEPS:
                continue  # the run was faster
            said = sum("stopped by SIGTERM" in line for line in end.lines)
            ends["stopped once" if said == 1 else f"said {said} times"] += 1
            what = f"SIGTERM to torchrun {number + 1}"
            fine = self.check(
                said == 1 and end.step == saved_step(out),
                f"{what}: said {said} times, step {end.step}",
            )
            again = torchrun(argv(out, self.data, STEPS, "--resume"))
            good += fine & self.check(
                again.code == 0 and left_in(out) == expected, f"{what}: another end"
            )
        return {"runs": count, "equal": good, "ends": dict(ends)}


@contextlib.contextmanager
def small_data() -> Iterator[tuple[Path, Path]]:
    with (
        tempfile.TemporaryDirectory() as folder,
        bundled_data("pretrain_mini.jsonl").open(encoding="utf-8") as file,
    ):
        data = Path(folder) / "texts.jsonl"
        data.write_text("".join(islice(file, 60)), encoding="utf-8")
        yield Path(folder), data


def main(argv_: list[str] | None = None) -> None:
    options = parse(Options, argv_)
    import torch

    torch.set_num_threads(1)
    import matplotlib.figure  # noqa: F401

    import trainer.stage  # noqa: F401 (what every fork would otherwise import for itself)
    from benchmarks.result_file import measured_on, write_results

    began = time.monotonic()
    with small_data() as (folder, data):
        campaign = Campaign(folder, data, options.seed)
        whole = campaign.out("whole")
        undisturbed = forked(argv(whole, data, STEPS))
        require(
            undisturbed.code == 0, f"the undisturbed run failed: {''.join(undisturbed.lines[-5:])}"
        )
        expected = left_in(whole)
        figures = {}
        at_random = partial(campaign.at_random, expected=expected, seconds=undisturbed.seconds)
        for name, work in {
            "sigkill at random times": lambda: at_random(signal.SIGKILL, options.kills),
            "sigkill at the calls of a save": lambda: campaign.at_every_call(options.every),
            "damaged states": lambda: campaign.damage(whole, options.damages),
            "sigterm, one process": lambda: at_random(signal.SIGTERM, options.terms),
            "sigterm, two processes": lambda: (
                campaign.two_processes(options.terms_2) if options.terms_2 else {}
            ),
        }.items():
            figures[name] = work()
            print(f"{name}: {figures[name]} ({time.monotonic() - began:.0f} s)", flush=True)
    figures = {"failures": campaign.failures, **figures, "seconds": round(time.monotonic() - began)}
    figures |= {"seed": options.seed, "steps": STEPS, **measured_on(("torch", "safetensors"))}
    write_results(options.result, figures)
    if campaign.failures:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
