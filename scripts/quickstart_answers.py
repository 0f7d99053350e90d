"""The quick start's exam: the same held-out questions to the base and to every skill."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from core.paths import TOKENIZER_DIR, bundled_data
from dataset.tokenizer import load_tokenizer
from model.generation import Sampling
from model.weights import load_base
from serving.session import ChatSession

SHOWN = 4  # questions of each skill whose answers are printed


@dataclass
class Probe:
    """A held-out question of a skill and everyone's answers; any of ``expect`` makes one right."""

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


def ask_all(base: Path, skills: Sequence[str], out_dir: Path, longest: int = 48) -> list[Probe]:
    """Put every skill's probes to the base and, swapping live, to the skills in ``out_dir``.

    It is the chat of ``eval_model.py`` with ``--seed 0`` for each question: taking the likeliest
    token would pass a skill whose right word is the likeliest of many unlikely ones.
    """
    model, _ = load_base(base, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer, sampling = load_tokenizer(TOKENIZER_DIR), Sampling(max_new_tokens=longest)
    settings = {"seed": 0, "history_cnt": 0, "continues": False, "out_dir": out_dir}
    session = ChatSession(model, tokenizer, sampling, **settings)
    probes = [probe for skill in skills for probe in read_probes(skill)]
    for who in ("base", *skills):
        print(f"asking {who}: {len(probes)} questions")
        session.use_skill(who if who in skills else None)
        for probe in probes:
            session.rng.manual_seed(0)
            probe.answers[who] = "".join(session.reply(probe.question)).strip()
    return probes


def report(probes: Sequence[Probe], wanted: float, allowed: float) -> bool:
    """Print some answers and all hit rates; return whether the skills and the base pass.

    A skill needs a share of at least ``wanted`` of its own probes, the base at most ``allowed``.
    """
    by_skill: dict[str, list[Probe]] = {}
    for probe in probes:
        by_skill.setdefault(probe.skill, []).append(probe)
    everyone = ["base", *by_skill]
    for own in by_skill.values():
        for probe in own[:: max(1, len(own) // SHOWN)][:SHOWN]:
            print(f"\n> {probe.question}")
            for who in everyone:
                print(f"  {who + ':':<10} {' '.join(probe.answers[who].split())}")

    print("\nHeld-out questions answered right")
    passed = True
    for skill, own in by_skill.items():
        hits = {who: sum(probe.is_hit(who) for probe in own) for who in everyone}
        print(f"  {skill:<10} " + "  ".join(f"{who} {hits[who]}/{len(own)}" for who in everyone))
        if hits[skill] < wanted * len(own) or hits["base"] > allowed * len(own):
            passed = False
            needs = f"the skill needs {wanted:.0%}, the base at most {allowed:.0%}"
            print(f"    NOT good enough: {needs}")
            for probe in own:
                if not probe.is_hit(skill):
                    print(f"    missed: {probe.question} -> {probe.answers[skill]!r}")
    return passed
