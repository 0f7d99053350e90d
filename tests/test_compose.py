"""The bundled data is what its texts compose, and its exam asks what was taught in new words."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks.result_file import data_version
from core.paths import bundled_data
from dataset import compose
from dataset.questions import spread
from scripts.exam import read_questions

QUESTIONS = ("ask", "near", "far", "and")
Facts = list[tuple[compose.Relation, dict]]


@pytest.fixture(scope="module")
def composed(tmp_path_factory) -> Path:
    """A folder of all that is composed."""
    folder = tmp_path_factory.mktemp("composed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose, "bundled_data", lambda name: folder / name)
        compose.main([])
    return folder


@pytest.fixture(scope="module")
def facts() -> Facts:
    """Each fact of the world, with its relation."""
    return [(relation, fact) for relation in compose.relations() for fact in relation.facts]


@pytest.fixture(scope="module")
def sums() -> Facts:
    relations = [relation for name in compose.LANGUAGES for relation in compose.sums(name)]
    return [(relation, fact) for relation in relations for fact in relation.facts]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def bare(text: str) -> str:
    """Without case, spaces and punctuation."""
    return re.sub(r"[\W_]", "", text.casefold())


def holds(text: str, wanted: Iterable[str]) -> bool:
    """What the exam's ``holds_any`` says of such plain texts, a second sooner."""
    for each in wanted:
        if each.casefold() in text.casefold():
            ends = (r"\b" if end.isascii() else "" for end in (each[0], each[-1]))
            if re.search(re.escape(each).join(ends), text, re.ASCII | re.IGNORECASE):
                return True
    return False


def test_composing_gives_the_bundled_files_to_the_byte(composed):
    made = {path.relative_to(composed).as_posix(): path for path in composed.rglob("*.jsonl")}
    assert {"pretrain_mini.jsonl", "strange_mini.jsonl", "lora_verse.jsonl"} <= made.keys()
    differ = [
        name for name, path in made.items() if path.read_bytes() != bundled_data(name).read_bytes()
    ]
    assert not differ, "run python dataset/compose.py"
    chats = {f"sft_mini/{path.name}" for path in bundled_data("sft_mini").iterdir()}
    assert chats == {name for name in made if name.startswith("sft_mini/")}


def test_every_fact_has_the_fields_that_its_wordings_need(facts):
    asked = [(relation, fact, ("tell", *QUESTIONS)) for relation, fact in facts]
    asked += [(each, fact, ("ask",)) for each in compose.relations() for fact in each.unknown]
    wanting = []
    for relation, fact, kinds in asked:
        for kind in kinds:
            try:
                texts = relation.filled(kind, fact)
            except (KeyError, AttributeError) as error:  # a field of one language, of both
                texts = [f"{{{error}}}"]
            wanting += [(relation.area, kind, fact) for text in texts if re.search("[{}]", text)]
    assert not wanting


def test_no_question_on_a_fact_holds_its_answer(facts):
    """Sums may: 2 - 1 is 1."""
    holding = [
        (question, relation.expected(fact))
        for relation, fact in facts
        for kind in QUESTIONS
        for question in relation.filled(kind, fact)
        if holds(question, relation.expected(fact))
    ]
    assert not holding


def test_whatever_tells_a_fact_holds_its_answer(facts, sums):
    lacking = [
        (text, fact)
        for relation, fact in (*facts, *sums)
        for text in (*relation.filled("tell", fact), relation.answer(fact))
        if not holds(text, [fact[relation.answering]["x"]])
    ]
    assert not lacking


def test_no_question_of_the_exam_is_asked_in_training():
    """Of two turns the first is new; what follows it is worded as in training."""
    folder = bundled_data("")
    files = [*folder.glob("sft_mini/*.jsonl"), *folder.glob("lora_*.jsonl")]
    chats = [row["conversations"] for path in files for row in rows(path)]
    trained = {bare(each["content"]) for chat in chats for each in chat if each["role"] == "user"}
    probes = [row["question"] for path in folder.glob("probes_*.jsonl") for row in rows(path)]
    firsts = [each[0] if isinstance(each, list) else each for each in probes]
    assert len(firsts) > 500 and len(trained) > 10_000
    assert not [question for question in firsts if bare(question) in trained]


def test_every_question_of_the_exam_can_be_asked():
    files = sorted(bundled_data("x").parent.glob("probes_*.jsonl"))
    asked = {path.stem: spread(read_questions(path), 40) for path in files}
    assert len(asked) == 9 and min(map(len, asked.values())) >= 40
    said = {question.turns[-1] for question in asked["probes_sums"]}
    for kind in ("near", "far"):  # both, although only 40 of 80 are asked
        sums = [relation for name in compose.LANGUAGES for relation in compose.sums(name)]
        wordings = {text for each in sums for x in each.facts for text in each.filled(kind, x)}
        assert len(said & wordings) == 20


def test_the_name_of_a_skill_is_its_own_to_teach(composed):
    for path in composed.rglob("*.jsonl"):
        text = path.read_text(encoding="utf-8").casefold()
        assert "pebble" not in text and "小石" not in text, path.name


def test_no_right_answer_is_forbidden(facts, sums):
    """Nor a part of one. What holds one may be: 十一月 holds 一月, and is wrong all the same."""
    forbidden = [
        (text, row["expect"])
        for row in (relation.probe("", fact) for relation, fact in (*facts, *sums))
        for text in row.get("forbid", ())
        if any(text.casefold() in right.casefold() for right in row["expect"])
    ]
    assert not forbidden


def test_the_answer_that_is_taught_passes_the_exam(facts, sums):
    refused = []
    for relation, fact in (*facts, *sums):
        answer = relation.answer(fact)
        for question in (*relation.filled("near", fact), *relation.filled("far", fact)):
            row = relation.probe(question, fact)
            if not holds(answer, row["expect"]) or holds(answer, row.get("forbid", ())):
                refused.append((answer, row))
    assert not refused


def test_the_page_names_the_version_of_the_data():
    page = bundled_data("README.md").read_text(encoding="utf-8")
    assert f"The version of this data is `{data_version()}`" in page
