"""How fast we train, beside MiniMind and PEFT: python benchmarks/bench_train.py --minimind DIR --peft

Sides that are compared take turns, round by round, in processes of the same number of threads, on the same rows.
Figures go to benchmarks/results/bench_train.json, each measurement with its date and machine.
"""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import run
from core.options import option, parse, require
from core.paths import REPOSITORY, bundled_data

Part = Literal["floor"]


@dataclass
class Options:
    """Measure training: against its own matrix products, MiniMind, PEFT with the Hugging Face Trainer, and itself."""

    only: tuple[Part, ...] = option(("floor",), "what to measure")
    pretrain: tuple[Path, ...] = option((bundled_data("pretrain_mini.jsonl"),), "documents")
    rounds: int = option(7, "how often the sides take turns")
    threads: int = option(os.cpu_count() or 1, "threads of every process")
    max_seq_len: int = option(512, "tokens of a row or window; the length that MiniMind pads to")
    dim: int = option(512, "width of the model")
    n_layers: int = option(8, "number of blocks")
    result: Path = option(REPOSITORY / "benchmarks" / "results" / "bench_train.json", "results file; merged into")

    def __post_init__(self):
        for name in ("rounds", "threads"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)} must be at least 1")


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    from benchmarks import train_floor
    from benchmarks.environment import measured_on
    from benchmarks.train_measure import merge_results

    measurements = {"floor": train_floor.measure}
    results = {}
    for part in options.only:
        with tempfile.TemporaryDirectory() as folder:
            figures = measurements[part](options, Path(folder))
        results[part] = {**figures, "threads": options.threads, **measured_on(("torch", "transformers"))}
        merge_results(options.result, part, results[part])
        print(f"\n{part}\n{json.dumps(figures, indent=1)}", flush=True)
    return results


if __name__ == "__main__":
    run(main)
