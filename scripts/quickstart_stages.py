"""The stages of the quick start: front doors run as a user would run them.

A stage's stamp in out/quickstart/stages/ holds a hash of what went in and of what came out, and is
written last; a stage whose stamp still holds is not run again. What it printed lies beside it.
"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.environment import run as run_command
from core.errors import UserError, run
from core.files import atomic_write, read_object, sha256_file
from core.paths import REPOSITORY, TOKENIZER_DIR, base_path, bundled_data, lora_path
from scripts.exam import SHARED
from scripts.progress import Progress

OUT = Path("out") / "quickstart"
SKILLS = ("identity", "medical", "verse")
ROOMS = ("core", "dataset", "model", "trainer")  # their code decides what a stage makes
EXAM_ROOMS = ("serving", "scripts")

# Small enough for ten minutes on two CPU cores: a larger model learns less in them. Every other
# option is the door's own default.
DIM = 192
COMMON = {"out_dir": OUT, "max_seq_len": 256}
# A vocabulary of its own: of the shipped tokenizer's, half the entries would never be trained.
TOKENIZER = {"tokenizer_path": OUT / "tokenizer", "vocab_size": 3200}
PRETRAIN = COMMON | {"dim": DIM, "n_layers": 4, "epochs": 3, "batch_size": 8, "learning_rate": 3e-3}
PRETRAIN |= {"tokenizer_path": TOKENIZER["tokenizer_path"], "val_interval": 120}
FULL_SFT = COMMON | {"epochs": 3, "batch_size": 32, "learning_rate": 2e-3, "val_interval": 800}
LORA = COMMON | {"epochs": 100, "batch_size": 8, "max_steps": 500, "val_interval": 100}
LORA |= {"learning_rate": 1.5e-3, "loraplus_lr_ratio": 8, "target_modules": "all-linear"}
LORA["keep"] = 5
# Poems are long, and only whole lines count: more rows a step, held less, in as much time.
VERSE = {"batch_size": 12, "max_steps": 400, "keep": 3}
LAST_LINES = 12  # of what a failed stage printed
MOST = 20  # questions of a column in the exam at the end
# The least shares that the base must answer right: less than it does, for few questions scatter.
BASE_MARKS = {"general": 0.8, "general far": 0.45, "mixed": 0.5, "sums": 0.65}
BASE_MARKS |= {"two turns": 0.7, "unknown": 0.65}
FIRST_QUESTIONS = ("What sound does a cow make?", "法国的首都是哪里？")
# Seconds that each stage takes on two CPU cores.
SECONDS = {"tokenizer": 5, "pretrain": 82, "full_sft": 292, "exam": 31}
SKILL_SECONDS = 55


@dataclass(frozen=True)
class Stage:
    """One run of a front door. What it ``reads``, its flags and the code decide what it makes."""

    name: str
    door: Path
    flags: dict[str, Any]
    reads: tuple[Path, ...]
    outputs: tuple[Path, ...]
    rooms: tuple[str, ...] = ROOMS

    @property
    def seconds(self) -> float:
        """What it takes on two CPU cores."""
        return SECONDS.get(self.name, SKILL_SECONDS)


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """``{"dim": 256, "keep_best": False}`` as ``["--dim", "256", "--no-keep_best"]``."""
    words = []
    for name, value in flags.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--no-{name}"] if value is False else [f"--{name}", *map(str, values)]
    return words


def plan() -> list[Stage]:
    """All stages in order. Each skill starts from the fine-tuned base."""
    texts, chats = bundled_data("pretrain_mini.jsonl"), bundled_data("sft_mini")
    strange = bundled_data("strange_mini.jsonl")
    made = (PRETRAIN["tokenizer_path"] / "tokenizer.json",)
    door = REPOSITORY / "scripts" / "train_tokenizer.py"
    flags = {"data_path": (texts, chats), **TOKENIZER}
    stages = [Stage("tokenizer", door, flags, (texts, chats), made)]
    pretrain, full_sft = (base_path(OUT, name, DIM) for name in ("pretrain", "full_sft"))
    flags = {"data_path": texts, **PRETRAIN}
    pair = (pretrain, pretrain.with_suffix(".json"))
    stages += [Stage("pretrain", REPOSITORY / "train_pretrain.py", flags, (texts, *made), pair)]
    flags = {"data_path": chats, "base": pretrain, **FULL_SFT}
    pair = (full_sft, full_sft.with_suffix(".json"))
    stages += [Stage("full_sft", REPOSITORY / "train_full_sft.py", flags, (chats, pretrain), pair)]
    rows = {name: bundled_data(f"lora_{name}.jsonl") for name in SKILLS}
    for name, data in rows.items():
        # The others' questions are to be answered as by the base.
        others = tuple(path for path in rows.values() if path != data)
        flags = {"data_path": data, "base": full_sft, "lora_name": name, "keep_questions": others}
        read, made = (*rows.values(), chats, strange, full_sft), (lora_path(OUT, name, DIM),)
        settings = LORA | (VERSE if name == "verse" else {})
        stages += [Stage(name, REPOSITORY / "train_lora.py", flags | settings, read, made)]
    probes = tuple(bundled_data(f"probes_{name}.jsonl") for name in (*SHARED, *SKILLS))
    flags = {"out_dir": OUT, "base": full_sft, "most": MOST}
    flags["skills"] = (*SKILLS, " ".join(SKILLS[:2]))
    read = (*probes, *rows.values(), full_sft, *(lora_path(OUT, name, DIM) for name in SKILLS))
    read += (REPOSITORY / "eval_model.py",)
    made = tuple(OUT / "report" / f"report.{kind}" for kind in ("md", "json", "png"))
    door = REPOSITORY / "scripts" / "report.py"
    return [*stages, Stage("exam", door, flags, read, made, ROOMS + EXAM_ROOMS)]


def is_done(stage: Stage) -> bool:
    """Whether the stage's stamp says that it has made what it would make now."""
    done = read_object(_stamp(stage))
    return (done.get("inputs"), done.get("outputs")) == (_inputs(stage), _digest(stage.outputs))


