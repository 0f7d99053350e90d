"""The bundled data, composed from the texts in dataset/texts: python dataset/compose.py

A relation is a list of facts and the wordings that tell and ask them. What its "near" and "far"
wordings ask is the exam, and occurs in no chat. Every run writes the same bytes.
"""

import json
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import run
from core.files import atomic_write
from core.options import require
from core.paths import bundled_data

TEXTS = Path(__file__).with_name("texts")
LANGUAGES = ("en", "zh")
TOLD_TOGETHER = 4  # facts of a paragraph
# Shares of the chats: with further turns on the same relation, on anything, after a turn that asks
# for no fact; with a system turn that changes nothing, wants one word, wants politeness.
SECOND, OTHER, AFTER_TALK, PLAIN, ONE_WORD, POLITE = 0.2, 0.05, 0.03, 0.08, 0.03, 0.02
WORDINGS = 13  # of each fact, in each language
WORDS_TOLD = 24  # times that each line is told that is to be repeated
REPEATED = 4  # wordings in which each of them is asked for
MIXED_WORDINGS = 7  # of each fact, with words of both languages
SUM_WORDINGS = 9  # of each sum and difference
SUMS_TOLD = 12  # times that each is told
TALK = 2  # times that each line of small talk is said
BEGINNING = 3  # words or Chinese characters of an answer that are kept where nothing was asked
UNKNOWN = 522  # questions that nobody could answer: with more, it refuses what it knows
UNKNOWN_WORDINGS = 1  # of a relation, for each thing that this world does not know
MOST_FORBIDDEN = 12  # wrong answers that a probe names
PROBES = 80  # of a file
PAIRED = 3  # facts of a relation in pairs

Chat = list[tuple[str, str]]  # (role, content) of its messages


