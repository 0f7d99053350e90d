"""What training teaches is what the chat asks for, with the chat templates that models really have.

A chat's ids are told apart from its text here: ``written`` says what text they must spell, from the
template's own renderings and the table's facts, and the library says what ids that text has.
"""

import copy
import random
import unicodedata
from collections import Counter
from functools import partial
from itertools import groupby

import pytest

from core.errors import UserError
from dataset.chat import chat_notes, encode_chat, encode_chats, ends_of_answer
from dataset.rows import BadRow
from dataset.tokenizer import spelled_bytes
from tests.chat_templates import BACKENDS, TEMPLATES, Template, tokenizer_of


class Case:
    """A template of the table with its tokenizer, or with one of another ``kind``."""

    def __init__(self, name: str, kind: str | None = None):
        self.template: Template = TEMPLATES[name]
        self.tokenizer = tokenizer_of(name, kind)
        self.added = self.tokenizer.added_tokens_decoder
        self.bytes = spelled_bytes(self.tokenizer, range(len(self.tokenizer)))
        self.ends = ends_of_answer(self.tokenizer)
        composed = (kind or self.template.kind) == "composed"
        self.normal = partial(unicodedata.normalize, "NFC") if composed else str

    def rendered(self, messages, asks=False) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=asks
        )

    def library(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def learned(self, messages) -> list[str]:
        """The texts that are learned, in order; an end of our own is not among them."""
        *earlier, last = [m["content"] for m in messages if m["role"] == "assistant"]
        template = self.template
        own_end = template.end * (not template.inserts)
        answers = [(last, own_end)]
        if template.earlier and not (template.moves and messages[0]["role"] == "system"):
            end = template.earlier_end or own_end
            answers = [*((answer, end) for answer in earlier), *answers]
        return [template.learned.format(template.writes(a)) + end for a, end in answers]

    def written(self, messages) -> str:
        """The text that the ids of a chat spell: what asks for the last answer, then the answer."""
        prompt, whole = self.rendered(messages[:-1], asks=True), self.rendered(messages)
        if whole.startswith(prompt):
            return whole
        return prompt + self.learned(messages)[-1]

    def without_own_ends(self, ids) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return [n for n in ids if n != eos] if self.template.inserts else ids

    def spells(self, ids, text) -> bool:
        """Do the ids stand for the text? SentencePiece may put a space before any piece of it."""
        rest, swallows = self.normal(text), False
        for is_added, group in groupby(ids, self.added.__contains__):
            run = list(group)
            for piece in [self.added[n].content for n in run] if is_added else [self.text(run)]:
                piece = piece.lstrip() if swallows else piece
                if not is_added and not rest.startswith(piece):
                    piece = piece.removeprefix(" ")
                if not rest.startswith(piece):
                    return False
                rest, swallows = rest[len(piece) :], is_added and self.template.rstrip
                rest = rest.lstrip() if swallows else rest
        return not rest

    def text(self, ids) -> str:
        return b"".join(self.bytes[n] for n in ids).decode(errors="replace")

    def check(self, messages, encoded) -> None:
        """Assert that a chat's ids spell what they must, and that no more or less is learned."""
        ids, flags = encoded
        assert self.spells(self.without_own_ends(ids), self.written(messages))
        runs = [[n for n, _ in run] for _, run in groupby(zip(ids, flags, strict=True), second)]
        runs = runs[not flags[0] :: 2]
        answers = self.learned(messages)
        assert len(runs) == len(answers)
        own_ends = 0
        for run, answer in zip(runs, answers, strict=True):
            assert run[-1] in self.ends
            if self.template.inserts and run[-1] == self.tokenizer.eos_token_id:
                own_ends, run = own_ends + 1, run[:-1]
            swallowed = answer.lstrip() if self.template.rstrip else answer
            assert self.spells(run, answer) or self.spells(run, swallowed)
        assert own_ends == self.template.inserts * ids.count(self.tokenizer.eos_token_id)
        assert bool(own_ends) == self.template.inserts

    def check_asked(self, messages, encoded, asked) -> None:
        """Assert that the ids of the chat begin with those that ask for its last answer."""
        (ids, flags), (asked_ids, asked_flags) = encoded, asked
        n = len(asked_ids)
        assert (ids[:n], flags[:n]) == (asked_ids, asked_flags)
        assert flags[n], "the first id of the answer is learned"
        assert self.spells(self.without_own_ends(asked_ids), self.rendered(messages[:-1], True))


def second(pair):
    return pair[1]


def chat(*contents, system=None) -> list[dict]:
    roles = ["user", "assistant"] * ((len(contents) + 1) // 2)
    turns = zip(roles, contents, strict=False)
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(params=TEMPLATES, scope="module")
def case(request) -> Case:
    return Case(request.param)


PLAIN = [
    chat("What is 2 + 2?", "Four.\n\nAsk on!"),
    chat("Hi", "Hello!", "谢谢你", "不客气 👋", "Wie spät ist es?", "12:30, nach der Uhr."),
    chat("1", "2", "3", "4"),
]
SPACED = [
    chat("\n ask ", " tell\n", "  ask\t", "\n\n tell  "),
    chat(" a", "b ", "\u3000c\n\n", "\td\r\n"),
]
SYSTEM = "Be brief, 请."


def with_system(case: Case, chats, system=SYSTEM) -> list[list[dict]]:
    """The chats, and the same chats after a system turn if the template takes one."""
    first = {"role": "system", "content": system}
    return chats + [[first, *messages] for messages in chats if case.template.system]


def test_plain_chats_are_learned_and_asked_for(case):
    for messages in with_system(case, PLAIN):
        encoded = encode_chat(case.tokenizer, messages)
        case.check(messages, encoded)
        asked = encode_chat(case.tokenizer, messages[:-1], add_generation_prompt=True)
        case.check_asked(messages, encoded, asked)


def test_ids_are_the_librarys(case):
    for messages in with_system(case, PLAIN):
        ids, _ = encode_chat(case.tokenizer, messages)
        assert case.without_own_ends(ids) == case.library(case.written(messages))
        asked, _ = encode_chat(case.tokenizer, messages[:-1], add_generation_prompt=True)
        asked_text = case.rendered(messages[:-1], asks=True)
        assert case.without_own_ends(asked) == case.library(asked_text)


def joins(case: Case, messages) -> bool:
    """Would the library put the end of a prompt, or of an answer that we end, into a longer token?

    A token that swallows blanks would take those before the answer.
    """
    text = case.written(messages)
    whole = case.library(text)
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        answer = case.template.learned.format(case.template.writes(message["content"]))
        if case.template.rstrip and answer != answer.lstrip():
            return True
        prompt = case.rendered(messages[:n], asks=True)
        ends = [prompt, prompt + answer] if case.template.inserts else [prompt]
        for end in map(case.library, filter(text.startswith, ends)):
            if whole[: len(end)] != end:
                return True
    return False


def test_blanks_around_contents_stand_as_the_template_writes_them(case):
    for messages in with_system(case, SPACED, "\n Be brief.\n "):
        encoded = encode_chat(case.tokenizer, messages)
        case.check(messages, encoded)
        if not joins(case, messages):
            library = case.library(case.written(messages))
            assert case.without_own_ends(encoded[0]) == library
        asked = encode_chat(case.tokenizer, messages[:-1], add_generation_prompt=True)
        case.check_asked(messages, encoded, asked)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if TEMPLATES[name].jinja])