def run_stage(stage: Stage, hear: Callable[[str], None]) -> None:
    """Run the stage's door, whose lines ``hear`` gets; exits where the door fails.

    A training door that was stopped at the very same work goes on with it.
    """
    inputs, lines = _inputs(stage), []
    words = flag_words(stage.flags)
    if stage.door.parent == REPOSITORY and read_object(_stamp(stage)).get("inputs") == inputs:
        words.append("--resume")
    else:
        for path in stage.outputs:
            path.unlink(missing_ok=True)
    _write_stamp(stage, {"inputs": inputs})

    def heard(line: str) -> None:
        lines.append(line)
        hear(line)

    code = run_command([sys.executable, str(stage.door), *words], hear=heard)
    if code:
        said = "stopped"
        if code != 130:
            print("\n" + "".join(lines[-LAST_LINES:]), file=sys.stderr)
            said = f"stage {stage.name} ended with exit code {code}; above are its last lines"
        print(f"\nquick start: {said}; the same command goes on from here", file=sys.stderr)
        sys.exit(code)
    log = _stamp(stage).with_suffix(".txt")
    atomic_write(log, lambda file: file.write("".join(lines).encode()))
    _write_stamp(stage, {"inputs": inputs, "outputs": _digest(stage.outputs)})


def _write_stamp(stage: Stage, content: dict) -> None:
    text = json.dumps(content, indent=1)
    atomic_write(_stamp(stage), lambda file: file.write(text.encode()))


def _stamp(stage: Stage) -> Path:
    return OUT / "stages" / f"{stage.name}.json"


