"""Multiple-choice questions: rows of the usual styles, and the words in which each is asked.

    CMMLU    {"Question": "...", "A": "...", "B": "...", "C": "...", "D": "...", "Answer": "B"}
    MMLU     {"question": "...", "choices": ["...", ...], "answer": 1}
    ARC      {"question": "...", "choices": {"text": [...], "label": [...]}, "answerKey": "B"}
    MedQA    {"question": "...", "options": {"A": "...", "B": "..."}, "answer": "B"}

The names of a question, of its choices and of its answer may be mixed, in any case. An answer is a
choice's label, its text, or, as a JSON number, its number from 0. Where a label is itself a number,
a JSON number is a label, too, and never counts: of the labels 1 to 4, 1 is the first.
"""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from dataset.files import data_files, read_rows
from dataset.rows import BadRow, content, keys_of

QUESTIONS = ("question", "query", "prompt", "input")
CHOICES = ("choices", "options")
ANSWERS = ("answer", "answerkey", "label", "target", "gold")
LETTERS = string.ascii_uppercase
# The words before a question (ARC's alone) and after it.
WORDS = {"en": ("Question: ", "Answer:"), "zh": ("问题：", "答案：")}
HAN = re.compile("[\u3400-\u9fff]")


@dataclass(frozen=True)
class ChoiceQuestion:
    """``answer`` is the number of the right one of ``choices``, from 0."""

    question: str
    choices: tuple[str, ...]
    answer: int


def has_choices(path: Path) -> bool:
    """Whether the first row that is a JSON object has choices, be the rest of it right or wrong."""
    rows = (row for file in data_files([path]) for _, row in read_rows(file, dict))
    first = next((row for row in rows if not isinstance(row, BadRow)), {})
    return bool(_named(first, CHOICES) or {"A", "B"} <= first.keys())


def clean_choices(row: dict) -> ChoiceQuestion:
    """The question of a row. Raises ``BadRow``."""
    question, answer = _only(row, QUESTIONS), _only(row, ANSWERS)
    labels, texts = _labelled(row)
    if not 2 <= len(texts) <= len(LETTERS):
        raise BadRow(f"{len(texts)} choices; give from 2 to {len(LETTERS)}")
    named = zip(labels, texts, strict=True)
    choices = tuple(content(text, f"choice {label}") for label, text in named)
    found = _chosen(row[answer], labels, choices)
    return ChoiceQuestion(content(row[question], f'"{question}"'), choices, found)


def _named(row: dict, names: Sequence[str]) -> list[str]:
    """The keys of ``row`` that are one of ``names`` in any case."""
    return [key for key in row if key.lower() in names]


def _only(row: dict, names: Sequence[str]) -> str:
    """The one key of ``row`` with one of ``names``. Raises ``BadRow`` for none or several."""
    found = _named(row, names)
    if len(found) != 1:
        several = f"{' and '.join(found)} are both" if found else f"none of its keys {keys_of(row)}"
        raise BadRow(f"{several} the {names[0]} of a multiple-choice row; give one {names[0]!r}")
    return found[0]


def _labelled(row: dict) -> tuple[Sequence[str], Sequence[Any]]:
    """The labels and the texts of a row's choices, equally many. Raises ``BadRow``."""
    if not _named(row, CHOICES):
        labels = "".join(takewhile(row.__contains__, LETTERS))
        if len(labels) < 2:
            wanted = 'a list "choices", or texts "A", "B", ...'
            raise BadRow(f"no choices among its keys {keys_of(row)}; give {wanted}")
        return labels, [row[label] for label in labels]
    key = _only(row, CHOICES)
    value = row[key]
    if isinstance(value, dict) and {"text", "label"} <= value.keys():
        labels, texts = value["label"], value["text"]
    elif isinstance(value, dict):
        labels, texts = list(value), list(value.values())
    else:
        labels, texts = LETTERS, value
    if not isinstance(texts, list) or not isinstance(labels, str | list):
        raise BadRow(f'"{key}" is no list of texts')
    labels = LETTERS[: len(texts)] if labels is LETTERS else labels
    if len(labels) != len(texts):
        raise BadRow(f'"{key}" has {len(texts)} texts for {len(labels)} labels')
    return labels, texts


def _chosen(answer: Any, labels: Sequence[str], choices: Sequence[str]) -> int:
    """Which choice ``answer`` names. Raises ``BadRow`` where it is none, or more than one."""
    said, is_number = str(answer).strip(), isinstance(answer, int) and not isinstance(answer, bool)
    counts = is_number and not any(str(label).strip().isdecimal() for label in labels)
    if counts:
        found = {answer} & set(range(len(choices)))
    else:
        found = {n for n, label in enumerate(labels) if str(label).strip() == said}
    if not is_number:  # whose text may be another choice's number
        found |= {n for n, text in enumerate(choices) if text.strip() == said}
    if len(found) != 1:
        which = "more than one" if found else "none"
        names = ", ".join(map(str, labels)) + ", counted from 0" * counts
        raise BadRow(f"the answer {answer!r} is {which} of the choices {names}")
    return found.pop()


def language_of(questions: Sequence[ChoiceQuestion]) -> str:
    """The key of ``WORDS`` for a file: "zh" if at least half its rows have a Chinese character."""
    chinese = sum(any(map(HAN.search, (each.question, *each.choices))) for each in questions)
    return "zh" if 2 * chinese >= len(questions) else "en"


def asked(each: ChoiceQuestion, scored: str, language: str) -> tuple[str, list[str]]:
    """The words before an answer, and the answers of which a model has to find one likeliest.

    ``scored`` "letters" lists the choices and asks for a letter, as lm-evaluation-harness does with
    CMMLU and C-Eval ("zh") and MMLU ("en"), behind their description of the subject, which is not
    in here; "texts" asks for a choice's own words, as it does with ARC ("en", without description;
    "zh" is the same in Chinese).
    """
    before, after = WORDS[language]
    if scored == "texts":
        return f"{before}{each.question}\n{after}", list(each.choices)
    letters = LETTERS[: len(each.choices)]
    lines = [f"{letter}. {text}" for letter, text in zip(letters, each.choices, strict=True)]
    return "\n".join([each.question.strip(), *lines, after]), list(letters)
