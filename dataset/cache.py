"""Data files tokenised once, into memory-mapped tables of token ids and learned flags.

A table is three files: ``.tokens``, one number ``2 * id + learned`` a token, the rows end to end;
``.rows``, a ``ROW`` for each row; ``.json``, written last, which seals them with their checksums.
"""

import contextlib
import hashlib
import json
import os
import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from core.files import atomic_write, sha256_file
from dataset.chat import Encoded, encode_chats, encode_documents
from dataset.files import (
    SHOWN_BAD_ROWS,
    Block,
    Place,
    data_files,
    format_of,
    place_of,
    read_blocks,
    read_rows,
    settle_bad_rows,
)
from dataset.rows import BadRow, clean_any, clean_chat, clean_row, clean_text, settle_control_text
from dataset.tokenizer import control_spelling, tokenizer_fingerprint
from dataset.workers import by_workers, usable_cores

FORMAT = 7  # raise it when the meaning of a cached table changes
ROW = np.dtype([("start", "<i8"), ("digest", "<i8"), ("length", "<i4"), ("first_target", "<i4")])
SMALL_BYTES = 1 << 24  # of text: less is tokenised sooner than worker processes start
PACKED = {".gz": 3, ".zst": 3}  # about how many times more text such a file holds
OLD_DAYS, OLDER_DAYS = 7, 30  # without use: a table may go if the cache is full, or goes
FULL_BYTES = 20 * 10**9
DAY_SECONDS = 24 * 3600
MOST_WORKERS = 16  # where one reading and writing process becomes the bottleneck
# A bar is for terminals, and for work that takes more than two seconds.
BAR = {"unit": "B", "unit_scale": True, "leave": False, "delay": 2, "disable": None}


class Kind(NamedTuple):
    """What a row is: how it is cleaned, and how the contents at its ``key`` are encoded."""

    name: str
    key: str
    clean: Callable[[dict], dict]
    encode: Callable[[PreTrainedTokenizerBase, list], list[Encoded | BadRow]]


TEXT = Kind("text", "text", clean_text, encode_documents)
CHAT = Kind("chat", "conversations", clean_chat, encode_chats)


def kind_of(path: Path) -> Kind | None:
    """The kind of the first usable row, to which all others are held; None without one."""
    files = data_files([path])
    rows = (row for file in files for _, row in read_rows(file, clean_any))
    rows = (row for row in rows if not isinstance(row, BadRow))
    first = next(rows, {})
    return next((kind for kind in (TEXT, CHAT) if kind.key in first), None)


class TokenRows:
    """The rows of a memory-mapped table, or a ``chosen`` subset of them, in twelve bytes a row.

    ``lengths`` and ``first_target`` are (rows,) int32. The first target is the position of the
    first learned token that something predicts, so at least 1; it is the length if there is none.
    """

    def __init__(self, table: Path, dtype: np.dtype, chosen: np.ndarray | None = None):
        self.table, self.dtype = table, dtype
        self.tokens = np.asarray(np.memmap(table.with_suffix(".tokens"), dtype, "r"))
        self.rows = np.asarray(np.memmap(table.with_suffix(".rows"), ROW, "r"))
        self.chosen = np.arange(len(self.rows), dtype=np.int32) if chosen is None else chosen
        self.lengths = self.rows["length"][self.chosen]
        self.first_target = self.rows["first_target"][self.chosen]

    def __reduce__(self) -> tuple:  # by file name: worker processes map the same pages
        return TokenRows, (self.table, self.dtype, self.chosen)

    def __getitem__(self, n: int) -> np.ndarray:
        """``2 * id + learned`` for each token of row ``n``: a view of the file, read when used."""
        start = int(self.rows["start"][self.chosen[n]])
        return self.tokens[start : start + int(self.lengths[n])]