def test_a_template_works_with_any_tokenizer(name):
    for case in (Case(name, kind) for kind in BACKENDS):
        for messages in with_system(case, PLAIN[1:2] + SPACED[:1]):
            encoded = encode_chat(case.tokenizer, messages)
            case.check(messages, encoded)
            asked = encode_chat(case.tokenizer, messages[:-1], add_generation_prompt=True)
            case.check_asked(messages, encoded, asked)
            if not joins(case, messages):
                library = case.library(case.written(messages))
                assert case.without_own_ends(encoded[0]) == library


def test_an_answer_ends_where_decoding_stops(case):
    ends = {case.template.end, case.template.eos}
    assert set(case.tokenizer.convert_tokens_to_ids(sorted(ends))) <= case.ends
    ids, flags = encode_chat(case.tokenizer, PLAIN[0])
    last = max(n for n, flag in enumerate(flags) if flag)
    assert case.tokenizer.convert_ids_to_tokens(ids[last]) == case.template.end


def test_the_system_turn_is_kept_or_refused(case):
    messages = chat("Hi", "Hello!", system=SYSTEM)
    if case.template.system:
        text = case.text(encode_chat(case.tokenizer, messages)[0])
        assert text.count(SYSTEM) == 1
        return
    with pytest.raises(UserError):
        encode_chat(case.tokenizer, messages)
    refused, taken = encode_chats(case.tokenizer, [messages, PLAIN[0]])
    assert isinstance(refused, BadRow)
    case.check(PLAIN[0], taken)


