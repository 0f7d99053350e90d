"""Labelled texts, single or in pairs, become the samples that a classifier draws batches from."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from dataset.batches import Batch
from dataset.cache import digest
from dataset.files import usable_rows
from dataset.rows import BadRow, content, keys_of

# What the columns of one text, or of two, may be called: ours first, then those of GLUE's tasks.
COLUMNS = (
    ("text", "text_pair"),
    ("text",),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("sentence",),
)
MEASURE = re.compile(r"[+-]?\d*\.\d+(e[+-]?\d+)?", re.IGNORECASE)  # STS-B has some for labels


def clean_labelled(row: dict, labels: Sequence[str] = ()) -> dict:
    """``{"text": str, "text_pair": str or None, "label": str}``; a number becomes its digits.

    ``labels`` are the only ones allowed; any are if it is empty. Raises ``BadRow``.
    """
    clean, label = clean_unlabelled(row), row.get("label")
    is_label = isinstance(label, int | str) and not isinstance(label, bool)
    named = str(label).strip() if is_label else ""
    if not named or MEASURE.fullmatch(named):
        raise BadRow(f'"label" {label!r} is neither a whole number nor a name')
    if labels and named not in labels:
        raise BadRow(f'"label" {label!r} is none of those to learn, which are {", ".join(labels)}')
    return {**clean, "label": named}


def clean_unlabelled(row: dict) -> dict:
    """``{"text": str, "text_pair": str or None}``. Raises ``BadRow``."""
    for names in COLUMNS:
        if all(row.get(name) is not None for name in names):
            texts = [content(row[name], f'"{name}"') for name in names]
            return {"text": texts[0], "text_pair": texts[1] if len(texts) == 2 else None}
    raise BadRow(f'no "text" among its keys {keys_of(row)}')


def read_labelled(
    paths: Sequence[Path], bad_rows: str = "stop", clean: Callable[[dict], dict] = clean_labelled
) -> list[dict]:
    """The rows of data files as ``clean`` gives them; ``bad_rows`` is as in ``settle_bad_rows``.

    Raises ``UserError`` when no row is left, and where some rows are pairs and others are not.
    """
    good, names = usable_rows(paths, clean, bad_rows), ", ".join(map(str, paths))
    if not good:
        raise UserError(f"no usable row in {names}")
    if len({has_pairs([row]) for row in good}) > 1:
        reason = "some rows have a text_pair and others have none"
        raise UserError(f"{names}: {reason}; give all of one kind")
    return good


def has_pairs(rows: Sequence[dict]) -> bool:
    """Whether the rows, which are of one kind, have two texts."""
    return rows[0]["text_pair"] is not None


def split_labelled(rows: Sequence[dict], val_ratio: float) -> tuple[list[dict], list[dict]]:
    """Training and validation rows, split by a hash of their texts: duplicates stay together.

    A ratio above 0 holds out at least one text. Raises ``UserError`` where that leaves nothing to
    train on.
    """
    digests = [digest({"text": row["text"], "text_pair": row["text_pair"]}) for row in rows]
    bound = max(val_ratio * 2.0**63, min(digests) + 1) if val_ratio else 0
    train = [row for row, number in zip(rows, digests, strict=True) if number >= bound]
    held_out = [row for row, number in zip(rows, digests, strict=True) if number < bound]
    if not train:
        advice = "give more different rows, or val_ratio 0"
        raise UserError(f"val_ratio {val_ratio} holds out all {len(rows)} rows; {advice}")
    return train, held_out


def labels_of(rows: Sequence[dict]) -> list[str]:
    """The different labels: numbers in their order, then names. Raises ``UserError`` unless two."""
    found = {row["label"] for row in rows}
    if len(found) < 2:
        raise UserError(f"all rows have the label {found.pop()!r}; there is nothing to tell apart")
    numbers = {label for label in found if re.fullmatch(r"-?[0-9]{1,9}", label)}
    return sorted(sorted(numbers), key=int) + sorted(found - numbers)


class LabelledSamples:
    """Rows as a classifier's inputs, cut after ``max_seq_len`` tokens: of a pair, the longer text.

    A sample's label is the number of its name in ``labels``, or 0 where the row has none. Raises
    ``UserError`` for rows of another kind than ``pairs`` says, and for a row without a token.
    """

    def __init__(
        self,
        rows: Sequence[dict],
        labels: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        max_seq_len: int,
        *,
        pairs: bool,
    ):
        if rows and has_pairs(rows) != pairs:
            kinds = ("one text", "a text and a text_pair")
            reads = f"where the classifier reads {kinds[pairs]}"
            raise UserError(f"these rows have {kinds[not pairs]}, {reads}")
        framed = tokenizer.num_special_tokens_to_add(pair=pairs)
        if max_seq_len <= framed:
            reason = f"leaves no room for text beside {framed} control tokens"
            raise UserError(f"max_seq_len {max_seq_len} {reason}")
        number = {label: n for n, label in enumerate(labels)}
        self.labels = np.array([number[row.get("label", labels[0])] for row in rows], np.int64)
        texts = [[row["text"] for row in rows], [row["text_pair"] for row in rows]][: 1 + pairs]
        # What a text spells is never a control token.
        settings = {"truncation": True, "max_length": max_seq_len, "split_special_tokens": True}
        encoded = tokenizer(*texts, **settings) if rows else {"input_ids": []}
        # A batch has an attention_mask of its own; token_type_ids, where a model has them, tell a
        # pair's texts apart.
        self.columns = {key: values for key, values in encoded.items() if key != "attention_mask"}
        self.lengths = np.array([len(ids) for ids in encoded["input_ids"]], np.int32)
        if not self.lengths.all():
            empty = rows[int(self.lengths.argmin())]["text"]
            raise UserError(f"the tokenizer makes no token of {empty[:40]!r}; leave that row out")
        self.pad_id = tokenizer.pad_token_id
        self.truncated = int((self.lengths >= max_seq_len).sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def collate(self, indices: np.ndarray) -> Batch:
        """Right-padded ``inputs`` (B, T) with ``attention_mask``; ``labels`` (B,): one each row."""
        lengths = torch.from_numpy(self.lengths[indices])
        longest = int(lengths.max())
        inputs = {}
        for key, values in self.columns.items():
            filler = self.pad_id if key == "input_ids" else 0
            inputs[key] = torch.full((len(indices), longest), filler)
            for row, index in enumerate(indices):
                inputs[key][row, : lengths[row]] = torch.tensor(values[index])
        inputs["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        labels = torch.from_numpy(self.labels[indices])
        return Batch(inputs, labels, len(indices), n_bytes=0, n_tokens=int(lengths.sum()))

    def describe(self) -> str:
        share = 100 * self.truncated / max(len(self), 1)
        return f"{len(self)} rows, {int(self.lengths.sum())} tokens, {share:.1f} % truncated"
