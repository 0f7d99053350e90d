"""The stages of the quick start: what ``quickstart.py`` runs inside the environment.

Each training stage is a front door run as a user would run it. Its stamp in out/quickstart/stages/
names everything that went in and what came out, and is written last; a stage whose stamp still
holds is not run again.
"""

import dataclasses
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.environment import run as run_command
from core.errors import UserError, run
from core.files import atomic_write, sha256_file
from core.paths import REPOSITORY, TOKENIZER_DIR, base_path, bundled_data, lora_path

OUT = Path("out") / "quickstart"
SKILLS = ("identity", "medical")
WANTED_SKILL_SHARE, ALLOWED_BASE_SHARE = 0.8, 0.2  # of a skill's held-out questions
ROOMS = ("core", "dataset", "model", "trainer")  # their code decides what a stage makes

# Small enough for ten minutes on two CPU cores. Every other option is the door's own default.
# Fine-tuning is gentle: at four times the rate the base forgets the words that its chats lack and
# its skills need.
DIM = 256
PRETRAIN = {
    "dim": DIM,
    "n_layers": 6,
    "max_seq_len": 256,
    "epochs": 4,
    "batch_size": 8,
    "learning_rate": 3e-3,
}
FULL_SFT = {"max_seq_len": 256, "epochs": 8, "batch_size": 16, "learning_rate": 5e-4}
LORA = {"max_seq_len": 256, "epochs": 30, "batch_size": 8, "learning_rate": 3e-3}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One run of a front door on bundled data, which continues from what the stage ``before`` it
    made.

    ``outputs`` are the files that later stages and the user need from it; options are the door's
    flags.
    """

    name: str
    door: Path
    data: Path
    outputs: tuple[Path, ...]
    options: dict[str, Any]
    before: "Stage | None" = None

    def command(self) -> list[str]:
        flags = {"data_path": self.data, **self.options}
        if self.before:
            flags["base"] = self.before.outputs[0]
        return [
            sys.executable,
            str(self.door),
            *(str(word) for key in flags for word in (f"--{key}", flags[key])),
        ]


def plan(out_dir: Path = OUT) -> list[Stage]:
    """The training stages in their order. Both skills start from the fine-tuned base, neither from
    the other.
    """

    def stage(
        name: str,
        door: str,
        data: str,
        outputs: list[Path],
        options: dict[str, Any],
        before: Stage | None,
    ):
        options = {"out_dir": out_dir, **options}
        return Stage(name, REPOSITORY / door, bundled_data(data), tuple(outputs), options, before)

    def base(name: str) -> list[Path]:
        path = base_path(out_dir, name, DIM)
        return [path, path.with_suffix(".json")]

    pretrain = stage(
        "pretrain", "train_pretrain.py", "pretrain_mini.jsonl", base("pretrain"), PRETRAIN, None
    )
    full_sft = stage(
        "full_sft", "train_full_sft.py", "sft_mini.jsonl", base("full_sft"), FULL_SFT, pretrain
    )
    skills = [
        stage(
            skill,
            "train_lora.py",
            f"lora_{skill}.jsonl",
            [lora_path(out_dir, skill, DIM)],
            {"lora_name": skill, **LORA},
            full_sft,
        )
        for skill in SKILLS
    ]
    return [pretrain, full_sft, *skills]


def run_stage(stage: Stage, stamps: Path) -> tuple[float, bool]:
    """Run the stage unless its stamp in folder ``stamps`` holds; return (seconds it took, was it
    reused).

    Ends the process with the door's exit code when the door fails.
    """
    inputs = _inputs(stage, stamps)
    stamp = _stamp(stamps, stage)
    done = _read_json(stamp)
    if done and done["inputs"] == inputs and done["outputs"] == _outputs(stage):
        return done["seconds"], True
    stamp.unlink(missing_ok=True)
    started = time.monotonic()
    code = run_command(stage.command())
    if code:
        if code != 130:
            reason = f"stage {stage.name} ended with exit code {code}; its message is above"
            print(
                f"quick start stopped: {reason}. Run the same command again to go on from here.",
                file=sys.stderr,
            )
        sys.exit(code)
    seconds = time.monotonic() - started
    content = json.dumps(
        {"inputs": inputs, "outputs": _outputs(stage), "seconds": seconds}, indent=1
    )
    atomic_write(stamp, lambda file: file.write(content.encode()))
    return seconds, False


def _stamp(folder: Path, stage: Stage) -> Path:
    return folder / f"{stage.name}.json"


def _inputs(stage: Stage, stamps: Path) -> dict[str, str]:
    code = [stage.door]
    code += [path for room in ROOMS for path in sorted((REPOSITORY / room).rglob("*.py"))]
    tokenizer = sorted(path for path in TOKENIZER_DIR.glob("*") if path.is_file())
    before = _read_json(_stamp(stamps, stage.before)) if stage.before else None
    return {
        "data": sha256_file(stage.data),
        "options": " ".join(stage.command()[2:]),
        "code": _sha256_of([*code, *tokenizer]),
        # What it was made from and what came out, but not how long it took.
        "before": json.dumps([before["inputs"], before["outputs"]]) if before else "",
    }


def _outputs(stage: Stage) -> dict[str, str] | None:
    """File name -> SHA-256; None while one is missing."""
    if not all(path.is_file() for path in stage.outputs):
        return None
    return {path.name: sha256_file(path) for path in stage.outputs}


def _sha256_of(paths: Sequence[Path]) -> str:
    digests = "".join(f"{path.name} {sha256_file(path)}\n" for path in paths)
    return hashlib.sha256(digests.encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def how_to_go_on() -> str:
    """Full commands for chatting with the skills and for training one's own."""
    # Its chats were short: with earlier turns in front, this small model loses the thread.
    alone = {"out_dir": OUT, "history_cnt": 0}
    skills = "".join(f"  {_show('eval_model.py', lora_name=skill, **alone)}\n" for skill in SKILLS)
    example = {
        "conversations": [
            {"role": "user", "content": "..."},
            {"role": "assistant", "content": "..."},
        ]
    }
    return f"""
Chat with a skill (inside, /lora NAME swaps it, /lora off returns to the base, /help shows the rest):
{skills}
Teach it your own skill: write my.jsonl with one chat a line, each like
  {json.dumps(example)}
then train and chat:
  {_show("train_lora.py", lora_name="mine", data_path="my.jsonl", out_dir=OUT, **LORA)}
  {_show("eval_model.py", lora_name="mine", **alone)}"""


