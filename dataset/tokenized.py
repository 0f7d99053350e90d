"""Data files tokenised once: a memory-mapped table of unpadded ids and learned flags in the cache folder."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from datasets import Dataset, Features, Sequence, Value
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from core.files import atomic_write, sha256_file
from dataset.chat import Encoded, encode_chats, encode_documents
from dataset.rows import BadRow, clean_chat, clean_text, read_rows
from dataset.tokenizer import tokenizer_fingerprint

FORMAT = 2  # raise it when the meaning of a cached table changes
SHOWN_BAD_ROWS = 20
ROWS_AT_ONCE = 1000  # tokenised and written together


@dataclass(frozen=True)
class Kind:
    """What a row is, how one is cleaned and how many are encoded."""

    name: str
    clean: Callable[[object], dict]
    encode: Callable[[PreTrainedTokenizerBase, list[dict]], list[Encoded]]


TEXT = Kind("text", clean_text, lambda tokenizer, rows: encode_documents(tokenizer, [row["text"] for row in rows]))
CHAT = Kind("chat", clean_chat, lambda tokenizer, rows: encode_chats(tokenizer, [row["conversations"] for row in rows]))


def tokenize_files(
    paths: tuple[Path, ...], kind: Kind, tokenizer: PreTrainedTokenizerBase, cache: Path, bad_rows: str = "stop"
) -> Dataset:
    """One row per usable row of the files: ``ids``, ``learned``, ``digest`` (63 bits of the content's SHA-256).

    The cache is keyed by the files' bytes, the tokenizer's fingerprint and the format. ``bad_rows`` "stop" lists every
    bad row and raises ``UserError``; "skip" leaves them out with a count. Raises ``UserError`` for files without rows.
    """
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"data file {path} does not exist; check --data_path")
    identity = [FORMAT, kind.name, tokenizer_fingerprint(tokenizer), *(sha256_file(path) for path in paths)]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    table = cache / f"{kind.name}-{key}.arrow"
    cached = _read_table(table)
    if cached is None:
        _write_table(table, paths, kind, tokenizer)
        cached = _read_table(table)
    if cached is None:
        raise UserError(f"cannot read {table} back, which was just written; choose another --out_dir")
    rows, bad = cached
    # The cache may have been filled from files of other names.
    bad = [f"{paths[n]}:{line}: {reason}" for n, line, reason in bad]
    if bad and bad_rows == "skip":
        print(f"bad rows skipped: {len(bad)} (scripts/inspect_data.py lists them)")
    elif bad:
        print("\n".join(bad[:SHOWN_BAD_ROWS]), *["..."] * (len(bad) > SHOWN_BAD_ROWS), sep="\n", flush=True)
        raise UserError(f"{len(bad)} bad rows, the first {bad[0]}; mend them or pass --bad_rows skip")
    if not len(rows):
        raise UserError(f"no usable row in {', '.join(map(str, paths))}")
    return rows


def _read_table(table: Path) -> tuple[Dataset, list] | None:
    """The cached rows and the bad ones as (number of the file, line, reason); None when missing or damaged."""
    try:
        bad = json.loads(table.with_suffix(".bad.json").read_text(encoding="utf-8"))
        return Dataset.from_file(str(table)), [(int(n), int(line), str(reason)) for n, line, reason in bad]
    except (OSError, ValueError, TypeError):  # the cache may be deleted, in whole or in part, at any time
        return None


def _write_table(table: Path, paths: tuple[Path, ...], kind: Kind, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write ``table`` and beside it the list of bad rows, each whole or not at all."""
    bad: list[tuple[int, int, str]] = []
    width = "uint16" if len(tokenizer) <= 1 << 16 else "int32"
    features = Features({"ids": Sequence(Value(width)), "learned": Sequence(Value("bool")), "digest": Value("int64")})

    def write(file: BinaryIO) -> None:
        with ArrowWriter(stream=file, features=features) as writer:
            clean_rows = _clean_rows(paths, kind, bad)
            while rows := list(islice(clean_rows, ROWS_AT_ONCE)):
                ids, learned = zip(*kind.encode(tokenizer, rows), strict=True)
                writer.write_batch({"ids": ids, "learned": learned, "digest": [_digest(row) for row in rows]})
            writer.finalize(close_stream=False)

    atomic_write(table, write)
    text = json.dumps(bad, ensure_ascii=False)
    atomic_write(table.with_suffix(".bad.json"), lambda file: file.write(text.encode()))


def _clean_rows(paths: tuple[Path, ...], kind: Kind, bad: list[tuple[int, int, str]]) -> Iterator[dict]:
    for number, path in enumerate(paths):
        for line, row in read_rows(path, kind.clean):
            if isinstance(row, BadRow):
                bad.append((number, line, str(row)))
            else:
                yield row


def _digest(row: dict) -> int:
    """63 bits of the SHA-256 of a row's content."""
    content = json.dumps(row, sort_keys=True, ensure_ascii=False).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") >> 1


class TokenRows:
    """Zero-copy numpy views of a memory-mapped table's rows, for a chosen subset of them.

    Pickles by file name, so that worker processes map the same pages.
    """

    def __init__(self, table: Dataset, chosen: np.ndarray):
        self.table = table
        self.chosen = chosen
        self._map()

    def _map(self) -> None:
        self._ids, self._learned, starts, ends, part = [], [], [], [], []
        columns = (self.table.data.column(name).chunks for name in ("ids", "learned"))
        for number, (ids, learned) in enumerate(zip(*columns, strict=True)):
            offsets = ids.offsets.to_numpy()
            self._ids.append(ids.values.to_numpy())
            self._learned.append(learned.values)  # bits: unpacked a row at a time
            starts.append(offsets[:-1])
            ends.append(offsets[1:])
            part.append(np.full(len(ids), number))
        self._starts, self._ends, self._part = map(np.concatenate, (starts, ends, part))
        self.lengths = (self._ends - self._starts)[self.chosen].astype(np.int64)

    def __len__(self) -> int:
        return len(self.chosen)

    def ids(self, row: int) -> np.ndarray:
        """All ids of a row, (length,) uint16 or int32."""
        at = self.chosen[row]
        return self._ids[self._part[at]][self._starts[at] : self._ends[at]]

    def learned(self, row: int) -> np.ndarray:
        """The learned flags of a row, (length,) bool."""
        at = self.chosen[row]
        start, end = int(self._starts[at]), int(self._ends[at])
        return self._learned[self._part[at]].slice(start, end - start).to_numpy(zero_copy_only=False)

    def __getstate__(self) -> dict:
        return {"table": self.table, "chosen": self.chosen}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


def split_rows(table: Dataset, val_ratio: float) -> tuple[TokenRows, TokenRows]:
    """Training and validation rows, told apart by a hash of their content, so that duplicates land on one side.

    At least one row each; ``val_ratio`` 0 makes no validation rows. Raises ``UserError`` when nothing is left to train.
    """
    digests = table.with_format("numpy")["digest"][:]
    chosen = digests < np.float64(val_ratio) * 2.0**63
    if val_ratio > 0 and not chosen.any():
        chosen = digests == digests.min()
    if chosen.all():
        raise UserError(f"--val_ratio {val_ratio} leaves no row to train on; give more different rows or --val_ratio 0")
    return TokenRows(table, np.flatnonzero(~chosen)), TokenRows(table, np.flatnonzero(chosen))
