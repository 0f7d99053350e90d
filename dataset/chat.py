"""The only place where chats become ids and learned flags: for training, chatting and serving."""

from collections.abc import Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from dataset.tokenizer import control_ids

Encoded = tuple[list[int], list[bool]]
PLACEHOLDER = "\ue000"  # of private use: no template contains it, and trimming leaves it alone


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict], add_generation_prompt=False
) -> Encoded:
    """Ids of a chat in the tokenizer's own template, and a flag for each id: is it learned?

    Template pieces and contents are tokenised apart and joined, so that labels are right by
    construction and no content can spell a control token. The assistant's texts are learned, each
    up to and including the first control token after it. The decoded ids equal the rendered
    template. Raises ``UserError`` for a template that changes contents beyond trimming them all.
    """
    return encode_chats(tokenizer, [messages], add_generation_prompt)[0]


def encode_chats(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Sequence[dict]], add_generation_prompt=False
) -> list[Encoded]:
    """``encode_chat`` of each chat, in one call so that the tokenizer can use every core."""
    pieces, contents = _cut_at_contents(tokenizer, chats, add_generation_prompt)
    distinct = list({piece for cut in pieces for piece in cut})  # few, however many chats there are
    piece_ids = _encode(tokenizer, distinct, split_special_tokens=False)
    ids_of = dict(zip(distinct, piece_ids, strict=True))
    all_content_ids = iter(_encode(tokenizer, contents, split_special_tokens=True))
    control = control_ids(tokenizer)
    encoded = []
    for messages, (before, *after_each) in zip(chats, pieces, strict=True):
        ids = list(ids_of[before])
        learned = [False] * len(ids)
        for message, piece in zip(messages, after_each, strict=True):
            content_ids, after = next(all_content_ids), ids_of[piece]
            # Also learned after an answer: the ids up to and including the first control token.
            n_closing = next((n for n, token in enumerate(after, 1) if token in control), 0)
            ids += content_ids + after
            learned += [message["role"] == "assistant"] * (len(content_ids) + n_closing)
            learned += [False] * (len(after) - n_closing)
        encoded.append((ids, learned))
    return encoded


def _cut_at_contents(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Sequence[dict]], add_generation_prompt: bool
) -> tuple[list[list[str]], list[str]]:
    """The rendered template of each chat, cut at its contents, and the contents of all chats.

    A chat has one string before each content and one after the last. The contents are given as the
    template writes them: unchanged or trimmed.
    """
    settings = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    render = partial(tokenizer.apply_chat_template, **settings)
    known: dict[str, list[str]] = {}  # chats that differ in their contents alone share their pieces
    all_pieces, all_contents = [], []
    for messages in chats:
        hollow = [{**message, "content": PLACEHOLDER} for message in messages]
        key, rendered = repr(hollow), render(messages)
        pieces = known[key] = known.get(key) or render(hollow).split(PLACEHOLDER)
        contents = [message["content"] for message in messages]
        trimmed = [content.strip() for content in contents]
        for written in (contents, trimmed):  # which of the two does this template write?
            filled = pieces[0] + "".join(a + b for a, b in zip(written, pieces[1:], strict=False))
            if len(pieces) == len(written) + 1 and filled == rendered:
                break
        else:
            reason = "drops, repeats or rewrites message contents"
            raise UserError(f"the tokenizer's chat template {reason}; use another one")
        all_pieces.append(pieces)
        all_contents += written
    return all_pieces, all_contents


def ends_of_answer(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that end an answer: the end of text and the end of turn that training teaches."""
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    ids, learned = encode_chat(tokenizer, turns)
    last = max(n for n, is_learned in enumerate(learned) if is_learned)
    return {tokenizer.eos_token_id, ids[last]} & control_ids(tokenizer)


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Encoded]:
    """Pretraining documents, each as bos (context, not learned), the text, eos."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = _encode(tokenizer, texts, split_special_tokens=True)
    return [([bos, *ids, eos], [False, *[True] * len(ids), True]) for ids in encoded]


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], split_special_tokens: bool
) -> list[list[int]]:
    """``tokenizer(texts, ...).input_ids`` in two thirds of the time: without offsets and masks."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = split_special_tokens  # True: as ordinary text
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
