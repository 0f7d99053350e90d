"""Labelled texts, single or in pairs, for classification: JSON or TSV rows become samples to draw batches from."""

import gzip
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from dataset.batches import Batch
from dataset.blocks import BadRow
from dataset.rows import SHOWN_BAD_ROWS, content, keys_of, read_rows, settle_bad_rows
from dataset.tokenized import digest

# What a column may be called, GLUE's own names among them.
TEXT, PAIR = ("text", "sentence", "sentence1"), ("text_pair", "sentence2")


def clean_labelled(row: Any) -> dict:
    """``{"text": str, "text_pair": str or None, "label": str}`` or ``BadRow``; a number is its digits."""
    clean = clean_unlabelled(row)
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, int | str) or not str(label).strip():
        raise BadRow(f'"label" {label!r} is neither a whole number nor a name')
    return {**clean, "label": str(label).strip()}


def clean_unlabelled(row: Any) -> dict:
    """``{"text": str, "text_pair": str or None}`` or ``BadRow``."""
    if not isinstance(row, dict):
        raise BadRow(f"a row must be an object with text and label, not {type(row).__name__}")
    text, pair = (next((row[key] for key in names if key in row), None) for names in (TEXT, PAIR))
    if text is None:
        raise BadRow(f'no "text" among its keys {keys_of(row)}')
    return {"text": content(text, '"text"'), "text_pair": None if pair is None else content(pair, '"text_pair"')}


def read_labelled(
    paths: Sequence[Path], bad_rows: str = "stop", clean: Callable[[Any], dict] = clean_labelled
) -> list[dict]:
    """The rows of JSON files (see ``read_rows``) and of TSV files with a header line, as ``clean`` gives them.

    ``bad_rows`` "stop" lists the first bad rows and raises ``UserError``; "skip" leaves all out with a count. Raises
    ``UserError`` when no row is left, and where some rows are pairs and others are not.
    """
    good, bad = [], []
    for path in paths:
        rows = _tsv_rows(path, clean) if ".tsv" in path.suffixes else read_rows(path, clean)
        for line, row in rows:
            if isinstance(row, BadRow):
                bad.append(f"{path}:{line}: {row}")
            else:
                good.append(row)
    settle_bad_rows(len(bad), bad[:SHOWN_BAD_ROWS], bad_rows)
    names = ", ".join(map(str, paths))
    if not good:
        raise UserError(f"no usable row in {names}")
    if len({row["text_pair"] is None for row in good}) > 1:
        raise UserError(f"{names}: some rows have a text_pair and others have none; give all of one kind")
    return good


def split_labelled(rows: Sequence[dict], val_ratio: float) -> tuple[list[dict], list[dict]]:
    """Training and validation rows, told apart by a hash of their texts, so that duplicates land on one side."""
    held_out = [digest({"text": row["text"], "text_pair": row["text_pair"]}) < val_ratio * 2.0**63 for row in rows]
    train = [row for row, held in zip(rows, held_out, strict=True) if not held]
    return train, [row for row, held in zip(rows, held_out, strict=True) if held]


def labels_of(rows: Sequence[dict]) -> list[str]:
    """The different labels, numbers in their order; at least two. Raises ``UserError``."""
    found = {row["label"] for row in rows}
    if len(found) < 2:
        raise UserError(f"all rows have the label {found.pop()!r}; there is nothing to tell apart")

    def order(label: str) -> tuple[bool, int, str]:
        number = int(label) if re.fullmatch(r"-?[0-9]{1,9}", label) else None
        return number is None, number or 0, label

    return sorted(found, key=order)


class LabelledSamples:
    """Rows as a classifier's inputs, cut after ``max_seq_len`` tokens (a pair: the longer text first).

    ``labels``: their names, of which a sample's label is the number (0 where a row has none). Raises ``UserError`` for
    a row with another label.
    """

    def __init__(
        self, rows: Sequence[dict], labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_seq_len: int
    ):
        number = {label: n for n, label in enumerate(labels)}
        if unknown := sorted({row["label"] for row in rows if "label" in row} - number.keys()):
            raise UserError(f"label {unknown[0]!r} is in none of the training rows, which have {', '.join(labels)}")
        self.labels = np.array([number.get(row.get("label"), 0) for row in rows], np.int64)
        pairs = [row["text_pair"] for row in rows] if rows and rows[0]["text_pair"] is not None else None
        texts = [row["text"] for row in rows]
        encoded = tokenizer(texts, pairs, truncation=True, max_length=max_seq_len) if rows else {"input_ids": []}
        # attention_mask is made anew in collate; token_type_ids tell a pair's texts apart where a model has them.
        self.columns = {key: values for key, values in encoded.items() if key != "attention_mask"}
        self.lengths = np.array([len(ids) for ids in encoded["input_ids"]], np.int32)
        # A decoder classifies by the last token that is no padding, so this must be none of a text's own.
        self.pad_id = next(n for n in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if n is not None)
        self.truncated = int((self.lengths >= max_seq_len).sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def collate(self, indices: np.ndarray) -> Batch:
        """Right-padded ``inputs`` (B, T) with their ``attention_mask``; ``labels`` (B,): each row is one target."""
        longest = int(self.lengths[indices].max())
        inputs = {}
        for key, values in self.columns.items():
            filler = self.pad_id if key == "input_ids" else 0
            inputs[key] = torch.full((len(indices), longest), filler, dtype=torch.int64)
            for row, index in enumerate(indices):
                inputs[key][row, : self.lengths[index]] = torch.tensor(values[index])
        inputs["attention_mask"] = (torch.arange(longest) < torch.from_numpy(self.lengths[indices])[:, None]).long()
        labels = torch.from_numpy(self.labels[indices])
        return Batch(inputs, labels, len(indices), n_bytes=0, n_tokens=int(self.lengths[indices].sum()))

    def describe(self) -> str:
        share = 100 * self.truncated / max(len(self), 1)
        return f"{len(self)} rows, {int(self.lengths.sum())} tokens, {share:.1f} % at the longest"


def _tsv_rows(path: Path, clean: Callable[[Any], dict]) -> Iterator[tuple[int, dict | BadRow]]:
    """``(line number, row)`` of a TSV file with a header line; quotes mean nothing, as in GLUE's files."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; it must be UTF-8 text") from error
    header, *lines = (line.rstrip("\r").split("\t") for line in text.split("\n"))
    for number, cells in enumerate(lines, 2):
        if cells == [""]:
            continue
        if len(cells) != len(header):
            yield number, BadRow(f"{len(cells)} columns, the header has {len(header)}")
            continue
        try:
            yield number, clean(dict(zip(header, cells, strict=True)))
        except BadRow as bad:
            yield number, bad
