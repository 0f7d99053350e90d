"""The only place where chats become ids and learned flags: for training, chatting and serving.

What a template writes around the contents is known from template.py; here a chat is rendered, cut
at the template's control tokens and before each answer, and tokenised in between. So no content can
become a control token, and labels are right by construction.
"""

import contextlib
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from dataset.rows import BadRow
from dataset.template import ONE_TURN, Plan, Span, Template, encode_texts, template_of

ENCODING = 2  # raise it when chats in other makers' templates get other ids
LATER = "the template writes earlier ones differently"
Encoded = tuple[list[int], list[bool]]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict], add_generation_prompt=False
) -> Encoded:
    """Ids of a chat in the tokenizer's own template, and a flag for each id: is it learned?

    Learned is each answer, from where the rendered generation prompt for it ends to the first
    control token after it, or to an eos that is added where none follows; not an answer with
    ``"learned": False``, nor an earlier one that the template shows otherwise than it was asked
    for. The ids of a chat begin with those of the prompt for its last answer. Raises ``UserError``
    if the template refuses the chat or loses a part of it.
    """
    (encoded,) = encode_chats(tokenizer, [messages], add_generation_prompt)
    if isinstance(encoded, BadRow):
        raise UserError(f"{encoded}; change that message or use another template")
    return encoded


def encode_chats(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Sequence[dict]], add_generation_prompt=False
) -> list[Encoded | BadRow]:
    """``encode_chat`` of each chat, or why it cannot be encoded.

    One call for many, so that the tokenizer can use every core. Raises ``UserError`` for a template
    that cannot write any chat.
    """
    template = _usable(tokenizer)
    rendered = template.render(chats, add_generation_prompt)
    written = [
        _written(template, chat, text, add_generation_prompt)
        for chat, text in zip(chats, rendered, strict=True)
    ]
    ids_of: tuple[dict, dict] = {}, {}  # of each text at the beginning of a sentence, and inside
    for spans, texts in (each for each in written if not isinstance(each, BadRow)):
        for span, text in zip(spans, texts, strict=True):
            if span.ids is None:
                ids_of[span.inside][text] = None
    for known, backend in zip(ids_of, template.backends, strict=True):
        known.update(zip(known, encode_texts(backend, list(known)), strict=True))
    encoded = []
    for chat, each in zip(chats, written, strict=True):
        if isinstance(each, BadRow):
            encoded.append(each)
            continue
        off = {None, *(n for n, turn in enumerate(chat) if not turn.get("learned", True))}
        ids, learned = [], []
        for span, text in zip(*each, strict=True):
            new = ids_of[span.inside][text] if span.ids is None else span.ids
            ids += new
            learned += [span.answer not in off] * len(new)
        encoded.append((ids, learned))
    return encoded


def _written(
    template: Template, messages: Sequence[dict], rendered: str | BadRow, prompt: bool
) -> tuple[list[Span], list[str]] | BadRow:
    """The spans of a chat, and their texts with its contents in them."""
    if isinstance(rendered, BadRow):
        return rendered
    roles, contents = template.contents(messages)
    try:
        plan = template.plan(roles, prompt)
    except BadRow as bad:
        return bad
    if not plan.is_rendered:
        ends = (text + plan.closing for text in _variants(contents[-1]))
        end = next(filter(rendered.endswith, ends), rendered)
        (asked,) = template.render([messages[:-1]], True)
        rendered = f"{asked}{template.lead()}{end}"
    if (contents := _aligned(rendered, plan, contents)) is None:
        return BadRow("the chat template rewrites contents, perhaps for the marks in them")
    texts = [span.text.format(*contents) for span in plan.spans]
    for n in plan.trimmed:
        text = texts[n].lstrip() if plan.spans[n].left else texts[n]
        texts[n] = text.rstrip() if plan.spans[n].right else text
    return plan.spans, texts


def _aligned(rendered: str, plan: Plan, contents: Sequence[str]) -> list[str] | None:
    """The contents as ``rendered`` has them, each whole or trimmed; None if one is neither."""
    written, place = list(contents), len(plan.pieces[0])
    if not rendered.startswith(plan.pieces[0]):
        return None
    for nth, number in enumerate(plan.order, 1):
        for variant in _variants(contents[number]):
            end = place + len(variant) + len(plan.pieces[nth])
            is_last = nth == len(plan.order)
            fits = rendered.startswith(variant + plan.pieces[nth], place)
            if fits and (end == len(rendered) or not is_last):
                written[number], place = variant, end
                break
        else:
            return None
    return written


def _variants(content: str) -> Iterator[str]:
    """``content`` as templates may write it, the least changed first."""
    yield content
    for blanks in ("\n", None):
        yield from (content.strip(blanks), content.lstrip(blanks), content.rstrip(blanks))


def _usable(tokenizer: PreTrainedTokenizerBase) -> Template:
    """The tokenizer's template. Raises ``UserError`` if it cannot write a question and answer."""
    template = template_of(tokenizer)
    try:
        template.plan(ONE_TURN, False)
    except BadRow as bad:
        raise UserError(f"{bad}; use another template") from bad
    return template


def chat_notes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What is worth knowing of a template before training: a sentence each, mostly none."""
    template, notes = _usable(tokenizer), []
    if template.adds_end():
        notes.append(f"no control token ends an answer: {tokenizer.eos_token!r} is taught there")
    asked = template.hollow(ONE_TURN[:1], True)
    if not template.hollow(ONE_TURN, False).startswith(asked):
        notes.append(f"answers follow the prompt for them, which ends in {asked[-10:]!r}")
    try:
        spans = template.plan(ONE_TURN * 2, False).spans
    except BadRow as bad:
        return [*notes, f"only chats of one question are usable: {bad}"]
    if all(span.answer != 1 for span in spans):
        notes.append(f"only the last answer of a chat is learned: {LATER}")
        return notes
    with contextlib.suppress(BadRow):
        spans = template.plan(("system", *ONE_TURN * 2), False).spans
        if all(span.answer != 2 for span in spans):
            notes.append(f"of a chat with a system turn, only the last answer is learned: {LATER}")
    return notes


def ends_of_answer(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that end an answer: the end of text and whatever end of turn training teaches."""
    template, ends = template_of(tokenizer), {tokenizer.eos_token_id}
    for roles in (ONE_TURN, ONE_TURN * 2):
        with contextlib.suppress(BadRow):
            last = {span.answer: span.ids for span in template.plan(roles, False).spans}
            ends |= {last[answer][-1] for answer in last if answer is not None}
    return ends


def around_answer(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the template writes around an answer: after the prompt for it, and before its end."""
    template = _usable(tokenizer)
    texts = [span.text for span in template.plan(ONE_TURN, False).spans if span.answer]
    return template.lead(), "".join(texts).partition("{1}")[2]


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Encoded]:
    """Pretraining documents, each as bos (context, not learned), the text, eos."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = encode_texts(template_of(tokenizer).backends[0], texts)
    return [([bos, *ids, eos], [False, *[True] * len(ids), True]) for ids in encoded]
