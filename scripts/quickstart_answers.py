"""The quick start's exam: the same held-out questions to the base and to every skill, side by
side.
"""

import json
import shutil
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import torch

from core.paths import TOKENIZER_DIR, bundled_data
from dataset.tokenizer import load_tokenizer
from model.generation import Sampling
from model.weights import load_base
from serving.session import ChatSession

SHOWN = 4  # questions a skill, in the table


@dataclass
class Probe:
    """A held-out question of a skill, the strings of which any one makes an answer right, and
    everyone's answers.
    """

    skill: str
    question: str
    expect: list[str]
    answers: dict[str, str] = field(default_factory=dict)

    def is_hit(self, who: str) -> bool:
        return any(text.casefold() in self.answers[who].casefold() for text in self.expect)


def read_probes(skill: str) -> list[Probe]:
    """The bundled probes of a skill, one a line: ``{"question": ..., "expect": [...]}``."""
    lines = bundled_data(f"probes_{skill}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    return [Probe(skill, row["question"], row["expect"]) for row in rows]


def ask_all(
    base: Path, skills: Sequence[str], out_dir: Path, max_new_tokens: int = 48
) -> list[Probe]:
    """Put every skill's probes to the base and, swapping live, to the skills in ``out_dir``.

    It is the chat of ``eval_model.py`` with ``--seed 0`` for each question. Taking the likeliest
    token instead would pass a skill whose right word is the likeliest of many unlikely ones.
    """
    model, _ = load_base(base, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    session = ChatSession(
        model,
        load_tokenizer(TOKENIZER_DIR),
        Sampling(max_new_tokens=max_new_tokens),
        seed=0,
        history_cnt=0,
        continues=False,
        out_dir=out_dir,
    )
    probes = [probe for skill in skills for probe in read_probes(skill)]
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
    by_skill: dict[str, list[Probe]] = {}
    for probe in probes:
        by_skill.setdefault(probe.skill, []).append(probe)
    everyone = ["base", *by_skill]
    width = min(shutil.get_terminal_size((120, 24)).columns, 140) // len(everyone) - 3
    print("\n" + _row(everyone, width) + "\n" + _row(["-" * width] * len(everyone), width))
    for own in by_skill.values():
        for probe in own[:: max(1, len(own) // SHOWN)][:SHOWN]:
            answers = [probe.answers[who] for who in everyone]
            print(f"\n> {probe.question}\n{_row(answers, width)}")

    print("\nHeld-out questions answered right")
    passed = True
    for skill, own in by_skill.items():
        hits = {who: sum(probe.is_hit(who) for probe in own) for who in everyone}
        print(f"  {skill:<10} " + "  ".join(f"{who} {hits[who]}/{len(own)}" for who in everyone))
        if hits[skill] < wanted * len(own) or hits["base"] > allowed * len(own):
            passed = False
            print(
                f"    NOT good enough: the skill needs {wanted:.0%}, the base at most {allowed:.0%}"
            )
            for probe in own:
                if not probe.is_hit(skill):
                    print(f"    missed: {probe.question} -> {probe.answers[skill]!r}")
    return passed


def _row(cells: Sequence[str], width: int) -> str:
    """Cells side by side, each wrapped to ``width`` columns of the terminal."""
    wrapped = [_wrap(cell, width) for cell in cells]
    lines = []
    for parts in zip_longest(*wrapped, fillvalue=""):
        lines.append(" | ".join(part + " " * (width - columns(part)) for part in parts).rstrip())
    return "\n".join(lines)


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` columns, cut at spaces where there are any; Chinese has none and
    is cut anywhere.
    """
    lines = [""]
    for word in text.split():
        if lines[-1] and columns(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
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
