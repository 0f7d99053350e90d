"""A chat becomes token ids and learned flags: the only place where that happens, for training,
chatting and serving.
"""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from dataset.tokenizer import control_ids

Encoded = tuple[list[int], list[bool]]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict],
    add_generation_prompt: bool = False,
) -> Encoded:
    """Ids of a chat in the tokenizer's own template, and a flag for each id: is it learned?

    The template is rendered with a placeholder for each content; template pieces and contents are
    tokenised apart and joined. So labels are right by construction, and a content can never spell a
    control token. Learned are the assistant's texts, each with its end of turn (up to the first
    control token after the text). The decoded ids equal the rendered template. Raises ``UserError``
    if the template rewrites contents, other than by trimming them.
    """
    return encode_chats(tokenizer, [messages], add_generation_prompt)[0]


def encode_chats(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Sequence[dict]],
    add_generation_prompt: bool = False,
) -> list[Encoded]:
    """``encode_chat`` of each chat; the tokenizer spreads many texts over the processor's cores."""
    pieces, chats = _template_pieces(tokenizer, chats, add_generation_prompt)
    kinds = list(
        {piece for chat in pieces for piece in chat}
    )  # many chats, few kinds of template pieces
    ids_of = dict(zip(kinds, _encode(tokenizer, kinds, split_special_tokens=False), strict=True))
    contents = [message["content"] for messages in chats for message in messages]
    content_ids = iter(_encode(tokenizer, contents, split_special_tokens=True))
    control = control_ids(tokenizer)
    return [
        _join(messages, [ids_of[piece] for piece in chat], content_ids, control)
        for messages, chat in zip(chats, pieces, strict=True)
    ]


def ends_of_answer(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that end an answer: the end of text, and what ``encode_chat`` teaches as the end of
    turn.
    """
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    ids, learned = encode_chat(tokenizer, turns)
    last = max(n for n, is_learned in enumerate(learned) if is_learned)
    return {tokenizer.eos_token_id, ids[last]} & control_ids(tokenizer)


def _join(
    messages: Sequence[dict],
    pieces: list[list[int]],
    content_ids: Iterator[list[int]],
    control: set[int],
) -> Encoded:
    ids = list(pieces[0])
    learned = [False] * len(ids)
    for message, piece in zip(messages, pieces[1:], strict=True):
        is_answer = message["role"] == "assistant"
        content = next(content_ids)
        end_of_turn = next((n for n, token in enumerate(piece, 1) if token in control), 0)
        ids += content + piece
        learned += [is_answer] * len(content)
        learned += [is_answer and n < end_of_turn for n in range(len(piece))]
    return ids, learned


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Encoded]:
    """Pretraining documents, each as bos (a context, not learned), the text, eos."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = _encode(tokenizer, texts, split_special_tokens=True)
    return [([bos, *ids, eos], [False, *[True] * len(ids), True]) for ids in encoded]


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], split_special_tokens: bool
) -> list[list[int]]:
    """What ``tokenizer(texts, add_special_tokens=False, ...)`` gives, without the offsets and masks
    that nobody reads.

    They would take a third of the time.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = split_special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _template_pieces(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Sequence[dict]], add_generation_prompt: bool
) -> tuple[list[list[str]], list[Sequence[dict]]]:
    """Each chat's rendered template cut at the contents: one string before each content, one after
    the last; and the chats with their contents as the template writes them: as they are, or
    trimmed.
    """

    def render(messages: Sequence[dict]) -> str:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    rendered: dict[str, list[str]] = {}  # pieces of chats that differ in their contents alone
    found, written = [], []
    for messages in chats:
        # A placeholder is a private-use character, which no template contains; trimming templates
        # leave it alone.
        empty = [{**message, "content": "\ue000"} for message in messages]
        if (shape := repr(empty)) not in rendered:
            rendered[shape] = render(empty).split("\ue000")
        pieces, text = rendered[shape], render(messages)
        if _filled(pieces, messages) != text:
            messages = [{**message, "content": message["content"].strip()} for message in messages]
            if _filled(pieces, messages) != text:
                raise UserError(
                    "the tokenizer's chat template drops, repeats or rewrites message contents"
                )
        found.append(pieces)
        written.append(messages)
    return found, written


def _filled(pieces: list[str], messages: Sequence[dict]) -> str | None:
    """The rendered chat of which these are the pieces; None when they are of another number."""
    if len(pieces) != len(messages) + 1:
        return None
    return pieces[0] + "".join(
        message["content"] + piece for message, piece in zip(messages, pieces[1:], strict=True)
    )