def _inputs(stage: Stage) -> str:
    """What decides what the stage makes, as one hash."""
    code = [path for room in stage.rooms for path in sorted((REPOSITORY / room).rglob("*.py"))]
    tokenizer = sorted(path for path in TOKENIZER_DIR.glob("*") if path.is_file())
    parts = (sorted(path.glob("[!.]*")) if path.is_dir() else [path] for path in stage.reads)
    read = [path for part in parts for path in part]
    return _digest([stage.door, *read, *code, *tokenizer], flag_words(stage.flags))


def _digest(files: Sequence[Path], words: Iterable[str] = ()) -> str:
    """One SHA-256 of the words, the files' names and their contents; a missing file has none."""
    hashes = [sha256_file(path) if path.is_file() else "missing" for path in files]
    names = [path.name for path in files]
    return hashlib.sha256(json.dumps([*words, names, hashes]).encode()).hexdigest()


def first_words(base: Path) -> None:
    """Print what the base answers to its first questions; says nothing where it cannot."""
    flags = flag_words({"base": base, "out_dir": OUT, "seed": 0})
    for question in FIRST_QUESTIONS:
        command = [sys.executable, REPOSITORY / "eval_model.py", *flags, "--prompt", question]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode == 0:
            print(f"  > {question}\n    {done.stdout.strip()}", flush=True)


def how_to_go_on() -> str:
    """Full commands for chatting with the skills and for training one's own."""
    # Its chats were short: after many turns, this small model loses the thread.
    alone = {"out_dir": OUT, "history_cnt": 0}
    chat = _command("eval_model.py", lora_name=SKILLS[0], **alone)
    example = bundled_data("my_skill_example.jsonl")
    train = _command("train_lora.py", lora_name="mine", data_path=example, **LORA)
    ask = _command("eval_model.py", lora_name="mine", **alone)
    return f"""
Chat with a skill (/lora NAME swaps it, /lora off returns to the base, /help shows the rest):
  {chat}

Teach it your own skill. The example's 30 chats are about a made-up shop; write a file like it:
  {train}
  {ask}"""


def _command(door: str, **flags: Any) -> str:
    """The command line of a door, for the shell of the user, who is in the current folder."""
    words = [str(REPOSITORY / door), *flag_words(flags)]
    words = [word.removeprefix(f"{Path.cwd()}{os.sep}") for word in (sys.executable, *words)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def main() -> None:
    """Train what is not trained yet, ask, show, and exit 1 when a mark was missed."""
    stages = plan()
    read = dict.fromkeys(path for stage in stages for path in stage.reads)
    missing = [str(path) for path in read if path.is_absolute() and not path.exists()]
    if missing:
        raise UserError(f"{', '.join(missing)} is missing: get a whole copy of the repository")
    progress = Progress({stage.name: stage.seconds for stage in stages})
    for stage in stages:
        if is_done(stage):
            progress.skip(stage.name)
            continue
        progress.begin(stage.name)
        try:
            run_stage(stage, progress.hear)
        finally:
            progress.clear()
        progress.end()
        if stage.name == "full_sft":
            first_words(stage.outputs[0])
    report, data, picture = stages[-1].outputs
    print("\n" + report.read_text(encoding="utf-8"))
    print(f"The same as a picture: {picture}, with every answer: {data}\n{how_to_go_on()}")
    if reason := failure(read_object(data)):
        print(f"quick start: {reason}", file=sys.stderr)
        sys.exit(1)


def failure(exam: Mapping[str, Any]) -> str:
    """Why the quick start has failed by its exam, as report.json has it; empty if it has not."""
    base, *skills = exam["rows"]
    shares = dict(zip((each["name"] for each in exam["columns"]), base["shares"], strict=True))
    missed = [name for name, mark in BASE_MARKS.items() if shares[name] < mark]
    if missed:
        return f"the base answers too little of {', '.join(missed)}"
    if any(row["failures"] for row in skills if row["who"] in SKILLS):
        told = "a skill missed its marks, as the verdicts below the table say"
        return f"{told}; base and skills can be used all the same"
    return ""


if __name__ == "__main__":
    run(main)
