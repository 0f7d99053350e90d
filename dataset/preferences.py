"""Pairs of answers to one question, of which the first is preferred: rows, ids and batches.

    chats      {"chosen": [...], "rejected": [...]}, which begin alike
    prompt     {"prompt": "..." or [...], "chosen": "..." or [...], "rejected": ...}; for prompt,
               any other key of a question in a chat row
    messages   {"conversations": [...], "chosen": {"from": "gpt", "value": "..."}, "rejected": ...}

Turns, roles and system prompts are written as in chat rows. Only the last answers are compared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dataset.batches import Batch, ChatSamples, PretrainDataset, micro_batches
from dataset.cache import Kind
from dataset.chat import Encoded, encode_chats
from dataset.rows import (
    CHATS,
    QUESTIONS,
    ROLES,
    BadRow,
    are_messages,
    clean_chat,
    is_blank,
    style_of,
)

SIDES = "chosen", "rejected"
ANSWERERS = {name for name, role in ROLES.items() if role == "assistant"}
Chat = list[dict]


def clean_pair(row: dict) -> dict:
    """``{"pair": {"chosen": [{"role", "content"}, ...], "rejected": [...]}}``.

    They differ in their last answers alone. Raises ``BadRow``.
    """
    style_of(row, "preference")
    found = {side: _side(row, side) for side in SIDES}
    chosen, rejected = found.values()
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("chosen and rejected differ in more than their last answers")
    if chosen[-1]["content"] == rejected[-1]["content"]:
        raise BadRow("chosen and rejected are the same answer, so neither is preferred")
    return {"pair": found}


def _side(row: dict, side: str) -> Chat:
    """The whole chat of one side."""
    value, rest = row[side], {key: row[key] for key in row if key not in SIDES}
    turns = value if are_messages(value) else [value]
    turns = [t if isinstance(t, dict) else {"role": "assistant", "content": t} for t in turns]
    system = {key: rest[key] for key in ("system", "system_prompt") if key in rest}
    asks = [key for key in (*CHATS, *QUESTIONS) if not is_blank(rest.get(key))]
    asks = [key for key in asks if not _ends_in_answer(rest[key])]
    try:
        before = _conversation(_answered(rest, asks))[:-1] if asks else []
        if _is_answer(turns[0]):
            if not asks:
                raise BadRow("an answer without its question")
            return _conversation({"conversations": [*before, *turns]})
        chat = _conversation({"conversations": turns, **system})
        begun = chat[:-1] if before[:1] == chat[:1] else chat[_has_system(chat) : -1]
        if asks and begun != before:
            raise BadRow(f"it does not begin as {asks[0]} does")
        return chat
    except BadRow as bad:
        raise BadRow(f"{side}: {bad}") from bad


def _is_answer(turn: dict) -> bool:
    return str(turn.get("role", turn.get("from"))).lower() in ANSWERERS


def _ends_in_answer(value: object) -> bool:
    """Whether this is a whole chat, as some sets have it beside the pair."""
    return are_messages(value) and _is_answer(value[-1])


def _has_system(chat: Chat) -> bool:
    return chat[0]["role"] == "system"


def _answered(rest: dict, asks: list[str]) -> dict:
    """A chat row of the question, with some answer."""
    answer, key = {"role": "assistant", "content": "?"}, asks[0]
    rest = {k: v for k, v in rest.items() if not _ends_in_answer(v)}
    if key in CHATS or are_messages(rest[key]):
        begun = rest[key] if isinstance(rest[key], list) else [rest[key]]
        return {**{k: v for k, v in rest.items() if k != key}, "conversations": [*begun, answer]}
    return {**rest, "response": answer["content"]}


def _conversation(row: dict) -> Chat:
    return clean_chat(row)["conversations"]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[dict]
) -> list[Encoded | BadRow]:
    """Each pair as the ids of its chosen chat, then those of the rejected one.

    Learned are the two last answers. Each chat ends with its answer's last id, so that the first
    run of learned ids ends the chosen one.
    """
    chats = [_compared(pair[side]) for pair in pairs for side in SIDES]
    encoded = encode_chats(tokenizer, chats)
    found = []
    for both in zip(encoded[::2], encoded[1::2], strict=True):
        bad = [each for each in both if isinstance(each, BadRow)]
        if not bad and both[0] == both[1]:
            bad = [BadRow("chosen and rejected become the same in this chat template")]
        found.append(bad[0] if bad else _joined(*both))
    return found


def _compared(chat: Chat) -> Chat:
    """The chat with all answers but the last as context only."""
    *before, last = chat
    return [{**turn, "learned": False} for turn in before] + [last]


def _joined(chosen: Encoded, rejected: Encoded) -> Encoded | BadRow:
    ids, learned = [], []
    for each_ids, each_learned in (chosen, rejected):
        if True not in each_learned:
            return BadRow("an answer that is context only, which cannot be compared")
        end = len(each_learned) - each_learned[::-1].index(True)
        ids, learned = ids + each_ids[:end], learned + each_learned[:end]
    return ids, learned


PAIR = Kind("preference", "pair", clean_pair, encode_pairs)


@dataclass(eq=False)
class PairSamples(ChatSamples):
    """Pairs, without those of which a chat is longer than ``max_seq_len`` tokens.

    ``reference`` (pairs, 2) fp64, where it is known: log-probabilities of the two answers, as the
    model that training starts from has them.
    """

    reference: torch.Tensor | None = None

    def __post_init__(self):
        ends = np.array([first_run_ends(self.rows[n]) for n in range(len(self.rows.lengths))], int)
        longer = np.maximum(ends, self.rows.lengths - ends)
        self._ends, self._kept = ends, np.flatnonzero(longer <= self.max_seq_len)
        self.lengths = 2 * longer[self._kept]

    def describe(self) -> str:
        counts = f"{len(self._kept)} pairs, {int(self.lengths.sum())} tokens"
        left_out = len(self.rows.lengths) - len(self._kept)
        why = f"longer than max_seq_len {self.max_seq_len}"
        return f"{counts}, {left_out} left out: {why}" if left_out else counts

    def sides(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The chosen and the rejected chat of a pair, as ``2 * id + learned`` for each token."""
        n = int(self._kept[index])
        row, end = self.rows[n], int(self._ends[n])
        return row[:end], row[end:]

    def in_order(self, batch_size: int) -> Iterator[tuple[torch.Tensor, Batch]]:
        """All pairs in batches of like length, with the numbers of each batch's pairs."""
        for part in micro_batches(self.lengths, np.arange(len(self.lengths)), batch_size):
            yield torch.from_numpy(part), self.collate(part)

    def collate(self, indices: np.ndarray) -> Batch:
        """The chosen chats, then the rejected ones, with the pairs as targets."""
        pairs = [self.sides(int(index)) for index in indices]
        batch = self.padded([chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs])
        batch = replace(batch, n_targets=len(pairs))
        if self.reference is None:
            return batch
        return replace(batch, reference=self.reference[torch.from_numpy(indices)].T.flatten())


def first_run_ends(row: np.ndarray) -> int:
    """Where the first run of learned tokens ends."""
    learned = row % 2 == 1
    first = int(learned.argmax())
    after = ~learned[first:]
    return first + (int(after.argmax()) if after.any() else len(after))


class PreferenceDataset(PretrainDataset):
    """Training and held-out pairs: ``train`` and ``val``."""

    kind, samples = PAIR, PairSamples
