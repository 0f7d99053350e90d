"""The stages of the quick start: front doors run as a user would run them.

A stage's stamp in out/quickstart/stages/ holds a hash of what went in and of what came out, and is
written last; a stage whose stamp still holds is not run again.
"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.environment import run as run_command
from core.errors import UserError, run
from core.files import atomic_write, read_object, sha256_file
from core.paths import REPOSITORY, TOKENIZER_DIR, base_path, bundled_data, lora_path

OUT = Path("out") / "quickstart"
SKILLS = ("identity", "medical")
ROOMS = ("core", "dataset", "model", "trainer")  # their code decides what a stage makes

# Small enough for ten minutes on two CPU cores. Every other option is the door's own default.
# Fine-tuning is gentle: at four times the rate the base forgets the words that its chats lack and
# its skills need.
DIM = 256
COMMON = {"out_dir": OUT, "max_seq_len": 256}
PRETRAIN = COMMON | {"dim": DIM, "n_layers": 6, "epochs": 4, "batch_size": 8, "learning_rate": 3e-3}
FULL_SFT = COMMON | {"epochs": 8, "batch_size": 16, "learning_rate": 5e-4}
# All Linears learn better than the square ones here: benchmarks/results/keeping.json.
LORA = COMMON | {"epochs": 21, "batch_size": 8, "learning_rate": 3e-3, "max_steps": 500}
LORA["target_modules"] = "all-linear"


@dataclass(frozen=True)
class Stage:
    """One run of a front door; ``options`` are its flags besides ``data_path`` and ``base``."""

    name: str
    door: Path
    data: Path
    options: dict[str, Any]
    outputs: tuple[Path, ...]
    base: Path | None = None

    def flags(self) -> list[str]:
        base = {"base": self.base} if self.base else {}
        return flag_words({"data_path": self.data, **self.options, **base})


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """``{"dim": 256}`` as ``["--dim", "256"]``."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def plan() -> list[Stage]:
    """The training stages in order. Both skills start from the fine-tuned base."""
    pretrain, full_sft = (base_path(OUT, name, DIM) for name in ("pretrain", "full_sft"))
    pair = (pretrain, pretrain.with_suffix(".json"))
    data = bundled_data("pretrain_mini.jsonl")
    stages = [Stage("pretrain", REPOSITORY / "train_pretrain.py", data, PRETRAIN, pair)]
    pair = (full_sft, full_sft.with_suffix(".json"))
    data = bundled_data("sft_mini.jsonl")
    stages += [Stage("full_sft", REPOSITORY / "train_full_sft.py", data, FULL_SFT, pair, pretrain)]
    rows = {name: bundled_data(f"lora_{name}.jsonl") for name in SKILLS}
    for name, data in rows.items():
        (other,) = set(rows.values()) - {data}  # its questions are to be answered as by the base
        options = LORA | {"lora_name": name, "keep_questions": other}
        outputs = (lora_path(OUT, name, DIM),)
        stages += [Stage(name, REPOSITORY / "train_lora.py", data, options, outputs, full_sft)]
    return stages


def run_stage(stage: Stage, stamps: Path) -> tuple[float, bool]:
    """The stage's seconds, and whether its stamp let it be reused; exits where its door fails."""
    stamp = stamps / f"{stage.name}.json"
    code = [path for room in ROOMS for path in sorted((REPOSITORY / room).rglob("*.py"))]
    tokenizer = sorted(path for path in TOKENIZER_DIR.glob("*") if path.is_file())
    named = [stage.options["keep_questions"]] if "keep_questions" in stage.options else []
    general = [bundled_data(name) for name in ("sft_mini.jsonl", "strange_mini.jsonl")]
    before = [stage.base, *general] if stage.base else []
    files = [stage.door, stage.data, *named, *before, *code, *tokenizer]
    inputs = _digest(files, stage.flags())
    done = read_object(stamp)
    if (done.get("inputs"), done.get("outputs")) == (inputs, _digest(stage.outputs)):
        return done["seconds"], True
    stamp.unlink(missing_ok=True)
    started = time.monotonic()
    exit_code = run_command([sys.executable, str(stage.door), *stage.flags()])
    if exit_code not in (0, 130):
        said = f"stage {stage.name} ended with exit code {exit_code}; its message is above"
        print(f"quick start: {said}, and the same command goes on from here", file=sys.stderr)
    if exit_code:
        sys.exit(exit_code)
    seconds = time.monotonic() - started
    done = {"inputs": inputs, "outputs": _digest(stage.outputs), "seconds": seconds}
    atomic_write(stamp, lambda file: file.write(json.dumps(done, indent=1).encode()))
    return seconds, False


