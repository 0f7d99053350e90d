"""Is this checkout as fast as another one? python benchmarks/compare.py --other DIR

Both run the same commands on the same rows in processes that take turns, so that what else the
machine does falls on both alike. A ratio above 1 means that this checkout is faster.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.result_file import measured_on, write_results
from core.errors import UserError, run
from core.options import option, parse, require
from core.paths import REPOSITORY, base_path, bundled_data, lora_path, metrics_path

COMMON = "--device cpu --max_seq_len 256 --batch_size 8 --val_tokens 256 --log_interval 1"
PRETRAIN = "train_pretrain.py --data_path TEXTS"
SMALL = "--dim 256 --n_layers 6"  # small enough for many rounds
LORA = "train_lora.py --data_path IDENTITY --general_data CHATS --lora_name"
DATA = {
    "TEXTS": bundled_data("pretrain_mini.jsonl"),
    "CHATS": bundled_data("sft_mini"),
    "IDENTITY": bundled_data("lora_identity.jsonl"),
}
# Run once, uncounted: they fill the caches of tokens and make a chat base and two skills.
PREPARED = (
    f"{PRETRAIN} {SMALL} --max_steps 1",
    "train_full_sft.py --data_path CHATS --max_steps 1",
    f"{LORA} a --max_steps 1",
    f"{LORA} b --max_steps 1 --seed 1",
)
# What is timed -> the run whose metrics hold the time, and its command.
TIMED = {
    "pretraining steps, dim 256": ("pretrain_256", f"{PRETRAIN} {SMALL} --max_steps 24"),
    "pretraining steps, default model": ("pretrain_512", f"{PRETRAIN} --max_steps 10"),
    "LoRA epochs, dim 256": ("lora_a_256", f"{LORA} a --epochs 3"),
}
SWAPS = "200"
SWAP = """
import json, statistics, sys, time, torch
from model.LMConfig import LMConfig
from model.model import MiniMindLM
from model.model_lora import attach_lora

turns, base, *skills = sys.argv[1:]
model = MiniMindLM(LMConfig(dim=256, n_layers=6))
model.load_state_dict(torch.load(base))
seconds = []
for turn in range(int(turns)):
    began = time.perf_counter()
    attach_lora(model, skills[turn % len(skills)])
    seconds.append(time.perf_counter() - began)
print(json.dumps(statistics.median(seconds)))
"""
TOKENISE = """
import json, sys, tempfile, time
from pathlib import Path
from core.paths import TOKENIZER_DIR
from dataset.cache import kind_of, tokenize_files
from dataset.tokenizer import load_tokenizer

rows = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
tokenizer, seconds = load_tokenizer(TOKENIZER_DIR), []
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "rows.jsonl"
    for turn in range(2):  # the first one warms up
        marks = (f't": "{turn}{n} ' for n in range(12))  # no two copies are equal
        copies = (row.replace('t": "', mark) for mark in marks for row in rows)
        path.write_text("\\n".join(copies), encoding="utf-8")
        kind = kind_of(path)
        began = time.perf_counter()
        tokenize_files((path,), kind, tokenizer, Path(folder), workers=1)
        seconds.append(time.perf_counter() - began)
print(json.dumps(seconds[-1]))
"""
# What a program of its own times -> that program and its arguments.
PROGRAMS = {
    "skill swap, dim 256": (SWAP, SWAPS, "BASE", "SKILL_a", "SKILL_b"),
    "tokenising chats": (TOKENISE, "CHATS"),
    "tokenising texts": (TOKENISE, "TEXTS"),
}


@dataclass
class Options:
    """Time training steps, skill swaps and tokenising here and in another checkout."""

    other: Path | None = option(None, "folder of the other checkout of this repository")
    rounds: int = option(5, "turns of each checkout; the ratios are medians over them")
    result: Path | None = option(None, "write the figures to this JSON file")

    def __post_init__(self):
        found = self.other is not None and (self.other / "train_lora.py").is_file()
        require(found, f"--other must be another checkout of this repository, not {self.other}")
        require(self.rounds >= 1, f"--rounds {self.rounds} must be at least 1")


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    with tempfile.TemporaryDirectory() as folder:
        this = Side(REPOSITORY, Path(folder) / "this")
        other = Side(options.other.resolve(), Path(folder) / "other")
        for side in (this, other):
            for command in PREPARED:
                side.train(command)
        for number in range(options.rounds):
            for name in (*TIMED, *PROGRAMS):
                for side in (this, other) if number % 2 else (other, this):
                    side.time(name)
                print(f"{name}: {this.seconds[name][-1]:.4g} s, {other.seconds[name][-1]:.4g} s")
    figures = {
        "rounds": options.rounds,
        "other_over_this": ratios(this.seconds, other.seconds),
        "seconds": {"this": this.seconds, "other": other.seconds},
        **measured_on(("torch", "transformers")),
    }
    print(json.dumps(figures["other_over_this"], indent=1))
    write_results(options.result, figures)
    return figures


class Side:
    """One checkout, its folder of results, and the ``seconds`` that it took in each round."""

    def __init__(self, checkout: Path, out: Path):
        self.checkout, self.out = checkout, out
        self.seconds = {name: [] for name in (*TIMED, *PROGRAMS)}

    def train(self, command: str) -> None:
        script, *flags = words(f"{command} {COMMON}")
        if script == "train_lora.py" and (self.checkout / "trainer" / "keeping.py").is_file():
            flags += ["--keep", "0"]  # as before there was a choice
        self._python(str(self.checkout / script), *flags, "--out_dir", str(self.out))

    def time(self, name: str) -> None:
        if name in TIMED:
            run_name, command = TIMED[name]
            self.train(command)
            found = seconds_in(metrics_path(self.out, run_name))
        else:
            program, *arguments = PROGRAMS[name]
            files = {f"SKILL_{skill}": lora_path(self.out, skill, 256) for skill in "ab"}
            files |= DATA | {"BASE": base_path(self.out, "full_sft", 256)}
            given = [str(files.get(argument, argument)) for argument in arguments]
            found = json.loads(self._python("-c", program, *given).splitlines()[-1])
        self.seconds[name].append(found)

    def _python(self, *arguments: str) -> str:
        settings = os.environ | {"PYTHONPATH": str(self.checkout), "PYTHONUTF8": "1"}
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", env=settings, cwd=self.checkout
        )
        if done.returncode:
            raise UserError(f"{self.checkout}: {arguments[0]} failed: {done.stderr[-500:]}")
        return done.stdout


def words(command: str) -> list[str]:
    """A command's words, the names of data replaced by their paths."""
    return [str(DATA.get(word, word)) for word in command.split()]


def seconds_in(metrics: Path) -> float:
    """Seconds from the first step to the last, which leaves out whatever the first one warms up."""
    records = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    seconds = [record["seconds"] for record in records if "seconds" in record]
    return seconds[-1] - seconds[0]


def ratios(this: dict[str, list], other: dict[str, list]) -> dict[str, float]:
    """For each figure the median of the rounds' quotients."""
    return {
        name: statistics.median(b / a for a, b in zip(this[name], other[name], strict=True))
        for name in this
    }


if __name__ == "__main__":
    run(main)
