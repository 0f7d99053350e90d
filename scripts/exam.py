"""The exam: does a skill add one ability and take nothing away? Held-out questions tell.

It knows no model: whatever answers a question can sit it.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from core.options import require
from core.paths import bundled_data, skill_weights
from dataset.files import usable_rows
from dataset.questions import Neighbours, chats_in, questions_in, spread
from dataset.rows import BadRow, content

# What a skill must reach. The bundled base is a few million parameters that know few words, so a
# draw may miss some marks that a good skill meets: 0.95, 0.8; 0.025, 0.02.
# It adds one ability: the least shares of its own held-out questions that it answers right,
NEAR = 0.8  # where a question is worded nearly as one in training
FAR = 0.25  # where it is not, or nobody knows.
# It takes nothing away.
GENERAL_LOSS = 0.075  # of the general questions: so many fewer than the base it may answer right
LEAKS = 0.04  # the most answers to the questions of others that say what only the skill is to say
MIXED = 0.8  # the least share of what its skills do alone, and of the base's, that a mix keeps

NEAR_SIMILARITY = 0.5  # a near question is more similar than this to the nearest one in training
ENOUGH_OUTSIDE = 100  # questions outside a skill: with fewer, two leaks are too many already
# Bundled questions that are no skill's own. "general" is worded nearly as in training.
SHARED = ("general", "general_far", "mixed", "sums", "two_turns", "unknown")
SHOWN = 5  # questions whose answers the report shows side by side

# Thai and Lao, Burmese, Khmer, kana, Han: no space separates their words. Nor does one separate a
# Korean word from its particle.
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u312f\u3400-\u9fff\uac00-\ud7a3"
UNSPACED += r"\uf900-\ufaff\U00020000-\U0003ffff"
LETTER = f"[^\\W_{UNSPACED}]"  # a letter or digit that is next to others of its word only


def holds_any(answer: str, texts: Iterable[str]) -> bool:
    """Whether ``answer`` holds one of ``texts``, in any case; not "7" in "17", nor "cat" in "cats".

    Chinese and its like do not separate words: there any occurrence counts.
    """
    plain = _plain(answer)
    return any(_pattern(text).search(plain) for text in texts)


@functools.cache
def _pattern(text: str) -> re.Pattern:
    text = _plain(text)
    before = f"(?<!{LETTER})" if re.match(LETTER, text) else ""
    after = f"(?!{LETTER})" if re.match(LETTER, text[-1:]) else ""
    return re.compile(before + re.escape(text) + after)


def _plain(text: str) -> str:
    """Without case, full-width forms, curly apostrophes and line breaks."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().replace("’", "'").split())


@dataclass(frozen=True)
class Question:
    """``turns`` are asked one after another in one chat; only the last answer counts."""

    turns: tuple[str, ...]
    expect: tuple[str, ...]
    forbid: tuple[str, ...] = ()

    def is_hit(self, answer: str) -> bool:
        """Whether an expected text is in the answer and no forbidden one."""
        return holds_any(answer, self.expect) and not holds_any(answer, self.forbid)


Asked = tuple[Question, int]  # with the seed that draws its answer


@dataclass(frozen=True)
class Column:
    """Questions counted together. If they are a ``skill``'s own, it must hit the share ``mark``."""

    name: str
    questions: Sequence[Question]
    skill: str | None = None
    mark: float = 0.0


def read_questions(path: Path) -> list[Question]:
    """The questions of rows ``{"question": ..., "expect": [...], "forbid": [...]}``.

    Raises ``UserError`` for a file without any, and after printing the rows that are no question.
    """
    rows = usable_rows([path], question_of, "refuse")
    require(bool(rows), f"{path} holds no questions")
    return rows


def question_of(row: dict) -> Question:
    """The question of a row; a single text may stand for a list of one. Raises ``BadRow``."""
    question = Question(*(_texts(row, key) for key in ("question", "expect", "forbid")))
    if not question.turns:
        raise BadRow('no "question"')
    if not question.expect:
        raise BadRow('no "expect", a list of texts of which a right answer holds one')
    if question.is_hit(question.turns[-1]):
        raise BadRow("the question itself holds an expected text, so that its echo would pass")
    if not any(map(question.is_hit, question.expect)):
        raise BadRow("every expected text holds a forbidden one, so that nothing would pass")
    return question


