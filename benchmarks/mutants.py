"""Breaks the program on purpose, one line at a time, and asks the tests whether they notice.

python benchmarks/mutants.py --result FILE
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.result_file import measured_on, read_results, write_results
from core.errors import UserError, run
from core.options import option, parse, require
from core.paths import REPOSITORY

TIMEOUT, TIMEOUT_OF_ALL = 300, 3600  # seconds; a fault that makes the tests hang is noticed
FAILED, PASSED = 1, 0  # exit codes of pytest


@dataclass
class Options:
    """Run the tests on copies of the program that have one fault each; a fault that no test sees
    is missed.
    """

    only: tuple[str, ...] = option((), "words: only the mutants that have one of them in the name")
    root: Path = option(REPOSITORY, "the checkout to break a copy of")
    list: Path = option(Path("benchmarks/mutants.json"), "the mutants")
    result: Path | None = option(None, "file of the figures; other mutants in it are kept")
    all_tests: bool = option(False, "run the whole suite on each, not the named test files")

    def __post_init__(self):
        require(self.list.is_file(), f"--list {self.list} does not exist")


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    listed = json.loads(options.list.read_text(encoding="utf-8"))
    chosen = [m for m in listed if not options.only or any(w in m["name"] for w in options.only)]
    require(bool(chosen), f"no name in {options.list} has one of the words {options.only}")
    figures = read_results(options.result)
    figures |= measured_on(("torch", "pytest"))
    found = figures.setdefault("mutants", {})
    with tempfile.TemporaryDirectory() as folder:
        copy = Checkout(options.root, Path(folder))
        for mutant in chosen:
            copy.text_with(mutant)  # all fit before the first of them takes its time
        for number, mutant in enumerate(chosen, 1):
            began = time.perf_counter()
            test = copy.caught_by(mutant, () if options.all_tests else mutant["tests"])
            seconds = round(time.perf_counter() - began)
            found[mutant["name"]] = {"file": mutant["file"], "caught_by": test, "seconds": seconds}
            write_results(options.result, figures)
            said = f"caught by {test}" if test else "MISSED"
            print(f"{number}/{len(chosen)} {mutant['name']}: {said}, {seconds} s", flush=True)
    missed = [mutant["name"] for mutant in chosen if not found[mutant["name"]]["caught_by"]]
    print("\n".join([f"{len(chosen) - len(missed)} of {len(chosen)} caught; missed:", *missed]))
    return figures


class Checkout:
    """A copy, below ``folder``, of what git knows or would add in ``root``."""

    def __init__(self, root: Path, folder: Path):
        self.root, self.scratch = folder / "checkout", folder / "pytest"
        self._sound: set[str] = set()  # tests that pass without a fault
        ask = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(ask, cwd=root, check=True, capture_output=True).stdout.split(b"\0")
        for name in map(os.fsdecode, names):
            if (root / name).is_file():  # not if it was deleted and git was not told yet
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, self.root / name)

    def text_with(self, mutant: dict) -> str:
        """The file with its fault. Raises ``UserError`` unless ``before`` is there exactly once."""
        path = self.root / mutant["file"]
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if (count := text.count(mutant["before"])) != 1:
            raise UserError(
                f"the line of {mutant['name']!r} is {count} times in {mutant['file']}, not once"
            )
        return text.replace(mutant["before"], mutant["after"])

    def caught_by(self, mutant: dict, tests: list[str]) -> str:
        """The first of ``tests`` (none: all) that sees the fault, ``timeout``, or nothing.

        Raises ``UserError`` if that test fails without the fault too, for then it has seen nothing.
        """
        path = self.root / mutant["file"]
        sound, broken = path.read_bytes(), self.text_with(mutant)
        try:
            path.write_text(broken, encoding="utf-8", newline="\n")
            failed = self._first_failure(tests, mutant["name"])
        finally:
            path.write_bytes(sound)
        if failed not in {"", "timeout", *self._sound}:
            if self._first_failure([failed], "the code as it is"):
                raise UserError(f"{failed} fails without a fault too: mend it before this is asked")
            self._sound.add(failed)
        return failed

    def _first_failure(self, tests: list[str], called: str) -> str:
        shutil.rmtree(self.scratch, ignore_errors=True)
        # The cache of bytecode may not tell two versions apart that are as long and as old.
        variables = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        words = ["-m", "pytest", "-x", "-q", f"--basetemp={self.scratch}", "--cache-clear", *tests]
        settings = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        settings["timeout"] = TIMEOUT if tests else TIMEOUT_OF_ALL
        try:
            code = subprocess.run(
                [sys.executable, *words], cwd=self.root, env=os.environ | variables, **settings
            ).returncode
        except subprocess.TimeoutExpired:
            return "timeout"
        if code not in (PASSED, FAILED):
            raise UserError(f"pytest ends with exit code {code} on {called}: {' '.join(tests)}")
        failures = self.root / ".pytest_cache" / "v" / "cache" / "lastfailed"
        return next(iter(json.loads(failures.read_text(encoding="utf-8")))) if code else ""


if __name__ == "__main__":
    run(main)