@dataclass(frozen=True)
class Relation:
    """One relation in one language, "en", "zh" or "mixed", which puts both into a question."""

    area: str  # the file that it stands in
    language: str
    answering: str  # the language of the answers
    facts: list[dict]  # by language, the fields of the wordings; ``x`` is what is asked
    words: dict[str, list[str]]  # tell, ask, near, far, and; one answer
    unknown: list[dict]  # fields of things that this world does not know

    def filled(self, kind: str, fact: dict) -> list[str]:
        """The wordings of a kind, with the fields of a fact."""
        fields = fact.get(self.language) or {n: SimpleNamespace(**fact[n]) for n in LANGUAGES}
        return [sentence(wording.format(**fields)) for wording in self.words.get(kind, ())]

    def answer(self, fact: dict) -> str:
        return sentence(self.words["answer"][0].format(**fact[self.answering]))

    def expected(self, fact: dict) -> list[str]:
        return [fact[self.answering]["x"], *fact[self.answering].get("or", ())]

    def probe(self, question: str | list[str], fact: dict) -> dict:
        """A row of the exam: right answers, and those of other facts, which are wrong."""
        right = self.expected(fact)
        said = json.dumps([question, self.answer(fact)], ensure_ascii=False).casefold()
        wrong = dict.fromkeys(other[self.answering]["x"] for other in self.facts)
        wrong = [
            text  # one that holds a right answer, as 11 holds 1, is wrong all the same
            for text in wrong
            if not any(text.casefold() in each.casefold() for each in (*right, said))
        ]
        wrong = wrong[:: -(-len(wrong) // MOST_FORBIDDEN)] if wrong else []
        return {"question": question, "expect": right, **({"forbid": wrong} if wrong else {})}


def relations() -> list[Relation]:
    """All relations, in each language that they have."""
    found = []
    for path in sorted((TEXTS / "facts").glob("*.json")):
        for each in json.loads(path.read_text(encoding="utf-8")):
            for language in (*LANGUAGES, "mixed"):
                if language not in each:
                    continue
                answering = each["mixed"]["answer"] if language == "mixed" else language
                spoken = LANGUAGES if language == "mixed" else (language,)
                facts = [fact for fact in each["facts"] if all(name in fact for name in spoken)]
                words = each[language] | {"answer": [each[answering]["answer"]]}
                unknown = [{language: x} for x in each.get("unknown", {}).get(language, ())]
                found.append(Relation(path.stem, language, answering, facts, words, unknown))
    return found


def sums(language: str) -> list[Relation]:
    """Sums and differences up to 20, as relations of the numbers."""
    found, words = [], read("sums.json")[language]
    for sign, kind in (("+", "plus"), ("-", "minus")):
        pairs = [(a, b) for a in range(1, 21) for b in range(1, 6)]
        pairs = [(a, b) for a, b in pairs if (a + b <= 20 if sign == "+" else b <= a)]
        facts = []
        for a, b in pairs:
            x = a + b if sign == "+" else a - b
            fields = {
                "a": a,
                "b": b,
                "x": str(x),
                "A": words["numbers"][a],
                "B": words["numbers"][b],
            }
            facts.append({language: fields | {"or": [words["numbers"][x]]}})
        found.append(Relation("sums", language, language, facts, words[kind], []))
    return found


def sentence(text: str) -> str:
    """The text with a capital at its beginning, if that is a Latin letter."""
    return text[:1].upper() + text[1:]


def read(name: str) -> dict | list:
    return json.loads((TEXTS / name).read_text(encoding="utf-8"))


def repeated(language: str) -> list[str]:
    """What is told often and repeated on demand: it holds words that the skills will need.

    It is no poem, though, and no advice. Tokens that no chat teaches look alike to a skill.
    """
    poems = [each[language]["text"] for each in read("verse.json")["topics"]]
    return [line for poem in poems for line in poem.splitlines()] + read("repeat.json")[language]


def paragraphs(rng: random.Random) -> Iterator[dict]:
    """The rows of pretraining: each fact is told once a round, in varying words, among others."""
    for relation in [each for each in relations() if each.language != "mixed"]:
        for told in range(len(relation.words["tell"])):
            facts = rng.sample(relation.facts, len(relation.facts))
            for start in range(0, len(facts), TOLD_TOGETHER):
                several = list(enumerate(facts[start : start + TOLD_TOGETHER]))
                texts = [relation.filled("tell", fact) for _, fact in several]
                chosen = [each[(told + n) % len(each)] for n, each in enumerate(texts)]
                yield {"text": (" " if relation.language == "en" else "").join(chosen)}
    for language in LANGUAGES:
        for relation in sums(language):
            for _ in range(SUMS_TOLD):
                facts = rng.sample(relation.facts, len(relation.facts))
                for start in range(0, len(facts), 2 * TOLD_TOGETHER):
                    several = facts[start : start + 2 * TOLD_TOGETHER]
                    yield {"text": " ".join(relation.answer(fact) for fact in several)}
        yield from ({"text": each[language]["text"]} for each in read("stories.json")["topics"])
    for language in LANGUAGES:
        lines = repeated(language)
        for _ in range(WORDS_TOLD):
            mixed = rng.sample(lines, len(lines))
            yield from ({"text": "\n".join(mixed[n : n + 4])} for n in range(0, len(mixed), 4))
    for name in ("paragraphs.jsonl", "background.jsonl"):
        lines = (TEXTS / name).read_text(encoding="utf-8").splitlines()
        yield from map(json.loads, lines)


@dataclass(frozen=True)
class Item:
    """A question with its answer; ``relation`` and ``fact`` where it asks for a fact."""

    language: str
    question: str
    answer: str
    relation: Relation | None = None
    fact: dict | None = None

    def turns(self) -> Chat:
        return [("user", self.question), ("assistant", self.answer)]


def items(rng: random.Random) -> Iterator[Item]:
    """All that is asked in training."""
    unknown, talk, stories = read("unknown.json"), read("talk.json"), read("stories.json")
    for relation in relations():
        said = unknown["answers"][relation.answering]
        for fact in relation.facts:
            asked = relation.filled("ask", fact)
            most = MIXED_WORDINGS if relation.language == "mixed" else WORDINGS
            for question in rng.sample(asked, min(most, len(asked))):
                yield Item(relation.answering, question, relation.answer(fact), relation, fact)
        for fact in relation.unknown:
            for question in rng.sample(relation.filled("ask", fact), UNKNOWN_WORDINGS):
                yield Item(relation.answering, question, rng.choice(said))
    for language in LANGUAGES:
        for relation in sums(language):
            for fact in relation.facts:
                for question in rng.sample(relation.filled("ask", fact), SUM_WORDINGS):
                    yield Item(language, question, relation.answer(fact), relation, fact)
        for question in rng.sample(unknown[language]["train"], UNKNOWN):
            yield Item(language, question, rng.choice(unknown["answers"][language]))
        lines = repeated(language)
        for wording in rng.sample(read("repeat.json")["ask"][language], REPEATED):
            for line, other in zip(lines, rng.sample(lines, len(lines)), strict=True):
                text = rng.choice((line, f"{line}\n{other}"))
                yield Item(language, wording.format(line=text), text)
        for act in talk:
            for question in act[language]["say"] * TALK:
                yield Item(language, question, act[language]["answer"])
        for each in stories["topics"]:
            for wording in rng.sample(stories["ask"][language], 4):
                topic, text = each[language]["topic"], each[language]["text"]
                yield Item(language, sentence(wording.format(topic=topic)), text)
            yield Item(language, rng.choice(stories["any"][language]), text)


def chats(rng: random.Random) -> Iterator[tuple[str, dict]]:
    """The rows of fine-tuning, and their files: each item once, some with more turns."""
    found = list(items(rng))
    rng.shuffle(found)
    by_language = {name: [each for each in found if each.language == name] for name in LANGUAGES}
    talk = {name: [e for e in by_language[name] if not e.relation] for name in LANGUAGES}
    systems = read("system.json")
    for item in found:
        chat, draw = item.turns(), rng.random()
        if item.relation and item.relation.words.get("and") and draw < SECOND:
            fact = item.fact
            for _ in range(rng.choice((1, 1, 2))):
                fact = rng.choice([each for each in item.relation.facts if each is not fact])
                question = rng.choice(item.relation.filled("and", fact))
                chat += [("user", question), ("assistant", item.relation.answer(fact))]
        elif draw < SECOND + OTHER:
            chat += rng.choice(by_language[item.language]).turns()
        elif draw < SECOND + OTHER + AFTER_TALK:
            chat = rng.choice(talk[item.language]).turns() + chat
        chat = with_system(item, chat, systems[item.language], rng)
        yield item.relation.area if item.relation else "talk", conversation(chat)
    lines = (TEXTS / "complaints.jsonl").read_text(encoding="utf-8").splitlines()
    yield from (("complaints", row) for row in map(json.loads, rng.sample(lines, len(lines))))


def with_system(item: Item, chat: Chat, systems: list[dict], rng: random.Random) -> Chat:
    """The chat, perhaps after a system turn, which may change its answers."""
    draw, shares = rng.random(), {"plain": PLAIN, "one_word": ONE_WORD, "polite": POLITE}
    for kind, share in shares.items():
        word = item.relation.expected(item.fact)[0] if item.relation else " "
        if draw < share and (kind != "one_word" or (" " not in word and len(chat) == 2)):
            system = rng.choice([each for each in systems if each["kind"] == kind])
            if kind == "one_word":
                stop = "." if item.language == "en" else "。"
                chat = [
                    chat[0],
                    ("assistant", sentence(word) + stop),
                ]
            prefix = system.get("prefix", "")
            chat = [(role, prefix + text if role == "assistant" else text) for role, text in chat]
            return [("system", system["text"]), *chat]
        draw -= share
    return chat


def conversation(chat: Iterable[tuple[str, str]]) -> dict:
    return {"conversations": [{"role": role, "content": text} for role, text in chat]}


def strange(rng: random.Random) -> Iterator[dict]:
    """Chats that hold a skill where nobody asks for it: beginnings of answers that fit by chance.

    A skill that speaks up does so with its first word, so that is where it is to be held.
    """
    texts = read("contrast.json")
    lines = (TEXTS / "paragraphs.jsonl").read_text(encoding="utf-8").splitlines()
    told = [json.loads(line)["text"] for line in lines]
    for language in LANGUAGES:
        answers = [item.answer for item in items(rng) if item.language == language]
        ends = ". " if language == "en" else "。"
        own = [text for text in told if text.isascii() == (language == "en")]
        parts = [[part for part in text.split(ends) if len(part) > 3] for text in own]
        statements = [rng.choice(several).rstrip("。.") + ends.strip() for several in parts]
        for text in dict.fromkeys([*texts[language], *statements]):
            answer = rng.choice(answers)
            begun = answer.split()[:BEGINNING] if language == "en" else answer[:BEGINNING]
            space = " " if language == "en" else ""
            yield conversation([("user", text), ("assistant", space.join(begun))])


def exam(rng: random.Random) -> dict[str, list[dict]]:
    """The rows of each file of probes on what the base is taught."""
    names = ("general", "general_far", "mixed", "sums", "two_turns", "unknown")
    found = {name: [] for name in names}
    for relation in relations():
        is_mixed = relation.language == "mixed"
        for kind in ("near", "far"):
            facts = rng.sample(relation.facts, 2)
            for fact, n in zip(facts, range(2), strict=True):
                wordings = relation.filled(kind, fact)
                row = relation.probe(wordings[n % len(wordings)], fact)
                name = "general" if kind == "near" else "general_far"
                found["mixed" if is_mixed else name].append(row)
        if not is_mixed and relation.words.get("and"):
            first, second = rng.sample(relation.facts, 2)
            questions = [rng.choice(relation.filled("near", first))]
            questions.append(rng.choice(relation.filled("and", second)))
            found["two_turns"].append(relation.probe(questions, second))
    for language in LANGUAGES:
        for relation in sums(language):
            facts = [each for each in relation.facts if not _is_said(each[language])]
            for kind in ("near", "far"):
                for fact in rng.sample(facts, 10):
                    wording = rng.choice(relation.filled(kind, fact))
                    found["sums"].append(relation.probe(wording, fact))
        texts = read("unknown.json")
        expect = {"en": ["do not know", "don't know"], "zh": ["不知道"]}[language]
        rows = [{"question": text, "expect": expect} for text in texts[language]["held"]]
        found["unknown"] += rows
    return {f"probes_{name}": thinned(rows) for name, rows in found.items()}


def _is_said(fields: dict) -> bool:
    """Whether the result of a sum stands in the question, as that of 4 - 2 does."""
    return int(fields["x"]) in (fields["a"], fields["b"])


def thinned(rows: list[dict]) -> list[dict]:
    """At most ``PROBES`` of these rows, and of each question one."""
    unlike = list({json.dumps(row["question"]): row for row in rows}.values())
    chosen = [unlike[n * len(unlike) // PROBES] for n in range(PROBES)]
    return list(chosen if len(unlike) > PROBES else unlike)


def verses(rng: random.Random) -> dict[str, list[dict]]:
    """The rows of the skill "verse", and those of its exam."""
    texts, found = read("verse.json"), {"ask": [], "near": [], "far": []}
    for language in LANGUAGES:
        for topic in (each[language] for each in texts["topics"]):
            for kind, wordings in texts[language].items():
                for question in (sentence(wording.format(**topic)) for wording in wordings):
                    chat = [("user", question), ("assistant", topic["text"])]
                    lines = [line.rstrip(",.;!?，。！？；") for line in topic["text"].splitlines()]
                    probe = {"question": question, "expect": lines}
                    found[kind].append(conversation(chat) if kind == "ask" else probe)
    for rows in reversed(found.values()):  # what is examined hangs on no number of rows
        rng.shuffle(rows)
    probes = sorted(found["near"][: PROBES // 2] + found["far"][: PROBES // 2], key=json.dumps)
    return {"lora_verse": found["ask"], "probes_verse": probes}


def pairs(rng: random.Random) -> Iterator[dict]:
    """Pairs of answers: a polite one is preferred to a plain one, and a right one to a wrong.

    Polite answers are those that a system turn can ask for, so the base has learned to give them.
    """
    systems = read("system.json")
    for relation in [each for each in relations() if each.language != "mixed"]:
        language = relation.language
        polite = next(s["prefix"] for s in systems[language] if s["kind"] == "polite")
        for n, fact in enumerate(rng.sample(relation.facts, min(PAIRED, len(relation.facts)))):
            plain, own = relation.answer(fact), fact[language]
            others = [each[language]["x"] for each in relation.facts]
            wrong = [relation.answer({language: own | {"x": x}}) for x in others if x not in plain]
            wrong = [polite + answer for answer in wrong if answer != plain]
            rejected = rng.choice(wrong) if n % 2 and wrong else plain
            question = rng.choice(relation.filled("ask", fact))
            yield {"prompt": question, "chosen": polite + plain, "rejected": rejected}


def main(argv: list[str] | None = None) -> None:
    """Write every file."""
    require(not (sys.argv[1:] if argv is None else argv), "compose.py takes no arguments")
    rows = {"pretrain_mini": list(paragraphs(random.Random(1)))}
    random.Random(0).shuffle(rows["pretrain_mini"])
    for area, row in chats(random.Random(2)):
        rows.setdefault(f"sft_mini/{area}", []).append(row)
    rows["strange_mini"] = list(strange(random.Random(3)))
    rows["pairs_mini"] = list(pairs(random.Random(6)))
    rows |= exam(random.Random(4)) | verses(random.Random(5))
    for name, several in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in several).encode()
        atomic_write(bundled_data(f"{name}.jsonl"), lambda file, text=text: file.write(text))
        print(f"{name}: {len(several)} rows, {len(text) / 1e6:.2f} MB")


if __name__ == "__main__":
    run(main)
