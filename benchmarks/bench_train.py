"""How fast we train, beside MiniMind and PEFT: python benchmarks/bench_train.py --minimind DIR
--peft

Sides that are compared take turns, round by round, in processes of the same number of threads, on
the same rows. Figures go to benchmarks/results/bench_train.json, each measurement with its date and
machine.
"""

import importlib.util
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

Part = Literal[
    "floor",
    "pretrain",
    "lora",
    "lora_step",
    "memory",
    "full_vs_lora",
    "time_to_loss",
    "lora_to_loss",
]
DEFAULT = (
    "floor",
    "pretrain",
    "lora",
    "lora_step",
    "memory",
    "full_vs_lora",
)  # the others take an hour each
BESIDE_MINIMIND = {"pretrain", "time_to_loss", "lora_to_loss"}
MINIMIND_FILES = ("model/LMConfig.py", "model/model.py", "model/model_lora.py", "model/dataset.py")


@dataclass
class Options:
    """Measure training: against its own matrix products, MiniMind, PEFT with the Hugging Face
    Trainer, and itself.
    """

    only: tuple[Part, ...] = option(DEFAULT, "what to measure")
    minimind: Path | None = option(None, "the folder of MiniMind's code of April 2025")
    peft: bool = option(
        False, "put PEFT with the Hugging Face Trainer (pip install peft accelerate) beside LoRA"
    )
    pretrain: tuple[Path, ...] = option((bundled_data("pretrain_mini.jsonl"),), "documents")
    identity: Path = option(
        bundled_data("lora_identity.jsonl"), "chats of a small skill; {{name}} is filled in"
    )
    medical: Path = option(bundled_data("lora_medical.jsonl"), "chats of a larger skill")
    base: Path | None = option(
        None, "base that LoRA starts from (default: seeded weights, fit for timing)"
    )
    rounds: int = option(7, "how often the sides take turns")
    rows: int = option(32, "documents of a round of pretraining")
    chat_rows: int = option(128, "at most so many chats make an epoch; 0: all")
    minutes: float = option(20.0, "how long MiniMind trains in time_to_loss and lora_to_loss")
    our_rows: int = option(
        0, "windows or chats that our learning rate is planned for in these; 0: the door's epochs"
    )
    adamw_rows: int = option(0, "the same for ours with AdamW, which needs more of them")
    val_tokens: int = option(32768, "how many held-out tokens a score reads")
    price_per_hour: float = option(0.1, "assumed price of this machine for an hour, in dollars")
    threads: int = option(os.cpu_count() or 1, "threads of every process")
    max_seq_len: int = option(512, "tokens of a row or window; the length that MiniMind pads to")
    dim: int = option(512, "width of the model")
    n_layers: int = option(8, "number of blocks")
    work: Path = option(Path("out/bench_train"), "folder in which MiniMind's long runs are resumed")
    result: Path = option(
        REPOSITORY / "benchmarks" / "results" / "bench_train.json", "results file; merged into"
    )

    def __post_init__(self):
        for name in ("rounds", "rows", "threads", "val_tokens"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)} must be at least 1")
        for name in ("chat_rows", "our_rows", "adamw_rows", "price_per_hour"):
            require(
                getattr(self, name) >= 0, f"--{name} {getattr(self, name)} must not be negative"
            )
        require(self.minutes > 0, f"--minutes {self.minutes} must be positive")
        asked = [
            part
            for part in self.only
            if part in BESIDE_MINIMIND or (part == "lora" and not self.peft)
        ]
        others = " ".join(part for part in DEFAULT if part not in ("pretrain", "lora"))
        require(
            not asked or self.minimind is not None,
            f"--only {' '.join(asked)} needs --minimind DIR, the folder of MiniMind's code of April 2025; without it "
            f"there is --only {others}",
        )
        for name in MINIMIND_FILES if self.minimind else ():
            require((self.minimind / name).is_file(), f"--minimind {self.minimind} holds no {name}")
        for name in ("peft", "accelerate") if self.peft else ():
            require(
                importlib.util.find_spec(name) is not None,
                f"--peft needs the package {name}: pip install {name}",
            )


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    os.environ["OMP_NUM_THREADS"] = str(
        options.threads
    )  # torch reads it once, here and in every child
    from benchmarks.result_file import measured_on, read_results, write_results
    from benchmarks.training import against, floor, lora_cost, to_loss
    from core.files import sha256_file

    read_results(options.result)  # complains before the hour of work
    rooms = (floor, against, lora_cost, to_loss)
    packages = (
        ("torch", "transformers", "peft", "accelerate")
        if options.peft
        else ("torch", "transformers")
    )
    origin = {"threads": options.threads, **measured_on(packages)}
    if options.minimind:
        origin["minimind_sha256"] = {
            name: sha256_file(options.minimind / name)[:16] for name in MINIMIND_FILES
        }
    results = {}
    for part in options.only:
        measure = next(getattr(room, part) for room in rooms if hasattr(room, part))
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(options, Path(folder))
        results[part] = {**figures, "data": data_names(options, part), **origin}
        write_results(options.result, read_results(options.result) | {part: results[part]})
        print(f"\n{part}", *table(figures), sep="\n", flush=True)
    return results


def data_names(options: Options, part: str) -> list[str]:
    files = {"lora": (options.identity, options.medical), "full_vs_lora": (options.medical,)}
    files |= {
        "lora_step": (*options.pretrain, options.medical),
        "lora_to_loss": (options.identity,),
    }
    return [path.name for path in files.get(part, options.pretrain)]


def table(figures: dict, depth: int = 1) -> list[str]:
    """One line a figure, nested as the figures are; a spread is one figure. Lists are left to the
    file.
    """
    lines = []
    for name, value in figures.items():
        indent = "  " * depth
        if isinstance(value, dict) and value.keys() == {"min", "median", "max"}:
            lines.append(
                f"{indent}{name:34} {value['median']}   ({value['min']} .. {value['max']})"
            )
        elif isinstance(value, dict):
            lines += [f"{indent}{name}", *table(value, depth + 1)]
        elif not isinstance(value, list):
            lines.append(f"{indent}{name:34} {json.dumps(value, ensure_ascii=False)}")
    return lines


if __name__ == "__main__":
    run(main)