def _show(door: str, **flags: Any) -> str:
    words = [_from_here(Path(sys.executable)), _from_here(REPOSITORY / door)]
    words += [str(word) for key in flags for word in (f"--{key}", flags[key])]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _from_here(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def main() -> None:
    """Train what is not trained yet, ask, show, and exit 1 when a skill did not take."""
    started = time.monotonic()
    stages = plan()
    missing = [str(stage.data) for stage in stages if not stage.data.is_file()]
    if missing:
        raise UserError(
            f"bundled data is missing ({', '.join(missing)}): get a whole copy of the repository"
        )
    times = []
    for number, stage in enumerate(stages, 1):
        print(f"\n== Stage {number} of {len(stages) + 1}: {stage.name}", flush=True)
        seconds, reused = run_stage(stage, OUT / "stages")
        times.append((stage.name, seconds, "reused, it took then" if reused else "trained"))
        if reused:
            print(f"finished before: {', '.join(map(str, stage.outputs))}")

    print(
        f"\n== Stage {len(stages) + 1} of {len(stages) + 1}: the same questions to the base and both skills",
        flush=True,
    )
    from scripts.quickstart_answers import (
        ask_all,
        report,
    )  # torch takes seconds to import: only now

    asked = time.monotonic()
    answers = ask_all(base_path(OUT, "full_sft", DIM), SKILLS, OUT)
    times.append(("questions", time.monotonic() - asked, "asked"))
    passed = report(answers, WANTED_SKILL_SHARE, ALLOWED_BASE_SHARE)

    print("\nTime")
    for name, seconds, what in times:
        print(f"  {name:<10} {seconds:7.1f} s  {what}")
    print(f"  {'this run':<10} {time.monotonic() - started:7.1f} s")
    print(how_to_go_on())
    if not passed:
        print(
            "quick start: not every skill reached its mark; the missed questions are listed above",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    run(main)
