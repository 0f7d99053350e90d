"""The quick start's exam: the same held-out questions to the base and to every skill, side by
side.
"""

import dataclasses
import json
import shutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch

from core.paths import TOKENIZER_DIR, bundled_data
from dataset.tokenizer import load_tokenizer
from model.generation import Sampling
from model.weights import load_base
from serving.session import ChatSession

MAX_NEW_TOKENS = 48
SHOWN = 4  # questions a skill, in the table


@dataclasses.dataclass
class Probe:
    """A held-out question of a skill, the strings of which any one makes an answer right, and
    everyone's answers.
    """

    skill: str
    question: str
    expect: list[str]
    answers: dict[str, str] = dataclasses.field(default_factory=dict)

    def is_hit(self, who: str) -> bool:
        return any(text.casefold() in self.answers[who].casefold() for text in self.expect)


def read_probes(skill: str, path: Path) -> list[Probe]:
    """One probe a line: ``{"question": ..., "expect": [...]}``."""
    rows = [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    return [Probe(skill, row["question"], row["expect"]) for row in rows]


def ask_all(base: Path, skills: Sequence[str], out_dir: Path) -> list[Probe]:
    """Put every skill's probes to the base and, swapping live, to the skills in ``out_dir``.

    It is the chat of ``eval_model.py`` with ``--seed 0`` for each question. Taking the likeliest
    token instead would pass a skill whose right word is the likeliest of many unlikely ones.
    """
    model, _ = load_base(base, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS)
    session = ChatSession(
        model,
        load_tokenizer(TOKENIZER_DIR),
        sampling,
        seed=0,
        history_cnt=0,
        continues=False,
        out_dir=out_dir,
    )
    probes = [
        probe
        for skill in skills
        for probe in read_probes(skill, bundled_data(f"probes_{skill}.jsonl"))
    ]
    for who in ("base", *skills):
        print(f"asking {who}: {len(probes)} questions", flush=True)
        session.use_skill(who if who in skills else None)
        for probe in probes:
            session.rng.manual_seed(0)
            probe.answers[who] = "".join(session.reply(probe.question)).strip()
    return probes


def report(probes: Sequence[Probe], wanted: float, allowed: float) -> bool:
    """Print a few answers side by side and all hit rates; True when every skill and the base pass.

    A skill passes with a share of at least ``wanted`` of its own probes, the base with at most
    ``allowed`` of them.
    """
    skills = list(dict.fromkeys(probe.skill for probe in probes))
    everyone = ["base", *skills]
    width = min(shutil.get_terminal_size((120, 24)).columns, 140) // len(everyone) - 3
    lines = [_row(everyone, width), _row(["-" * width] * len(everyone), width)]
    for skill in skills:
        own = [probe for probe in probes if probe.skill == skill]
        for probe in own[:: max(1, len(own) // SHOWN)][:SHOWN]:
            lines += [
                "",
                f"> {probe.question}",
                _row([probe.answers[who] for who in everyone], width),
            ]
    print("\n" + "\n".join(lines))

    print("\nHeld-out questions answered right")
    passed = True
    for skill in skills:
        own = [probe for probe in probes if probe.skill == skill]
        hits = {who: sum(probe.is_hit(who) for probe in own) for who in everyone}
        print(f"  {skill:<10} " + "  ".join(f"{who} {hits[who]}/{len(own)}" for who in everyone))
        if hits[skill] < wanted * len(own) or hits["base"] > allowed * len(own):
            passed = False
            print(
                f"    NOT good enough: {skill} should have at least {wanted:.0%}, the base at most {allowed:.0%}"
            )
            for probe in own:
                if not probe.is_hit(skill):
                    print(f"    missed: {probe.question} -> {probe.answers[skill]!r}")
    return passed


def _row(cells: Sequence[str], width: int) -> str:
    """Cells side by side, each wrapped to ``width`` columns of the terminal."""
    wrapped = [_wrap(cell, width) for cell in cells]
    height = max(map(len, wrapped))
    lines = []
    for number in range(height):
        parts = [cell[number] if number < len(cell) else "" for cell in wrapped]
        lines.append(" | ".join(part + " " * (width - columns(part)) for part in parts).rstrip())
    return "\n".join(lines)


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` columns, cut at spaces where there are any; Chinese has none and
    is cut anywhere.
    """
    lines = [""]
    for word in text.replace("\n", " ").split(" "):
        if lines[-1] and columns(lines[-1]) + 1 + columns(word) <= width:
            lines[-1] += " " + word
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if columns(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


def columns(text: str) -> int:
    """Columns a text takes on a terminal: Chinese characters are two wide."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
