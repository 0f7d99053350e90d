"""A chat becomes token ids and learned flags: the only place where that happens, for training, chatting and serving."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from core.errors import UserError

Encoded = tuple[list[int], list[bool]]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict], add_generation_prompt: bool = False
) -> Encoded:
    """Ids of a chat in the tokenizer's own template, and a flag for each id: is it learned?

    The template is rendered with a placeholder for each content; template pieces and contents are tokenised apart and
    joined. So labels are right by construction, and a content can never spell a control token. Learned are the
    assistant's texts, each with its end of turn (up to the first control token after the text). The decoded ids equal
    the rendered template. Raises ``UserError`` if the template rewrites contents.
    """
    contents = [message["content"] for message in messages]
    pieces = _template_pieces(tokenizer, messages, add_generation_prompt)
    control = set(tokenizer.all_special_ids)
    ids = tokenizer.encode(pieces[0], add_special_tokens=False)
    learned = [False] * len(ids)
    for message, content, piece in zip(messages, contents, pieces[1:], strict=True):
        is_answer = message["role"] == "assistant"
        content_ids = tokenizer.encode(content, add_special_tokens=False, split_special_tokens=True)
        piece_ids = tokenizer.encode(piece, add_special_tokens=False)
        end_of_turn = next((n for n, token in enumerate(piece_ids, 1) if token in control), 0)
        ids += content_ids + piece_ids
        learned += [is_answer] * len(content_ids)
        learned += [is_answer and n < end_of_turn for n in range(len(piece_ids))]
    return ids, learned


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """A pretraining document: bos (a context, not learned), the text, eos."""
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], [False, *[True] * len(ids), True]


def _template_pieces(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict], add_generation_prompt: bool
) -> list[str]:
    """The rendered template cut at the contents: one string before each content, one after the last."""

    def render(contents: Sequence[str]) -> str:
        filled = [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]
        return tokenizer.apply_chat_template(filled, tokenize=False, add_generation_prompt=add_generation_prompt)

    contents = [message["content"] for message in messages]
    # Words of a private-use character that the chat does not contain; trimming templates leave them alone.
    mark = next(chr(code) for code in range(0xE000, 0xF8FF) if not any(chr(code) in text for text in contents))
    pieces = re.split(f"{mark}\\d+{mark}", render([f"{mark}{n}{mark}" for n in range(len(contents))]))
    joined = pieces[0] + "".join(text + piece for text, piece in zip(contents, pieces[1:], strict=False))
    if len(pieces) != len(contents) + 1 or joined != render(contents):
        raise UserError("the tokenizer's chat template drops, repeats or rewrites message contents")
    return pieces