def counts(case: Case, ids) -> Counter:
    """How often each added token is among the ids; ends of our own do not count."""
    return Counter(n for n in case.without_own_ends(ids) if n in case.added)


def expected_counts(case: Case, messages) -> Counter:
    """How often the template itself writes each added token into a chat of this shape."""
    harmless = [{**message, "content": "x"} for message in messages]
    return counts(case, case.library(case.written(harmless)))


def safe(case: Case, messages) -> list[dict]:
    """The chat without the mark that a template looks for in an answer."""
    if not case.template.parses:
        return messages
    unmarked = [(m, m["content"].replace("</think>", "/think")) for m in messages]
    return [{**m, "content": text} if m["role"] == "assistant" else m for m, text in unmarked]


def test_contents_cannot_spell_an_added_token(case):
    added = [token.content for token in case.added.values()]
    spellings = [*added, "".join(added), " ".join(added), "\n".join(added)]
    spellings += ["<think>", "</think>", "[/INST]"]
    for text in spellings:
        chats = [
            chat(text, "b", text, "c"),
            chat("a", text, "b", text),
            chat(f" a{text}\n", f"{text} b", f"\n{text}", f"\n{text}\n"),
        ]
        for messages in with_system(case, chats, f"{text}!"):
            messages = safe(case, messages)
            encoded = encode_chat(case.tokenizer, messages)
            assert counts(case, encoded[0]) == expected_counts(case, messages)
            case.check(messages, encoded)


@pytest.mark.parametrize("text", ["x", "user", "assistant", "\u200b", "1"])
def test_contents_that_the_template_or_the_chat_repeats(case, text):
    for messages in with_system(case, [chat(*[text] * 6)], text):
        encoded = encode_chat(case.tokenizer, messages)
        assert counts(case, encoded[0]) == expected_counts(case, messages)
        case.check(messages, encoded)


PARTS = [
    *("\n", "\r\n", "  ", "\t", " lead", "trail ", "word", "e\u0301\u0323", "\x00\x07"),
    *("你好，世界。", "👩‍👩‍👧‍👦 👋🏽", "שלום", "مرحبا بالعالم", "\u200b", "\u200f", "\ufeff"),
    *("\ue0000\ue001", "\ue0011\ue001\ue002", "\ue002", "{}", "%s", "\\u0041", "}}'\"\\n"),
    *("{{ messages }} {% endfor %}", "{{", "<|im_end|>", "<|im_start|>assistant\n", "<|im_start|"),
    *("</s>", "<s>", "<unk>", "[INST]", "[/INST]", "<think>", "</think>", "### Response:\n"),
    *("<|endoftext|>", "<", "|im_end|>", "assistant", "user"),
]


