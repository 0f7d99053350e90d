"""Kill a training run wherever it hurts, damage what it saved, and see whether it still ends as if
nothing had happened.

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

from benchmarks.torture_runs import INTERVAL, RUN, Job, kill_in_half, watch_calls
from core.errors import UserError, run
from core.options import option, parse, require
from core.paths import bundled_data, checkpoints_dir

# Of the runs that are killed at each call: enough for a save that deletes an older state.
POINT_STEPS = 6


@dataclass
class Options:
    """Kill, damage and resume small training runs; report how many ended as an undisturbed one."""

    steps: int = option(40, "optimizer steps of a run that is disturbed at random times")
    kills: int = option(50, "SIGKILLs at random times")
    terms: int = option(20, "SIGTERMs at random times, one process")
    terms_2: int = option(5, "SIGTERMs at random times, two processes")
    halves: int = option(3, "kills with half of a state written, each in a later save")
    damages: int = option(200, "truncations, and as many flipped bits")
    seed: int = option(0, "of all random choices")
    quick: bool = option(False, "a little of everything, for the test suite")
    result: Path | None = option(None, "write the figures to this JSON file")

    def __post_init__(self):
        require(hasattr(os, "fork"), "this needs a system with fork and SIGKILL: Linux or macOS")
        if self.quick:
            self.steps, self.kills, self.terms, self.terms_2 = 8, 1, 1, 0
            self.halves, self.damages = 1, 10


class Campaign:
    """The runs, in ``folder``, and the list of what went wrong."""

    def __init__(self, folder: Path, data: Path, options: Options):
        self.folder, self.data, self.steps = folder, data, options.steps
        self.rng, self.failures = random.Random(options.seed), []

    def job(self, name: str, steps: int) -> Job:
        """A run in a new place, of the same name as others before it: the name is in the files."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return Job(self.folder / name / "out", self.data, steps)

    def check(self, fine: bool, what: str) -> bool:
        if not fine:
            self.failures.append(what)
            print(f"FAILED: {what}", flush=True)
        return fine

    def resumes(self, job: Job, expected: list, what: str) -> bool:
        """Does a run that was cut short go on to the same end?"""
        end = job.forked("--resume")
        whole = self.check(end.code == 0, f"{what}: resume ended with {end.code}: {end.output}")
        return whole and self.check(job.left() == expected, f"{what}: another end")

    def at_random(self, signum: int, count: int, expected: list, seconds: float) -> dict:
        """Send ``signum`` at ``count`` random times within a run whose steps take ``seconds``;
        resume each.
        """
        good, lost, slowest = 0, [], 0.0
        while len(lost) < count:
            what, job = (
                f"{signal.Signals(signum).name} {len(lost) + 1}",
                self.job("cut", self.steps),
            )
            after = self.rng.uniform(0, seconds)
            end = job.forked(disturb=(after, signum))
            if end.code == 0:
                continue  # the run was faster
            wanted = -signum if signum == signal.SIGKILL else 128 + signum
            if signum == signal.SIGTERM and end.step == self.steps and end.code == -signum:
                continue  # it came after the last step, when nothing was left to save
            lost.append(end.step - job.saved_step())
            fine = self.check(end.code == wanted, f"{what}: exit code {end.code}: {end.output}")
            allowed = INTERVAL if signum == signal.SIGKILL else 0
            fine &= self.check(0 <= lost[-1] <= allowed, f"{what}: {lost[-1]} steps lost")
            good += fine & self.resumes(job, expected, f"{what} after {after:.2f} s")
            slowest = max(slowest, end.stopping)
        steps_lost = {str(steps): times for steps, times in sorted(Counter(lost).items())}
        figures = {"runs": count, "equal": good, "steps_lost": steps_lost}
        return {**figures, "slowest_stop_seconds": round(slowest, 2)}

    def at_the_calls(self, one_of_a_kind: bool, halves: int) -> dict:
        """Kill the process before calls to the system that its saves make: each one, or one at
        random of each kind; and ``halves`` times with half of a state written.
        """
        listing, whole = self.folder / "calls.json", self.job("cut", POINT_STEPS)
        end = whole.forked(prepare=partial(watch_calls, whole.out, listing=listing))
        self.check(end.code == 0, f"undisturbed: {end.code} {end.output}")
        expected, calls = whole.left(), json.loads(listing.read_text(encoding="utf-8"))
        points = list(enumerate(calls))
        if one_of_a_kind:
            self.rng.shuffle(points)
            points = list({call.split()[0]: (number, call) for number, call in points}.values())
        job = self.job("cut", POINT_STEPS)
        kills = [
            (f"call {number}, {call}", partial(watch_calls, job.out, kill_at=number))
            for number, call in points
        ]
        kills += [(f"half of state {n}", partial(kill_in_half, n)) for n in range(1, halves + 1)]
        good = 0
        for what, prepare in kills:
            what, job = f"kill at {what}", self.job("cut", POINT_STEPS)
            end = job.forked(prepare=prepare)
            lost = end.step - job.saved_step()
            fine = self.check(end.code == -signal.SIGKILL, f"{what}: exit code {end.code}")
            fine &= self.check(lost <= INTERVAL, f"{what}: {lost} steps lost")
            good += fine & self.resumes(job, expected, what)
        kinds = Counter(call.split()[0] for _, call in points)
        figures = {"points": len(kills), "equal": good, "calls": dict(kinds)}
        return {**figures, "half_written": halves}

    def damage(self, whole: Job, count: int) -> dict:
        """Truncate, and flip single bits of, every file of a state in turn."""
        job = self.job("damaged", self.steps)
        shutil.copytree(whole.out, job.out)
        newest = checkpoints_dir(job.out, RUN) / f"step-{self.steps}"
        before = newest.with_name(f"step-{self.steps - INTERVAL}")
        files, found = sorted(newest.iterdir()), Counter()
        with contextlib.redirect_stdout(io.StringIO()):  # a line for each damaged state
            for number in range(count):
                path = files[number % len(files)]
                good = path.read_bytes()
                at = self.rng.randrange(len(good))
                flipped = bytearray(good)
                flipped[at] ^= 1 << self.rng.randrange(8)
                for kind, bad in (("truncation", good[:at]), ("flipped bit", flipped)):
                    path.write_bytes(bad)
                    step = job.saved_step()
                    found["silent" if step == self.steps else "fell back to the state before"] += 1
                    fine = step == self.steps - INTERVAL
                    self.check(fine, f"{kind} of {path.name} at {at}: step {step}")
                path.write_bytes(good)
            for state in (newest, before):
                (state / files[0].name).write_bytes(b"")
            try:
                job.saved_step()
            except UserError:
                found["refused, all states damaged"] += 1
        self.check(found["refused, all states damaged"] == 1, "two damaged states were not refused")
        return {"damages": 2 * count, "files": [path.name for path in files], **found}

    def two_processes(self, count: int) -> dict:
        """SIGTERM to torchrun at random times; resumed by torchrun."""
        whole = self.job("whole-2", self.steps)
        undisturbed = whole.torchrun()
        self.check(undisturbed.code == 0, f"two processes: {undisturbed.code}")
        expected, runs, good = whole.left(), 0, 0
        while runs < count:
            job = self.job("cut-2", self.steps)
            end = job.torchrun(after=self.rng.uniform(0, undisturbed.seconds))
            if end.code == 0 or end.step == self.steps:
                continue  # the run was faster
            runs += 1
            what, saved = f"SIGTERM to torchrun {runs}", job.saved_step()
            fine = self.check(end.step == saved, f"{what}: step {end.step}, saved {saved}")
            again = job.torchrun("--resume")
            same = again.code == 0 and job.left() == expected
            good += fine & self.check(same, f"{what}: another end")
        return {"runs": count, "equal": good}


