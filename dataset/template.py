"""What a chat template writes around the contents, and what its tokenizer makes of it."""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import count
from typing import Any, NamedTuple

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from core.errors import reason_of
from dataset.rows import BadRow

# Some prompts already open the thought, so that an answer only closes it.
THOUGHT = re.compile(r"(\s*(?:<think>\s*)?)(.*\S|)(\s*</think>\s*)(.*)", re.DOTALL)
# Of private use: no template contains them, and trimming leaves them alone.
OPEN, CLOSE = "\ue000", "\ue001"  # around the number of a content
ANSWER, ADDED = "\ue002", "\ue003"  # where an answer begins; an eos that the template lacks
PLACEHOLDER = re.compile(f"{OPEN}([0-9]+){CLOSE}")
BLANKS = " \t\r\n\u2581"
AT_ONCE = 64  # chats rendered in one call, which is quicker, and still little garbage to collect
ONE_TURN = ("user", "assistant")

# Of a chat's messages. An assistant with a thought has what stands before and behind that instead,
# around an ``OPEN``, and two contents: thought and answer.
Roles = tuple[str, ...]


class Span(NamedTuple):
    """Ids that the template alone decides, or the text with a content between two of its tokens."""

    ids: list[int] | None
    text: str  # a format: "{0}" stands for the first content
    inside: bool  # a sentence, so that no space is put before it
    answer: int | None  # the message whose answer it is to be learned with
    left: bool = False  # blanks that the token before it swallows
    right: bool = False  # and the token after it


class Plan(NamedTuple):
    """How the chats of one sequence of roles are written."""

    pieces: list[str]  # the template's text around the contents, one more than there are
    order: list[int]  # the numbers of the contents as they are written
    spans: list[Span]
    trimmed: list[int]  # the numbers of the spans that lose blanks
    closing: str  # what follows the last answer
    is_rendered: bool  # as a whole, not as the prompt for the last answer with that answer


