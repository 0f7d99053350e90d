"""Data files tokenised once: a memory-mapped table of unpadded ids and learned flags in the cache
folder.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from core.files import atomic_write, sha256_file
from dataset.blocks import BadRow, Block, read_blocks, text_bytes
from dataset.chat import Encoded, encode_chats, encode_documents
from dataset.parallel import MOST_WORKERS, in_order, usable_cores
from dataset.rows import SHOWN_BAD_ROWS, clean_chat, clean_rows, clean_text, settle_bad_rows
from dataset.token_table import TokenRows, open_table, seal_table
from dataset.tokenizer import tokenizer_fingerprint

FORMAT = 5  # raise it when the meaning of a cached table changes
SMALL_BYTES = 1 << 24  # of text: less is tokenised sooner than worker processes start
BAR_SECONDS = 2  # work that takes longer gets a bar
NO_TARGET = np.iinfo(np.int32).max  # the first target of a row that has none: beyond any length


def _encode_texts(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[Encoded]:
    return encode_documents(tokenizer, [row["text"] for row in rows])


def _encode_conversations(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[Encoded]:
    return encode_chats(tokenizer, [row["conversations"] for row in rows])


@dataclass(frozen=True)
class Kind:
    """What a row is, how one is cleaned and how many are encoded."""

    name: str
    clean: Callable[[object], dict]
    encode: Callable[[PreTrainedTokenizerBase, list[dict]], list[Encoded]]


TEXT = Kind("text", clean_text, _encode_texts)
CHAT = Kind("chat", clean_chat, _encode_conversations)


@dataclass
class BadRows:
    """How many there are, and the first of them as (number of the file, line, reason)."""

    count: int = 0
    shown: list[tuple[int, int, str]] = field(default_factory=list)

    def add(self, file: int, lines: list[tuple[int, str]]) -> None:
        self.count += len(lines)
        self.shown += [(file, *row) for row in lines[: SHOWN_BAD_ROWS - len(self.shown)]]


def tokenize_files(
    paths: tuple[Path, ...],
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    bad_rows: str = "stop",
    workers: int = 0,
) -> Dataset:
    """One row per usable row of the files, in their order.

    Columns: ``ids``, ``learned``, ``digest`` (63 bits of the content's SHA-256), ``first_target``
    (the position of the first learned token that something predicts: at least 1, or ``NO_TARGET``).

    The cache is keyed by the files' bytes, the tokenizer's fingerprint and the format. ``workers``
    processes tokenise (0: one a core, for small files none); the table is the same whatever their
    number. ``bad_rows`` "stop" lists the first bad rows and raises ``UserError``; "skip" leaves all
    out with a count. Raises ``UserError`` for files without rows, and for files that change
    meanwhile.
    """
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"data file {path} does not exist; check --data_path")
    before = _stamps(paths)
    identity = [
        FORMAT,
        kind.name,
        tokenizer_fingerprint(tokenizer),
        *(sha256_file(path, cache) for path in paths),
    ]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    table = cache / f"{kind.name}-{key}.arrow"
    cached = open_table(table)
    if cached is None:
        if table.exists():
            print(f"the token cache {table} is damaged or unfinished: it is made again", flush=True)
        try:
            _write_table(table, paths, before, kind, tokenizer, workers)
        except UserError:  # Windows replaces no open file: another process, begun together with this one, was first
            if open_table(table) is None:
                raise
        cached = open_table(table)
    if cached is None:
        raise UserError(
            f"cannot read {table} back, which was just written; choose another --out_dir"
        )
    rows, facts = cached
    bad = BadRows(**facts)
    # The cache may have been filled from files of other names.
    shown = [f"{paths[n]}:{line}: {reason}" for n, line, reason in bad.shown]
    settle_bad_rows(bad.count, shown, bad_rows)
    if not len(rows):
        raise UserError(f"no usable row in {', '.join(map(str, paths))}")
    return rows


def _write_table(
    table: Path,
    paths: tuple[Path, ...],
    before: list[tuple[int, int]],
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    workers: int,
) -> None:
    """Write ``table`` and seal it with the bad rows, each whole or not at all.

    ``before``: the files' stamps when they were hashed.
    """
    bad, rows = BadRows(), 0
    total = sum(size for size, _ in before)
    is_small = sum(map(text_bytes, paths)) < SMALL_BYTES
    workers = workers or (1 if is_small else min(usable_cores(), MOST_WORKERS))
    names = ", ".join(Path(path).name for path in paths)
    if not is_small:
        print(f"tokenising {names}: {total / 1e6:,.0f} MB, {workers} processes", flush=True)
    began = time.perf_counter()

    def write(file: BinaryIO) -> None:
        nonlocal rows
        encoded = in_order(_encode, (kind, tokenizer), _numbered_blocks(paths), workers)
        bar = tqdm(
            total=total, unit="B", unit_scale=True, leave=False, delay=BAR_SECONDS, disable=None
        )
        with bar, closing(encoded), pa.ipc.new_stream(file, _schema(tokenizer)) as writer:
            for part in encoded:
                writer.write_batch(part.batch)
                rows += len(part.batch)
                bad.add(part.file, part.bad)
                bar.update(part.read)
        if _stamps(paths) != before:
            raise UserError(f"{names} changed while it was read; start again once it is complete")

    atomic_write(table, write)
    seconds = time.perf_counter() - began
    seal_table(table, asdict(bad))
    if not is_small:
        speed = f"{rows / seconds:,.0f} rows/s, {total / 1e6 / seconds:.1f} MB/s"
        print(f"tokenised {rows:,} rows in {seconds:.0f} s ({speed})", flush=True)


def _stamps(paths: tuple[Path, ...]) -> list[tuple[int, int]]:
    """Size and time of each file."""
    return [
        (status.st_size, status.st_mtime_ns) for status in (Path(path).stat() for path in paths)
    ]


def _numbered_blocks(paths: tuple[Path, ...]) -> Iterator[tuple[int, Block]]:
    return ((number, block) for number, path in enumerate(paths) for block in read_blocks(path))


class Part(NamedTuple):
    """What becomes of one block of rows."""

    batch: pa.RecordBatch
    file: int
    bad: list[tuple[int, str]]  # line, reason
    read: int  # bytes of the file


def _width(tokenizer: PreTrainedTokenizerBase) -> type[np.integer]:
    return np.uint16 if len(tokenizer) <= 1 << 16 else np.int32


def _schema(tokenizer: PreTrainedTokenizerBase) -> pa.Schema:
    lists = {
        "ids": pa.list_(pa.from_numpy_dtype(_width(tokenizer))),
        "learned": pa.list_(pa.bool_()),
    }
    return pa.schema({**lists, "digest": pa.int64(), "first_target": pa.int32()})


def _encode(shared: tuple[Kind, PreTrainedTokenizerBase], numbered: tuple[int, Block]) -> Part:
    (kind, tokenizer), (file, block) = shared, numbered
    good, bad = [], []
    for line, row in clean_rows(block, kind.clean):
        if isinstance(row, BadRow):
            bad.append((line, str(row)))
        else:
            good.append(row)
    encoded = kind.encode(tokenizer, good)
    schema = _schema(tokenizer)
    ends = np.fromiter(
        accumulate((len(ids) for ids, _ in encoded), initial=0), np.int32, len(good) + 1
    )
    columns = []
    for n, dtype in enumerate((_width(tokenizer), np.bool_)):
        values = np.fromiter(chain.from_iterable(row[n] for row in encoded), dtype, ends[-1])
        columns.append(pa.ListArray.from_arrays(ends, values))
    columns.append(pa.array([digest(row) for row in good], pa.int64()))
    columns.append(pa.array([_first_target(learned) for _, learned in encoded], pa.int32()))
    return Part(pa.RecordBatch.from_arrays(columns, schema=schema), file, bad, block.read)


def _first_target(learned: list[bool]) -> int:
    try:
        return learned.index(True, 1)
    except ValueError:
        return NO_TARGET


def digest(row: dict) -> int:
    """63 bits of the SHA-256 of a row's content."""
    content = json.dumps(row, sort_keys=True, ensure_ascii=False).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") >> 1


def split_rows(table: Dataset, val_ratio: float) -> tuple[TokenRows, TokenRows]:
    """Training and validation rows, told apart by a hash of their content, so that duplicates land
    on one side.

    At least one row each; ``val_ratio`` 0 makes no validation rows. Raises ``UserError`` when
    nothing is left to train.
    """
    digests = [part.to_numpy() for part in table.data.column("digest").chunks]
    limit = np.float64(val_ratio) * 2.0**63
    chosen = np.concatenate([part < limit for part in digests])
    if val_ratio > 0 and not chosen.any():
        lowest = min(part.min() for part in digests)
        chosen = np.concatenate([part == lowest for part in digests])
    if chosen.all():
        advice = "give more different rows, or --val_ratio 0 for those to train on"
        raise UserError(f"a held-out share of {val_ratio} leaves no row to train on; {advice}")
    return TokenRows(table, np.flatnonzero(~chosen)), TokenRows(table, np.flatnonzero(chosen))