@contextlib.contextmanager
def small_data() -> Iterator[tuple[Path, Path]]:
    with (
        tempfile.TemporaryDirectory() as folder,
        bundled_data("pretrain_mini.jsonl").open(encoding="utf-8") as file,
    ):
        data = Path(folder) / "texts.jsonl"
        data.write_text("".join(islice(file, 60)), encoding="utf-8")
        yield Path(folder), data


def main(argv: list[str] | None = None) -> None:
    options = parse(Options, argv)
    import torch

    torch.set_num_threads(1)
    import matplotlib.figure  # noqa: F401

    import trainer.stage  # noqa: F401 (what every fork would otherwise import for itself)
    from benchmarks.result_file import measured_on, write_results

    began, figures = time.monotonic(), {}
    with small_data() as (folder, data):
        campaign = Campaign(folder, data, options)
        whole = campaign.job("whole", options.steps)
        end = whole.forked()
        require(end.code == 0, f"the undisturbed run failed: {end.output}")
        at_random = partial(campaign.at_random, expected=whole.left(), seconds=end.seconds)
        for name, work in {
            "sigkill at random times": lambda: at_random(signal.SIGKILL, options.kills),
            "sigkill at the calls of a save": lambda: campaign.at_the_calls(
                options.quick, options.halves
            ),
            "damaged states": lambda: campaign.damage(whole, options.damages),
            "sigterm, one process": lambda: at_random(signal.SIGTERM, options.terms),
            "sigterm, two processes": lambda: (
                campaign.two_processes(options.terms_2) if options.terms_2 else {}
            ),
        }.items():
            figures[name] = work()
            print(f"{name}: {figures[name]} ({time.monotonic() - began:.0f} s)", flush=True)
    figures = {"failures": campaign.failures, **figures, "seconds": round(time.monotonic() - began)}
    figures |= {"seed": options.seed, "steps": options.steps}
    write_results(options.result, figures | measured_on(("torch", "safetensors")))
    if campaign.failures:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