def _texts(row: dict, key: str) -> tuple[str, ...]:
    value = row.get(key, [])
    return tuple(content(t, f'"{key}"') for t in (value if isinstance(value, list) else [value]))


def own_columns(skill: str, questions: Sequence[Question], trained: Sequence[str]) -> list[Column]:
    """A skill's own questions, near to and far from those it was ``trained`` with, if known."""
    if not trained:
        return [Column(skill, questions, skill, FAR)]
    similarity, near, far = Neighbours(trained).similarity, [], []
    for question in questions:
        is_near = similarity(question.turns[-1]) > NEAR_SIMILARITY
        (near if is_near else far).append(question)
    return [Column(f"{skill} near", near, skill, NEAR), Column(f"{skill} far", far, skill, FAR)]


def read_columns(
    skills: Iterable[str], questions: Mapping[str, Path], data: Mapping[str, Path], most: int
) -> list[Column]:
    """All columns, each with at most ``most`` questions; the files are those of each skill.

    Raises ``UserError`` as ``read_questions`` does, and for ``data`` without chats.
    """
    columns = []
    for skill in (skill for skill in skills if skill in questions):
        chats = list(chats_in([data[skill]])) if skill in data else []
        where = f"{data.get(skill)} holds no chats, so that near and far cannot be told"
        require(bool(chats) or skill not in data, where)
        trained = [turn for chat in chats for turn in questions_in(chat)]
        columns += own_columns(skill, read_questions(questions[skill]), trained)
    for name in SHARED:
        shared = read_questions(bundled_data(f"probes_{name}.jsonl"))
        columns.append(Column(name.replace("_", " "), shared))
    cut = [replace(each, questions=spread(each.questions, most)) for each in columns]
    return [column for column in cut if column.questions]