class Template:
    """A tokenizer and its chat template, taken apart.

    ``backends`` make ids of the text between control tokens: at the beginning of a sentence, and
    inside one. ``tokens``: what the tokenizer says of its control tokens, special or only added
    ones such as <think>.
    ``joins``: text behind a token is inside a sentence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.plan, self.hollow = (lru_cache(1 << 12)(of) for of in (self._plan, self._hollow))
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        added = {token["content"]: token for token in spec["added_tokens"]}
        # Some vocabularies add runs of blanks, which are text.
        control = sorted((text for text in added if text.strip(BLANKS)), key=len, reverse=True)
        spec["added_tokens"] = [token for text, token in added.items() if text not in control]
        spec["truncation"] = spec["padding"] = spec["post_processor"] = None
        if spec["model"]["type"] == "Unigram":  # it would find control tokens in a text
            for entry in spec["model"]["vocab"]:
                entry[0] = OPEN * (entry[0] in control) + entry[0]
        start = Tokenizer.from_str(json.dumps(spec))
        prefixes = set(_without_prefix(spec))
        self.backends = start, Tokenizer.from_str(json.dumps(spec)) if prefixes else start
        self.joins = "first" in prefixes
        self.tokens = {text: added[text] for text in control}
        self.tokens[ADDED] = {"id": tokenizer.eos_token_id, "lstrip": False, "rstrip": False}
        self._cut = re.compile(f"({'|'.join(map(re.escape, [ANSWER, *self.tokens]))})")
        self._no_end = {tokenizer.bos_token} - {tokenizer.eos_token}

    def render(self, chats: Sequence[Sequence[dict]], prompt: bool) -> list[str | BadRow]:
        """Each chat as text, with the generation ``prompt`` or without, or why it is refused."""
        settings = {"tokenize": False, "add_generation_prompt": prompt}
        rendered = []
        for start in range(0, len(chats), AT_ONCE):
            some = list(chats[start : start + AT_ONCE])
            try:
                rendered += self.tokenizer.apply_chat_template(some, **settings)
            except (TemplateError, TypeError, ValueError) as error:
                if len(some) > 1:
                    rendered += [self.render([chat], prompt)[0] for chat in some]
                else:
                    reason = f"the chat template refuses this chat ({reason_of(error)})"
                    rendered.append(BadRow(reason))
        return rendered

    def contents(self, messages: Sequence[dict]) -> tuple[Roles, list[str]]:
        """The roles of a chat, and its contents: thoughts apart if the template reads them."""
        roles, contents = [], []
        for turn in messages:
            role, parts = turn["role"], [turn["content"]]
            if role == "assistant" and "</think>" in parts[0] and self.reads_thoughts:
                before, thought, behind, answer = THOUGHT.fullmatch(parts[0]).groups()
                role, parts = before + OPEN + behind, [thought, answer]
            roles.append(role)
            contents += parts
        return tuple(roles), contents

    @cached_property
    def reads_thoughts(self) -> bool:
        """Whether the template writes the thought of an answer otherwise than it is given."""
        thoughtful = f"<think>\n{OPEN}\n</think>\n\n"
        given = thoughtful.replace(OPEN, placeholder(1)) + placeholder(2)
        for more in (), ONE_TURN:  # as the last answer, and as an earlier one
            with contextlib.suppress(BadRow):
                before, _, _ = self.hollow((*ONE_TURN, *more), False).partition(placeholder(1))
                shown = self.hollow(("user", thoughtful, *more), False)
                if not shown.startswith(before + given):
                    return True
        return False

    def _hollow(self, roles: Roles, prompt: bool) -> str:
        """What ``render`` gives with placeholders for the contents."""
        turns, slots = [], map(placeholder, count())
        for role in roles:
            content = next(slots)
            if OPEN in role:
                role, content = "assistant", role.replace(OPEN, content) + next(slots)
            turns.append({"role": role, "content": content})
        (text,) = self.render([turns], prompt)
        if isinstance(text, BadRow):
            raise text
        return text

    def _plan(self, roles: Roles, prompt: bool) -> Plan:
        """The plan for these roles. Raises ``BadRow`` where a message is lost."""
        text, closing = rendered, _ = self.hollow(roles, prompt), ""
        if is_answer(roles[-1]) and not prompt:
            text, closing = self._whole(roles)
        cut = PLACEHOLDER.split(text)
        order = list(map(int, cut[1::2]))
        for number, role in enumerate(roles, 1):
            last = count_of(roles[:number]) - 1
            # An earlier answer may lose its thought.
            needed = {last, last - (OPEN in role and number == len(roles))}
            if any(order.count(slot) != 1 for slot in needed):
                what = "leaves out" if needed - set(order) else "repeats"
                part = "the thought" if last in order else "the text"
                raise BadRow(f"the chat template {what} {part} of message {number} where it asks")
        spans = self._spans(text, self._starts(roles, text))
        trimmed = [n for n, span in enumerate(spans) if span.left or span.right]
        return Plan(cut[::2], order, spans, trimmed, closing, text == rendered)

    def _whole(self, roles: Roles) -> tuple[str, str]:
        """The hollow prompt for the last answer with that answer, and what follows it."""
        prompt, shown = self.hollow(roles[:-1], True), self.hollow(roles, False)
        last = placeholder(count_of(roles) - 1)
        before, found, closing = shown.rpartition(last)
        if not found or PLACEHOLDER.search(closing):
            raise BadRow("the chat template does not write the last answer last")
        if not before.startswith(prompt):
            before = prompt + ("" if roles == ONE_TURN else self.lead())
        return before + last + closing, closing

    def lead(self) -> str:
        """What the template writes between the prompt for a first answer and that answer."""
        prompt, whole = self.hollow(ONE_TURN[:1], True), self._whole(ONE_TURN)[0]
        return whole[len(prompt) :].partition(placeholder(1))[0]

    def adds_end(self) -> bool:
        """Whether an eos is added after an answer, because the template writes no end."""
        return ADDED in self._ended(self._whole(ONE_TURN)[0], 1)

    def _ended(self, text: str, last: int) -> str:
        """Hollow ``text`` with an eos after its content ``last`` if no control token follows it."""
        before, content, behind = text.partition(placeholder(last))
        between, *token = self._cut.split(behind, maxsplit=1)[:2]
        ends = self.tokens.keys() & set(token) - self._no_end and OPEN not in between
        return before + content + ADDED * (not ends) + behind

    def _starts(self, roles: Roles, text: str) -> dict[int, tuple[int, int]]:
        """Where learned answers begin in hollow ``text``: place -> its message, its last content.

        An answer is learned if it follows its own prompt there as it did when it was the last.
        """
        starts = {}
        for number in (n for n, role in enumerate(roles) if is_answer(role)):
            whole, closing = self._whole(roles[: number + 1])
            if text.startswith(whole[: len(whole) - len(closing)]):
                last = count_of(roles[: number + 1]) - 1
                starts[len(self.hollow(roles[:number], True))] = number, last
        return starts

    def _spans(self, text: str, starts: dict[int, tuple[int, int]]) -> list[Span]:
        """Cut hollow ``text`` at control tokens and where answers begin."""
        for place in sorted(starts, reverse=True):
            text = text[:place] + ANSWER + self._ended(text[place:], starts[place][1])
        spans, answers = [], iter(sorted(starts.items()))
        answer = last = None  # the message that is being learned, and its content before its end
        trim, inside, cut = False, False, self._cut.split(text)
        for nth, piece in enumerate(cut):
            if nth % 2 and piece == ANSWER:
                _, (answer, last) = next(answers)
            elif nth % 2:
                _append(spans, Span([self.tokens[piece]["id"]], "", False, answer))
                trim, inside = self.tokens[piece]["rstrip"], self.joins or piece == ADDED
                answer = None if last is None else answer
            else:
                following = self.tokens.get("".join(cut[nth + 1 : nth + 2]))
                right = following is not None and following["lstrip"]
                span = self._text_span(piece, inside, answer, trim, right)
                if span.text or span.ids:
                    _append(spans, span)
                    trim, inside = False, True
                if last is not None and placeholder(last) in piece:
                    last = None
        return spans

    def _text_span(
        self, text: str, inside: bool, answer: int | None, left: bool, right: bool
    ) -> Span:
        """The span of a hollow text, which may turn out empty."""
        if OPEN in text:
            text = PLACEHOLDER.sub(r"{\1}", text.replace("{", "{{").replace("}", "}}"))
            return Span(None, text, inside, answer, left, right)
        text = text.lstrip() if left else text
        text = text.rstrip() if right else text
        return Span(*encode_texts(self.backends[inside], [text]), "", inside, answer)


def _append(spans: list[Span], span: Span) -> None:
    """Add a span; the template's own ids join those before them."""
    if spans and spans[-1].ids and span.ids and spans[-1].answer == span.answer:
        spans[-1].ids.extend(span.ids)
    else:
        spans.append(span)


