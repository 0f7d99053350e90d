"""Processes that are measured in turns."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from benchmarks.training.measure import ratios, spread
from core.paths import TOKENIZER_DIR

HERE = Path(__file__).resolve().parent
# The flags of MiniMind's scripts where they matter to speed and loss; 512 is its --max_seq_len as
# well.
SHIPPED = {
    "text": {
        "batch_size": 32,
        "accumulation_steps": 8,
        "num_workers": 1,
        "learning_rate": 5e-4,
        "epochs": 1,
    },
    "chat": {
        "batch_size": 16,
        "accumulation_steps": 1,
        "num_workers": 1,
        "learning_rate": 5e-5,
        "epochs": 50,
    },
}
STEELMAN = {"batch_size": 8, "accumulation_steps": 1, "num_workers": 0}


class Side:
    """A running child. It ends when its input does, which is when this object is closed."""

    def __init__(self, name: str, command: list[object], job: dict, folder: Path):
        self.name = name
        self.log = folder / f"{name}.log"
        job_file = folder / f"{name}.json"
        (own := folder / name).mkdir()
        job_file.write_text(json.dumps(job | {"folder": str(own)}), encoding="utf-8")
        words = [sys.executable, *map(str, command), str(job_file)]
        environment = os.environ | {"PYTHONUTF8": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self.log.open("wb") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            self.process = subprocess.Popen(words, **pipes, env=environment, encoding="utf-8")

    def ask(self, do: str, **order: object) -> dict:
        """Give an order and wait until it is carried out."""
        try:
            self.process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            tail = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(
                f"{self.name} ended with exit code {self.process.wait()}; its last words:\n{tail}"
            )
        return json.loads(line)

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.stdout.close()


class Sides:
    """Makes the sides of one measurement, which share rows, initial weights, model and
    tokenizer.
    """

    def __init__(self, options, rows: str, weights: Path, config: dict, folder: Path):
        self.options, self.folder, self.rows = options, folder, rows
        self.job = {
            "rows": rows,
            "weights": str(weights),
            "config": config,
            "tokenizer": str(TOKENIZER_DIR),
        }

    def ours(self, name: str, door: str, data: Path, epochs: int, **flags: object) -> Side:
        flags = {"max_seq_len": self.options.max_seq_len} | flags
        job = {"door": door, "flags": flags, "data": str(data), "epochs": epochs}
        return Side(name, ["-X", "utf8", HERE / "ours_child.py"], self.job | job, self.folder)

    def minimind(self, name: str, data: Path, rank: int, **flags: object) -> Side:
        checkout = self.options.minimind.resolve()
        job = SHIPPED[self.rows] | {
            "rank": rank,
            "max_seq_len": self.options.max_seq_len,
            "data": str(data),
        }
        job |= {"planned_seconds": 0} | flags
        command = ["-I", "-X", "utf8", HERE / "minimind_child.py", checkout]
        return Side(name, command, self.job | job, self.folder)

    def peft(self, name: str, data: Path, epochs: int, **flags: object) -> Side:
        job = {"data": str(data), "epochs": epochs, "max_seq_len": self.options.max_seq_len} | flags
        return Side(name, ["-X", "utf8", HERE / "peft_child.py"], self.job | job, self.folder)


def take_turns(sides: list[Side], data: list[Path], sgemm: bool = True) -> dict[str, list[dict]]:
    """One round a file of ``data``: every side trains on its rows. Every other round goes in the
    opposite order.
    """
    answers = {side.name: [] for side in sides}
    for number, path in enumerate(data):
        for side in sides if number % 2 == 0 else sides[::-1]:
            answer = side.ask("round", data=str(path), sgemm=sgemm)
            answers[side.name].append(answer)
            print(
                f"round {number + 1}/{len(data)} {side.name}: {answer['seconds']:.1f} s", flush=True
            )
    return answers


def all_of(*sides: Side) -> ExitStack:
    """A context that closes every side."""
    stack = ExitStack()
    for side in sides:
        stack.enter_context(side)
    return stack


def compare(answers: dict[str, list[dict]], tokens: list[int], ours: str = "ours") -> dict:
    """Figures of each side and our speed over each other side's; ``tokens``: useful ones of each
    round's rows.

    Raises ``RuntimeError`` when the sides learned from different numbers of targets: then no figure
    means anything.
    """
    sides = {}
    for name, rounds in answers.items():
        per_second = [n / answer["seconds"] for n, answer in zip(tokens, rounds, strict=True)]
        sides[name] = {
            "useful_tokens_per_second": spread(per_second, 1),
            "seconds_per_round": spread(answer["seconds"] for answer in rounds),
            "optimizer_steps": sum(answer["steps"] for answer in rounds),
            "supervised_targets": sum(answer["targets"] for answer in rounds),
            "beyond_end_of_turn": sum(answer.get("beyond_end_of_turn", 0) for answer in rounds),
            "positions_computed": sum(answer["slots"] for answer in rounds),
            "sgemm_gflops": round(max(answer["sgemm"] for answer in rounds), 1),
            "peak_mib": round(rounds[-1]["peak_mib"] - rounds[-1]["bare_mib"], 1),
        }
    wanted = sides[ours]["supervised_targets"]
    for name, side in sides.items():
        if abs(side["supervised_targets"] - wanted) > 0.01 * wanted:
            raise RuntimeError(
                f"{name} learned from {side['supervised_targets']} targets, {ours} from {wanted}"
            )
    times = {name: [answer["seconds"] for answer in rounds] for name, rounds in answers.items()}
    return {
        "rounds": len(tokens),
        "useful_tokens": sum(tokens),
        "sides": sides,
        "speed_over": {name: ratios(times[name], times[ours]) for name in sides if name != ours},
    }