def random_content(rng, parts) -> str:
    chosen = [*rng.choices(parts, k=rng.randint(0, 3)), rng.choice(["word", "4", "你", "?"])]
    rng.shuffle(chosen)
    return "".join(chosen)


def random_chats(case: Case) -> list[list[dict]]:
    """300 short chats, and two in which a turn has 100,000 characters."""
    rng = random.Random(1)
    parts = PARTS + [token.content for token in case.added.values()]
    chats = []
    for _ in range(300):
        contents = [random_content(rng, parts) for _ in range(2 * rng.randint(1, 3))]
        says = rng.random() < 0.4 and case.template.system
        chats.append(chat(*contents, system=random_content(rng, parts) if says else None))
    long = [("a" + "".join(rng.choices(parts, k=30_000)))[:99_999] + "z" for _ in range(2)]
    chats += [chat(long[0], "Short."), chat("Hi", "Ho", "Hi", long[1])]
    return [safe(case, messages) for messages in chats]


def test_random_chats(case):
    chats = random_chats(case)
    encoded = encode_chats(case.tokenizer, chats)
    asked = encode_chats(case.tokenizer, [c[:-1] for c in chats], add_generation_prompt=True)
    assert len(encoded) == len(asked) == len(chats) == 302
    shapes = {}
    for messages, one, its_asked in zip(chats, encoded, asked, strict=True):
        assert not isinstance(one, BadRow), messages
        case.check(messages, one)
        case.check_asked(messages, one, its_asked)
        shape = (messages[0]["role"], len(messages))
        expected = shapes[shape] = shapes.get(shape) or expected_counts(case, messages)
        assert counts(case, one[0]) == expected


def test_many_chats_at_once_are_the_same_as_one_by_one(case):
    chats = with_system(case, PLAIN + SPACED)
    one_by_one = [encode_chat(case.tokenizer, messages) for messages in chats]
    assert encode_chats(case.tokenizer, chats) == one_by_one
    assert encode_chats(case.tokenizer, []) == []


THINKING = [name for name, template in TEMPLATES.items() if template.parses]
THOUGHTFUL = "<think>\nTwo and two.\n</think>\n\nFour."
# What a model answers whose prompt holds the mark already.
WITHOUT_BEGINNING = [THOUGHTFUL.removeprefix("<think>\n"), "Two. </think> Four.", "Two</think>4"]


def learned_ids(encoded) -> list[int]:
    return [n for n, flag in zip(*encoded, strict=True) if flag]


@pytest.mark.parametrize("name", THINKING)
@pytest.mark.parametrize("answer", [THOUGHTFUL, *WITHOUT_BEGINNING])
def test_earlier_thoughts_stand_as_the_template_writes_them(name, answer):
    case = Case(name)
    messages = chat("2 + 2?", answer, "3 + 3?", "Six.")
    asked = encode_chat(case.tokenizer, messages[:-1], add_generation_prompt=True)
    assert asked[0] == case.library(case.rendered(messages[:-1], asks=True))
    assert not any(asked[1]), "the thoughts were not asked for in this way"
    encoded = encode_chat(case.tokenizer, messages)
    case.check_asked(messages, encoded, asked)
    assert encoded[0] == case.library(case.written(messages))
    assert case.spells(learned_ids(encoded), case.learned(messages)[-1])


@pytest.mark.parametrize("earlier", [[], ["1 + 1?", "Two."], ["1 + 1?", THOUGHTFUL]])
def test_the_last_answer_is_learned_with_its_thoughts(earlier):
    case = Case("qwen-3")
    messages = chat(*earlier, "2 + 2?", THOUGHTFUL)
    encoded = encode_chat(case.tokenizer, messages)
    assert encoded[0] == case.library(case.rendered(messages))
    assert case.spells(learned_ids(encoded), THOUGHTFUL + "<|im_end|>")