def encode_texts(backend: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts, in two thirds of a tokenizer call's time: without offsets and masks."""
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def placeholder(number: int) -> str:
    return f"{OPEN}{number}{CLOSE}"


def count_of(roles: Roles) -> int:
    """How many contents messages with these roles have."""
    return len(roles) + sum(OPEN in role for role in roles)


def is_answer(role: str) -> bool:
    return role == "assistant" or OPEN in role


def template_of(tokenizer: PreTrainedTokenizerBase) -> Template:
    """The ``Template`` of a tokenizer, kept for as long as it has this chat template."""
    return _template_of(tokenizer, tokenizer.chat_template)


@lru_cache(8)
def _template_of(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> Template:
    return Template(tokenizer)


def _without_prefix(node: Any) -> Iterator[str]:
    """Take from a tokenizer's parts whatever puts a space before a text; name what there was."""
    if isinstance(node, list):
        for part in node:
            yield from _without_prefix(part)
    if not isinstance(node, dict):
        return
    if node.get("type") == "Prepend" and node["prepend"]:
        yield "always"
        node["prepend"] = ""
    if node.get("type") == "Metaspace" and node.get("prepend_scheme") != "never":
        yield node.get("prepend_scheme", "always")
        node["prepend_scheme"] = "never"
    if node.get("type") == "ByteLevel" and node.get("add_prefix_space"):
        yield "always"
        node["add_prefix_space"] = False
    for key in ("normalizer", "normalizers", "pre_tokenizer", "pretokenizers"):
        yield from _without_prefix(node.get(key))
