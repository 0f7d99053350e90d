"""Labelled texts, single or in pairs, for classification: JSON or TSV rows become samples to draw
batches from.
"""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from dataset.batches import Batch
from dataset.cache import digest
from dataset.rows import (
    SHOWN_BAD_ROWS,
    SUFFIXES,
    BadRow,
    content,
    keys_of,
    read_rows,
    settle_bad_rows,
)

TABLES = (".tsv", ".tsv.gz")
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


def clean_labelled(row: Any, labels: Sequence[str] = ()) -> dict:
    """``{"text": str, "text_pair": str or None, "label": str}`` or ``BadRow``; a number is its
    digits.

    ``labels``: the only ones allowed; any if empty.
    """
    clean = clean_unlabelled(row)
    label = row.get("label")
    named = isinstance(label, int | str) and not isinstance(label, bool) and str(label).strip()
    if not named or re.fullmatch(
        r"[+-]?\d*\.\d+(e[+-]?\d+)?", named, re.IGNORECASE
    ):  # a measure, as STS-B's
        raise BadRow(f'"label" {label!r} is neither a whole number nor a name')
    if labels and named not in labels:
        raise BadRow(f'"label" {label!r} is none of those to learn, which are {", ".join(labels)}')
    return {**clean, "label": named}


def clean_unlabelled(row: Any) -> dict:
    """``{"text": str, "text_pair": str or None}`` or ``BadRow``."""
    if not isinstance(row, dict):
        raise BadRow(f'a row must be an object such as {{"text": ...}}, not {type(row).__name__}')
    names = next(
        (names for names in COLUMNS if all(row.get(name) is not None for name in names)), None
    )
    if names is None:
        raise BadRow(f'no "text" among its keys {keys_of(row)}')
    texts = [content(row[name], f'"{name}"') for name in names]
    return {"text": texts[0], "text_pair": texts[1] if len(texts) == 2 else None}


def read_labelled(
    paths: Sequence[Path], bad_rows: str = "stop", clean: Callable[[Any], dict] = clean_labelled
) -> list[dict]:
    """The rows of JSON files (see ``read_rows``) and of TSV files with a header line, as ``clean``
    gives them.

    ``bad_rows`` "stop" and "refuse" list the first bad rows and raise ``UserError``; "skip" leaves
    all out with a count. Raises ``UserError`` when no row is left, and where some rows are pairs
    and others are not.
    """
    good, bad = [], []
    for path in paths:
        if not path.name.endswith(TABLES + SUFFIXES):
            raise UserError(
                f"data file {path} has an unknown ending; use one of {', '.join(TABLES + SUFFIXES)}"
            )
        rows = _tsv_rows(path, clean) if path.name.endswith(TABLES) else read_rows(path, clean)
        for line, row in rows:
            if isinstance(row, BadRow):
                bad.append(f"{path}:{line}: {row}")
            else:
                good.append(row)
    settle_bad_rows(len(bad), bad[:SHOWN_BAD_ROWS], bad_rows)
    names = ", ".join(map(str, paths))
    if not good:
        raise UserError(f"no usable row in {names}")
    if len({has_pairs([row]) for row in good}) > 1:
        raise UserError(
            f"{names}: some rows have a text_pair and others have none; give all of one kind"
        )
    return good


def has_pairs(rows: Sequence[dict]) -> bool:
    """Whether the rows, which are of one kind, have two texts."""
    return rows[0]["text_pair"] is not None


def split_labelled(rows: Sequence[dict], val_ratio: float) -> tuple[list[dict], list[dict]]:
    """Training and validation rows, told apart by a hash of their texts, so that duplicates land on
    one side.

    A ratio above 0 holds out at least one text. Raises ``UserError`` where that leaves nothing to
    train on.
    """
    digests = [digest({"text": row["text"], "text_pair": row["text_pair"]}) for row in rows]
    bound = max(val_ratio * 2.0**63, min(digests) + 1) if val_ratio else 0
    train = [row for row, number in zip(rows, digests, strict=True) if number >= bound]
    held_out = [row for row, number in zip(rows, digests, strict=True) if number < bound]
    if not train:
        raise UserError(
            f"val_ratio {val_ratio} holds out all {len(rows)} rows; lower it or give more rows"
        )
    return train, held_out


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
    """Rows as a classifier's inputs, cut after ``max_seq_len`` tokens (a pair: the longer text
    first).

    ``labels``: their names, of which a sample's label is the number (0 where a row has none).
    ``pairs``: whether the classifier reads two texts. Raises ``UserError`` for rows of the other
    kind, and for a row of no token.
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
        number = {label: n for n, label in enumerate(labels)}
        if rows and has_pairs(rows) != pairs:
            kinds = ("one text", "a text and a text_pair")
            raise UserError(
                f"these rows have {kinds[not pairs]}, where the classifier reads {kinds[pairs]}"
            )
        framed = tokenizer.num_special_tokens_to_add(pair=pairs)
        if max_seq_len <= framed:
            raise UserError(
                f"max_seq_len {max_seq_len} leaves no room for text beside {framed} control tokens"
            )
        self.labels = np.array(
            [number[row["label"]] if "label" in row else 0 for row in rows], np.int64
        )
        texts = [[row["text"] for row in rows], [row["text_pair"] for row in rows]][: 1 + pairs]
        # What a text spells is never a control token.
        settings = {"truncation": True, "max_length": max_seq_len, "split_special_tokens": True}
        encoded = tokenizer(*texts, **settings) if rows else {"input_ids": []}
        # attention_mask is made anew in collate; token_type_ids tell a pair's texts apart where a
        # model has them.
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
        """Right-padded ``inputs`` (B, T) with their ``attention_mask``; ``labels`` (B,): each row
        is one target.
        """
        longest = int(self.lengths[indices].max())
        inputs = {}
        for key, values in self.columns.items():
            filler = self.pad_id if key == "input_ids" else 0
            inputs[key] = torch.full((len(indices), longest), filler, dtype=torch.int64)
            for row, index in enumerate(indices):
                inputs[key][row, : self.lengths[index]] = torch.tensor(values[index])
        inputs["attention_mask"] = (
            torch.arange(longest) < torch.from_numpy(self.lengths[indices])[:, None]
        ).long()
        labels = torch.from_numpy(self.labels[indices])
        return Batch(
            inputs, labels, len(indices), n_bytes=0, n_tokens=int(self.lengths[indices].sum())
        )

    def describe(self) -> str:
        share = 100 * self.truncated / max(len(self), 1)
        return f"{len(self)} rows, {int(self.lengths.sum())} tokens, {share:.1f} % at the longest"


def _tsv_rows(path: Path, clean: Callable[[Any], dict]) -> Iterator[tuple[int, dict | BadRow]]:
    """``(line number, row)`` of a TSV file with a header line; quotes mean nothing, as in GLUE's
    files.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); save it as such") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; check its path or copy it again") from error
    header, *lines = (line.rstrip("\r").split("\t") for line in text.rstrip("\r\n").split("\n"))
    if len(set(header)) < len(header):
        raise UserError(f"{path}:1: a column's name is there twice; name each once")
    for number, cells in enumerate(lines, 2):
        if cells == [""] and len(header) > 1:  # else it is a row whose only text is empty
            continue
        if len(cells) != len(header):
            yield number, BadRow(f"{len(cells)} columns, the header has {len(header)}")
            continue
        try:
            yield number, clean(dict(zip(header, cells, strict=True)))
        except BadRow as bad:
            yield number, bad