def _digest(files: Iterable[Path], words: Iterable[str] = ()) -> str:
    """One SHA-256 of the words, the files' names and their contents; a missing file has none."""
    hashes = [sha256_file(path) if path.is_file() else "missing" for path in files]
    names = [path.name for path in files]
    return hashlib.sha256(json.dumps([*words, names, hashes]).encode()).hexdigest()


def how_to_go_on() -> str:
    """Full commands for chatting with the skills and for training one's own."""
    # Its chats were short: with earlier turns in front, this small model loses the thread.
    alone = {"out_dir": OUT, "history_cnt": 0}
    chats = [_command("eval_model.py", lora_name=skill, **alone) for skill in (*SKILLS, "mine")]
    train = _command("train_lora.py", lora_name="mine", data_path="my.jsonl", **LORA)
    turns = [{"role": role, "content": "..."} for role in ("user", "assistant")]
    return f"""
Chat with a skill (/lora NAME swaps it, /lora off returns to the base, /help shows the rest):
  {chats[0]}
  {chats[1]}

Teach it your own skill: write my.jsonl with one chat a line, each like
  {json.dumps({"conversations": turns})}
then train and chat:
  {train}
  {chats[2]}"""


def _command(door: str, **flags: Any) -> str:
    """The command line of a door, for the shell of the user, who is in the current folder."""
    here = Path.cwd()
    paths = [Path(sys.executable), REPOSITORY / door]
    paths = [path.relative_to(here) if path.is_relative_to(here) else path for path in paths]
    words = [*map(str, paths), *flag_words(flags)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def main() -> None:
    """Train what is not trained yet, ask, show, and exit 1 when a skill did not take."""
    started = time.monotonic()
    stages = plan()
    missing = [str(stage.data) for stage in stages if not stage.data.is_file()]
    if missing:
        raise UserError(f"{', '.join(missing)} is missing: get a whole copy of the repository")
    times = []
    for number, stage in enumerate(stages, 1):
        print(f"\n== Stage {number} of {len(stages) + 1}: {stage.name}")
        seconds, reused = run_stage(stage, OUT / "stages")
        times.append((stage.name, seconds, "reused, it took then" if reused else "trained"))
        if reused:
            print(f"finished before: {', '.join(map(str, stage.outputs))}")
    print(f"\n== Stage {len(stages) + 1} of {len(stages) + 1}: the same questions to everyone")
    from scripts import report  # torch takes seconds to import

    asked, base = time.monotonic(), base_path(OUT, "full_sft", DIM)
    everyone = ["--skills", *SKILLS, " ".join(SKILLS)]
    exam = report.main([*flag_words({"out_dir": OUT, "base": base}), *everyone])
    times.append(("questions", time.monotonic() - asked, "asked"))
    print(f"\n{exam.to_markdown()}\nTime")
    for name, seconds, what in (*times, ("this run", time.monotonic() - started, "")):
        print(f"  {name:<10} {seconds:7.1f} s  {what}".rstrip())
    print(how_to_go_on())
    if any(map(exam.failures, SKILLS)):
        reason = "not every skill reached its marks, which the table's verdicts name"
        print(f"quick start: {reason}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(main)