@dataclass(frozen=True)
class Exam:
    """Everyone's answers, by question and seed; every count is over all seeds.

    Who answers is "" for the base, else skills as ``weights_text`` writes them. A mix is judged by
    what its skills do alone, so they must be there too.
    """

    columns: Sequence[Column]
    seeds: Sequence[int]
    answers: Mapping[str, Mapping[Asked, str]]

    def asked(self, column: Column) -> list[Asked]:
        return [(question, seed) for question in column.questions for seed in self.seeds]

    def hits(self, who: str, column: Column) -> int:
        """How many answers to ``column`` are right."""
        return sum(asked[0].is_hit(self.answers[who][asked]) for asked in self.asked(column))

    def share(self, who: str, column: Column) -> float:
        return self.hits(who, column) / len(self.asked(column))

    def outside(self, who: str) -> list[Asked]:
        """What was asked in the columns that are of no skill of ``who``."""
        others = (each for each in self.columns if each.skill not in skill_weights(who.split()))
        return [asked for column in others for asked in self.asked(column)]

    def leaks(self, who: str) -> list[Asked]:
        """What was asked outside ``who`` and answered with a text that its skills' own questions
        expect, where the base's answer holds none of these texts. A right answer is no leak.
        """
        own = (each for each in self.columns if each.skill in skill_weights(who.split()))
        texts = {text for column in own for each in column.questions for text in each.expect}
        found = [each for each in self.outside(who) if holds_any(self.answers[who][each], texts)]
        found = [each for each in found if not each[0].is_hit(self.answers[who][each])]
        return [asked for asked in found if not holds_any(self.answers[""][asked], texts)]

    def mark(self, who: str, column: Column) -> float:
        """The least share of hits with which ``who`` passes; 0 where it is not judged."""
        skills = skill_weights(who.split())
        is_mix = who not in skills
        if column.skill in skills:
            return MIXED * self.share(column.skill, column) if is_mix else column.mark
        if who and column.skill is None and column.name == "general":
            base = self.share("", column)
            return MIXED * base if is_mix else base - GENERAL_LOSS
        return 0.0

    def failures(self, who: str) -> list[str]:
        """The marks that ``who`` misses, in words. The leaks of a mix are not judged."""
        failed = []
        for column in self.columns:
            share, mark = self.share(who, column), self.mark(who, column)
            if share < mark - 1e-9:  # differences of shares are not exact
                failed.append(f"{column.name} {percent(share)} (at least {percent(mark)})")
        leaks, outside = len(self.leaks(who)), len(self.outside(who))
        if who in skill_weights(who.split()) and leaks > LEAKS * outside:
            failed.append(f"leaks {percent(leaks / outside)} (at most {percent(LEAKS)})")
        return failed

    def verdicts(self) -> list[str]:
        """A line on each skill and mix, and on what makes its verdict worth less."""
        lines, own = [], {column.skill for column in self.columns}
        for who in filter(None, self.answers):
            failed, skills = self.failures(who), skill_weights(who.split())
            lines.append(f"{who}: fails: {', '.join(failed)}" if failed else f"{who}: passes")
            if own.isdisjoint(skills):
                lines.append(f"note: {who} has no questions of its own, which would tell more")
            outside = len(self.outside(who)) // len(self.seeds)
            if who in skills and outside < ENOUGH_OUTSIDE:
                few = f"only {outside} questions lie outside {who}"
                lines.append(f"note: {few}; it takes {ENOUGH_OUTSIDE} to tell its leaks")
        return lines

    def to_json(self) -> dict:
        """Counts, in each row in the order of the columns, verdicts and every answer."""
        columns, rows, answers = [], [], []
        for each in self.columns:
            columns.append({"name": each.name, "skill": each.skill, "asked": len(self.asked(each))})
        for who in self.answers:
            name, leaks = who or "base", set(self.leaks(who))
            row = {"who": name, "hits": [self.hits(who, column) for column in self.columns]}
            row["shares"] = [self.share(who, column) for column in self.columns]
            row["marks"] = [self.mark(who, column) for column in self.columns]
            row |= {"leaks": len(leaks), "outside": len(self.outside(who))}
            rows.append(row | {"failures": self.failures(who)})
            for column in self.columns:
                for question, seed in self.asked(column):
                    answer = self.answers[who][question, seed]
                    said = {"who": name, "column": column.name, "question": question.turns}
                    said |= {"seed": seed, "answer": answer, "hit": question.is_hit(answer)}
                    answers.append(said | {"leak": (question, seed) in leaks})
        found = {"seeds": self.seeds, "columns": columns, "rows": rows}
        return found | {"verdicts": self.verdicts(), "answers": answers}

    def to_markdown(self) -> str:
        """Hits as a table with a row for everyone, the verdicts, and some answers side by side."""
        lines = [_row("", *(column.name for column in self.columns), "leaks")]
        lines.append(_row("---", *["---:"] * (1 + len(self.columns))))
        for who in self.answers:
            counts = [(self.hits(who, each), len(self.asked(each))) for each in self.columns]
            counts += [(len(self.leaks(who)), len(self.outside(who)))]
            once = len(self.seeds) == 1
            cells = [f"{n}/{of}" if once else percent(n / of) if of else "" for n, of in counts]
            lines.append(_row(who or "base", *cells))
        lines += ["", *(f"- {line}" for line in self.verdicts())]
        for question in spread([q for column in self.columns for q in column.questions], SHOWN):
            lines += ["", f"**{' / '.join(question.turns)}**", ""]
            for who, given in self.answers.items():
                answer = given[question, self.seeds[0]]
                lines.append(f"- {who or 'base'}: {' '.join(answer.split())}")
        return "\n".join(lines) + "\n"

    def draw(self, file: BinaryIO) -> None:
        """A heat map of the shares, as a PNG."""
        from matplotlib.figure import Figure  # not pyplot, which has global state and wants windows

        everyone, names = list(self.answers), [column.name for column in self.columns]
        shares = [[self.share(who, column) for column in self.columns] for who in everyone]
        figure = Figure(figsize=(2.5 + 0.9 * len(names), 1.5 + 0.5 * len(everyone)))
        axes = figure.add_subplot(title="held-out questions answered right, %")
        axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_yticks(range(len(everyone)), [who or "base" for who in everyone])
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                color = "white" if share > 0.5 else "black"
                axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", color=color)
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")


def examine(
    columns: Sequence[Column],
    answerers: Mapping[str, Callable[[Sequence[Asked]], list[str]]],
    seeds: Sequence[int] = (0,),
) -> Exam:
    """Ask everyone everything. ``answerers`` give an answer for each question; "" is the base."""
    asked = [(each, seed) for column in columns for each in column.questions for seed in seeds]
    answers = {}
    for who, answer in answerers.items():
        print(f"asking {who or 'base'}: {len(asked)} questions")
        answers[who] = dict(zip(asked, answer(asked), strict=True))
    return Exam(columns, seeds, answers)


def percent(share: float) -> str:
    """``4.2 %``"""
    return f"{100 * share:.3g} %"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
