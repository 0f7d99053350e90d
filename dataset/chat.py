"""A chat becomes token ids and learned flags: the only place where that happens, for training, chatting and serving."""

from collections.abc import Iterator, Sequence

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
    return encode_chats(tokenizer, [messages], add_generation_prompt)[0]


def encode_chats(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Sequence[dict]], add_generation_prompt: bool = False
) -> list[Encoded]:
    """``encode_chat`` of each chat; the tokenizer spreads many texts over the processor's cores."""
    pieces = [_template_pieces(tokenizer, messages, add_generation_prompt) for messages in chats]
    piece_ids = iter(_encode(tokenizer, [piece for chat in pieces for piece in chat], split_special_tokens=False))
    contents = [message["content"] for messages in chats for message in messages]
    content_ids = iter(_encode(tokenizer, contents, split_special_tokens=True))
    control = set(tokenizer.all_special_ids)
    return [_join(messages, piece_ids, content_ids, control) for messages in chats]


def _join(
    messages: Sequence[dict], piece_ids: Iterator[list[int]], content_ids: Iterator[list[int]], control: set[int]
) -> Encoded:
    ids = list(next(piece_ids))
    learned = [False] * len(ids)
    for message in messages:
        is_answer = message["role"] == "assistant"
        content, piece = next(content_ids), next(piece_ids)
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


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], split_special_tokens: bool) -> list[list[int]]:
    settings = {"add_special_tokens": False, "return_attention_mask": False}
    return tokenizer(list(texts), split_special_tokens=split_special_tokens, **settings).input_ids if texts else []


def _template_pieces(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict], add_generation_prompt: bool
) -> list[str]:
    """The rendered template cut at the contents: one string before each content, one after the last."""

    def render(contents: Sequence[str]) -> str:
        filled = [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]
        return tokenizer.apply_chat_template(filled, tokenize=False, add_generation_prompt=add_generation_prompt)

    contents = [message["content"] for message in messages]
    # A placeholder is a private-use character, which no template contains; trimming templates leave it alone.
    pieces = render(["\ue000"] * len(contents)).split("\ue000")
    joined = pieces[0] + "".join(text + piece for text, piece in zip(contents, pieces[1:], strict=False))
    if len(pieces) != len(contents) + 1 or joined != render(contents):
        raise UserError("the tokenizer's chat template drops, repeats or rewrites message contents")
    return pieces