@pytest.mark.parametrize("name", ["minimind-3", "deepseek-r1"])
def test_thoughts_without_a_place_are_refused(name):
    """What asks for the answer has a thought of its own, or its beginning."""
    case, messages = Case(name), chat("2 + 2?", THOUGHTFUL)
    refused, taken = encode_chats(case.tokenizer, [messages, PLAIN[0]])
    assert isinstance(refused, BadRow)
    case.check(PLAIN[0], taken)
    with pytest.raises(UserError):
        encode_chat(case.tokenizer, messages)


@pytest.mark.parametrize("mark", ["<think>", "<|im_end|>", "<|im_start|>"])
@pytest.mark.parametrize("thought", ["Two {}.\n</think>\n\nFour.", "Two.\n</think>\n\nFour {}."])
def test_thoughts_cannot_spell_a_control_token(mark, thought):
    case = Case("qwen-3")
    messages = chat("2 + 2?", "<think>\n" + thought.format(mark))
    (encoded,) = encode_chats(case.tokenizer, [messages])
    if not isinstance(encoded, BadRow):
        assert counts(case, encoded[0]) == expected_counts(case, messages)
        assert case.spells(encoded[0], case.rendered(messages))
    asked, _ = encode_chat(case.tokenizer, messages + chat("So?"), add_generation_prompt=True)
    assert case.spells(asked, case.rendered(messages + chat("So?"), asks=True))
    harmless = case.rendered(chat("2 + 2?", "x", "So?"), asks=True)
    assert counts(case, asked) == counts(case, case.library(harmless))


def test_a_content_may_change_what_the_template_writes():
    case = Case("qwen-3")  # it takes this question for what a tool said
    messages = chat("<tool_response>4</tool_response>", "Four.")
    encoded, other = encode_chats(case.tokenizer, [messages, PLAIN[1]])
    case.check(PLAIN[1], other)
    if not isinstance(encoded, BadRow):
        assert encoded[0] == case.library(case.rendered(messages))
        assert case.spells(learned_ids(encoded), "Four.<|im_end|>")


BAD_CONTENTS = {
    "drops": "{{ '' if 'bad' in message.content else message.content }}",
    "rewrites": "{{ message.content | replace('bad', 'good') }}",
    "adds": "{{ message.content + ('!' if 'bad' in message.content else '') }}",
    "cuts": "{{ message.content[:12] }}",
    "refuses": "{{ raise_exception('no') if 'bad' in message.content else message.content }}",
}


def with_contents(written: str) -> Case:
    """Qwen 2, with contents written in another way."""
    case, old = Case("qwen-2"), "message.content + '<|im_end|>\\n' }}"
    tokenizer = case.tokenizer = copy.copy(case.tokenizer)
    assert tokenizer.chat_template.count(old) == 1
    new = f"'' }}}}{written}{{{{- '<|im_end|>\\n' }}}}"
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    return case


@pytest.mark.parametrize("fault", BAD_CONTENTS)
@pytest.mark.parametrize("place", [0, 1])
def test_a_chat_that_would_lose_contents_is_refused_alone(fault, place):
    case = with_contents(BAD_CONTENTS[fault])
    contents = ["How so?", "So so."]
    contents[place] = "this is a bad one"
    first, refused, last = encode_chats(case.tokenizer, [PLAIN[2], chat(*contents), PLAIN[2]])
    assert isinstance(refused, BadRow)
    assert first == last
    case.check(PLAIN[2], first)


@pytest.mark.parametrize("written", ["{{ '' }}", "{{ raise_exception('no') }}", "{{ nobody.x }}"])
def test_a_template_that_suits_no_chat_is_an_error(written):
    case = with_contents(written)
    with pytest.raises(UserError):
        encode_chats(case.tokenizer, PLAIN)


def test_notes_tell_what_a_template_makes_of_training(case):
    template = case.template
    notes = chat_notes(case.tokenizer)
    assert all(isinstance(note, str) and note for note in notes)
    if not template.moves:
        assert len(notes) == template.inserts + template.forces + (not template.earlier)