def tokenize_files(
    paths: tuple[Path, ...],
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    bad_rows: str = "stop",
    control_text: str = "keep",
    workers: int = 0,
) -> TokenRows:
    """The usable rows of all files in order, tokenised by ``workers`` processes.

    0 workers: one for each core, or none for small files; the table is the same. The cache is keyed
    by the bytes of the files, the tokenizer's fingerprint and the format. ``control_text``: "keep"
    control tokens that a text spells as text, "drop" them, or "refuse" the row. Raises
    ``UserError`` for files that lack usable rows or change while they are read, and as
    ``data_files`` and ``settle_bad_rows`` do.
    """
    paths = data_files(paths)
    hashes = [sha256_file(path, cache) for path in paths]
    formats = [format_of(path) for path in paths]
    identity = [FORMAT, kind.name, tokenizer_fingerprint(tokenizer), *hashes, formats, control_text]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    table = cache / f"{kind.name}-{key}.json"
    facts = _facts_of(table)
    if facts is None:
        if table.exists():
            print(f"the token cache {table} is damaged or unfinished: it is made again", flush=True)
        # The largest id decides, because the ids of some vocabularies have gaps.
        dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 15 else np.uint32
        encode = partial(_encode, kind, tokenizer, dtype, control_text)
        try:
            facts = _write_table(table, paths, hashes, encode, workers)
        except UserError:
            # Windows replaces no open file: a process that began together with this was first.
            if (facts := _facts_of(table)) is None:
                raise
    drop_old_tables(table)
    if facts["bad"]:  # named by today's files: those that filled the cache may have had other names
        shown = [f"{place_of(paths[n], place)}: {why}" for n, place, why in facts["shown"]]
        settle_bad_rows(facts["bad"], shown, bad_rows)
    if facts["spelled"] and control_text != "refuse":
        done = "without them" if control_text == "drop" else "control_text=drop would remove them"
        print(f"note: rows that spell control tokens as text: {facts['spelled']}; {done}")
    if not facts["rows"]:
        raise UserError(f"no usable row in {', '.join(map(str, paths))}")
    return TokenRows(table, np.dtype(facts["dtype"]))


def _facts_of(table: Path) -> dict | None:
    """What the seal says of a table; None if a file of it is missing or not as it was written.

    Reads the whole table, about a gigabyte each second. CRC-32 guards against accidents only.
    """
    try:
        sealed = json.loads(table.read_text(encoding="utf-8"))
        facts = sealed["facts"]
        if sealed["crc32"] != zlib.crc32(json.dumps(facts).encode()):
            return None
        for suffix, expected in facts["crc32"].items():
            crc = 0
            with table.with_suffix(suffix).open("rb") as file:
                while chunk := file.read(1 << 20):
                    crc = zlib.crc32(chunk, crc)
            if crc != expected:
                return None
        return facts
    except (OSError, ValueError, TypeError, KeyError):  # missing, or harmed in whatever way
        return None


def drop_old_tables(table: Path) -> None:
    """Mark ``table`` as used now, and delete those beside it that were not used for long."""
    now, found = time.time(), defaultdict(list)
    with contextlib.suppress(OSError):
        os.utime(table)
    for path in table.parent.glob("*-*"):
        if path.suffix in (".json", ".tokens", ".rows", ".safetensors"):
            found[path.stem].append((path.stat(), path))
    used = {stem: max(status.st_mtime for status, _ in found[stem]) for stem in found}
    total = dropped = 0
    for stem in sorted(found, key=used.get, reverse=True):
        size, days = (
            sum(status.st_size for status, _ in found[stem]),
            (now - used[stem]) / DAY_SECONDS,
        )
        total += size
        if days > OLDER_DAYS or (days > OLD_DAYS and total > FULL_BYTES):
            dropped += size
            for _, path in sorted(found[stem], key=lambda pair: pair[1].suffix):  # the seal first
                with contextlib.suppress(OSError):  # on Windows an open file stays
                    path.unlink()
    if dropped:
        print(f"{dropped / 1e6:,.0f} MB of token tables, long unused, deleted in {table.parent}")


