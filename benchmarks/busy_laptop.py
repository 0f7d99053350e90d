"""How fast training stays beside another busy program, by how long OpenMP's threads spin:
python benchmarks/busy_laptop.py

Every run is a child process that pretrains for a few steps, alone or beside one process that counts
for ever. Settings take turns, round by round; figures are medians. Nothing else should run.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.result_file import measured_on, read_results, write_results
from core.errors import UserError, run
from core.options import CheckedOptions, option, parse
from core.paths import REPOSITORY, metrics_path
from core.threads import NAMES

SIZES = {  # flags of train_pretrain.py; None: its defaults
    "quick start": {"dim": 192, "n_layers": 4, "max_seq_len": 256, "batch_size": 8},
    "short rows": {"dim": 192, "n_layers": 4, "max_seq_len": 32, "max_steps": 150},
    "default": {"dim": 512, "n_layers": 8},
}
# GNU's own default. A setting of the other runtimes keeps the doors from choosing one for GNU's.
UNSET = {"KMP_BLOCKTIME": "200"}


@dataclass
class Options(CheckedOptions):
    """Measure tokens/s of training alone and beside a busy process, for spin counts of OpenMP."""

    spins: tuple[int, ...] = option((1500, 10000), "values of GOMP_SPINCOUNT")
    sizes: tuple[str, ...] = option(tuple(SIZES), "models to train")
    rounds: int = option(3, "runs of each setting", at_least=1)
    max_steps: int = option(15, "optimizer steps of a run; the first three do not count", above=3)
    busy_default: bool = option(
        True, "run GNU's default beside the busy process too (once; it takes minutes)"
    )
    result: Path = option(Path("benchmarks/results/busy_laptop.json"), "file of the figures")


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    settings = {"default": UNSET}
    settings |= {str(spins): {"GOMP_SPINCOUNT": str(spins)} for spins in options.spins}
    found = read_results(options.result)
    found |= measured_on(("torch",))
    for size in options.sizes:
        if size not in SIZES:
            raise UserError(f"sizes {size!r} is not known: choose from {', '.join(SIZES)}")
        flags = {"max_steps": options.max_steps} | SIZES[size]
        runs: dict[str, dict[str, list[float]]] = {}
        for number in range(options.rounds):
            for name, variables in settings.items():
                speeds = runs.setdefault(name, {"alone": [], "busy": []})
                speeds["alone"].append(tokens_per_second(flags, variables))
                if name != "default" or (options.busy_default and not number):
                    with busy_process():
                        speeds["busy"].append(tokens_per_second(flags, variables))
                print(f"{size}, {name}: {speeds}", flush=True)
        found[size] = summary(runs)
        write_results(options.result, found)
        print(json.dumps(found[size], indent=1))
    return found


def tokens_per_second(flags: dict[str, int], variables: dict[str, str]) -> float:
    """Pretrain in a child process with these OpenMP settings; its speed, from its metrics file."""
    chosen = set(NAMES)
    environment = {name: value for name, value in os.environ.items() if name not in chosen}
    with tempfile.TemporaryDirectory() as folder:
        flags = {**flags, "out_dir": folder, "val_ratio": 0, "log_interval": 1, "device": "cpu"}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, str(REPOSITORY / "train_pretrain.py"), *words]
        subprocess.run(command, env=environment | variables, check=True, stdout=subprocess.DEVNULL)
        text = metrics_path(folder, f"pretrain_{flags['dim']}").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    return [of["tokens_per_second"] for of in records if "tokens_per_second" in of][-1]


@contextmanager
def busy_process() -> Iterator[None]:
    """Inside, another process keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def summary(runs: dict[str, dict[str, list[float]]]) -> dict:
    """All speeds in tokens/s, and of each setting the medians over the default's speed alone."""
    best = statistics.median(runs["default"]["alone"])
    shares: dict[str, dict[str, float]] = {}
    for name, speeds in runs.items():
        medians = {place: statistics.median(of) for place, of in speeds.items() if of}
        shares[name] = {place: round(median / best, 3) for place, median in medians.items()}
    return {"tokens_per_second": runs, "share_of_default_alone": shares}


if __name__ == "__main__":
    run(main)