def _write_table(
    table: Path, paths: tuple[Path, ...], hashes: list[str], encode: Callable, workers: int
) -> dict:
    """Write the files of ``table``, each whole or not at all, the seal last; return its facts."""
    size = sum(path.stat().st_size for path in paths)
    unpacked = sum(path.stat().st_size * PACKED.get(path.suffix, 1) for path in paths)
    is_small = unpacked < SMALL_BYTES
    workers = workers or (1 if is_small else min(usable_cores(), MOST_WORKERS))
    blocks = ((n, block) for n, path in enumerate(paths) for block in read_blocks(path))
    crc32 = {".tokens": 0, ".rows": 0}
    facts = {"rows": 0, "bad": 0, "spelled": 0, "shown": [], "crc32": crc32}

    def write(token_file: BinaryIO, row_file: BinaryIO) -> None:
        start = 0
        parts = by_workers(encode, blocks, workers) if workers > 1 else (encode(b) for b in blocks)
        with closing(parts), tqdm(total=size, **BAR) as bar:
            for part in parts:
                part.rows["start"] += start
                start += len(part.tokens)
                token_file.write(part.tokens)
                row_file.write(part.rows)
                crc32[".tokens"] = zlib.crc32(part.tokens, crc32[".tokens"])
                crc32[".rows"] = zlib.crc32(part.rows, crc32[".rows"])
                facts["dtype"] = part.tokens.dtype.str
                facts["rows"] += len(part.rows)
                facts["bad"] += len(part.bad)
                facts["spelled"] += part.spelled
                facts["shown"] += part.bad[: SHOWN_BAD_ROWS - len(facts["shown"])]
                bar.update(part.read)
        for path, before in zip(paths, hashes, strict=True):
            if sha256_file(path, table.parent) != before:
                raise UserError(f"{path} changed while it was read; start again once it is whole")

    began = time.perf_counter()
    if not is_small:
        names = ", ".join(path.name for path in paths)
        print(f"tokenising {names}: {size / 1e6:,.0f} MB, {workers} processes", flush=True)
    atomic_write(
        table.with_suffix(".tokens"),
        lambda tokens: atomic_write(table.with_suffix(".rows"), lambda rows: write(tokens, rows)),
    )
    if not is_small:
        rows, seconds = facts["rows"], time.perf_counter() - began
        speed = f"{rows / seconds:,.0f} rows/s, {size / 1e6 / seconds:.1f} MB/s"
        print(f"tokenised {rows:,} rows in {seconds:.0f} s ({speed})", flush=True)
    seal = {"crc32": zlib.crc32(json.dumps(facts).encode()), "facts": facts}
    atomic_write(table, lambda file: file.write(json.dumps(seal).encode()))
    return facts


class Part(NamedTuple):
    """The tokens of one block of rows."""

    tokens: np.ndarray  # 2 * id + learned, the rows end to end
    rows: np.ndarray  # of dtype ROW; each start counts from the part's first token
    bad: list[tuple[int, Place, str]]  # number of the file, place in it, reason
    spelled: int  # rows that spell control tokens as text
    read: int  # bytes of the file


def _encode(
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    dtype: type,
    control_text: str,
    numbered: tuple[int, Block],
) -> Part:
    """Clean and tokenise a block of the file with the given number."""
    file, block = numbered
    cleaned = [(place, clean_row(row, kind.clean)) for place, row in block.rows]
    cleaned, spelled = settle_control_text(cleaned, control_spelling(tokenizer), control_text)
    chosen = [row[kind.key] for _, row in cleaned if not isinstance(row, BadRow)]
    encoded = iter(kind.encode(tokenizer, chosen))
    good, bad = [], []
    for place, row in cleaned:
        outcome = row if isinstance(row, BadRow) else next(encoded)
        if isinstance(outcome, BadRow):
            bad.append((file, place, str(outcome)))
        else:
            good.append((row, *outcome))
    rows = np.empty(len(good), ROW)
    rows["digest"] = [digest(row) for row, _, _ in good]
    rows["length"] = [len(ids) for _, ids, _ in good]
    rows["start"] = np.cumsum(rows["length"]) - rows["length"]
    # The closing True gives a row without targets its length.
    rows["first_target"] = [[*learned[1:], True].index(True) + 1 for _, _, learned in good]
    ids = np.fromiter(chain.from_iterable(ids for _, ids, _ in good), dtype)
    learned = np.fromiter(chain.from_iterable(learned for _, _, learned in good), dtype)
    return Part(2 * ids + learned, rows, bad, spelled, block.read)


def digest(row: dict) -> int:
    """63 bits of the SHA-256 of a row's content."""
    content = json.dumps(row, sort_keys=True, ensure_ascii=False).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") >> 1


def split_rows(rows: TokenRows, val_ratio: float) -> tuple[TokenRows, TokenRows]:
    """Training and validation rows, split by a hash of their content: duplicates stay together.

    At least one row each; ``val_ratio`` 0 holds nothing out. Raises ``UserError`` when nothing is
    left to train on.
    """
    digests = rows.rows["digest"][rows.chosen]
    held_out = digests < np.float64(val_ratio) * 2.0**63
    if val_ratio > 0 and not held_out.any():
        held_out = digests == digests.min()
    if held_out.all():
        advice = "give more different rows (a text file is one, unless lines of <|endoftext|>"
        advice += " part it), or val_ratio 0 to train on those there are"
        raise UserError(f"a held-out share of {val_ratio} leaves no row to train on; {advice}")
    train, val = rows.chosen[~held_out], rows.chosen[held_out]
    return TokenRows(rows.table, rows.dtype, train), TokenRows(rows.table, rows.dtype, val)
