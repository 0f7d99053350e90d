"""The token table on disk: opened when its checksums are right, and its rows as zero-copy numpy
views.
"""

import contextlib
import json
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from core.errors import UserError
from core.files import atomic_write

CHECKED_AT_START = (
    1 << 29
)  # bytes: a smaller table is read and checked whole in a fraction of a second


def seal_table(table: Path, facts: dict) -> None:
    """Write the ``.json`` beside a new table: ``facts`` and checksums. Without it the table does
    not count.
    """
    rows = Dataset.from_file(str(table))
    said = {"facts": facts, "bytes": table.stat().st_size, "outline": _outline(table, rows)}
    said["parts"] = [_crc(buffers) for buffers in _contents(rows)]
    text = json.dumps(
        {"crc32": _crc([json.dumps(said).encode()]), "table": said}, ensure_ascii=False
    )
    atomic_write(table.with_suffix(".json"), lambda file: file.write(text.encode()))


def open_table(table: Path) -> tuple[Dataset, dict] | None:
    """The rows of a sealed table, memory-mapped, and its facts; None when missing or damaged.

    Damaged is whatever differs from what was written, told by CRC-32: an accident passes once in 4
    billion times, and intent is not guarded against. Of a table beyond ``CHECKED_AT_START`` only
    the outline is checked here, that is all but the ids and learned flags themselves, which
    ``TokenRows`` checks before their first use.
    """
    said = _seal_of(table)
    try:
        if said is None or said["bytes"] != table.stat().st_size:
            return None
        rows = Dataset.from_file(str(table))
        rows.data.table.validate()  # nothing points outside of the file
        whole = said["outline"] == _outline(table, rows)
        if said["bytes"] < CHECKED_AT_START:
            whole = whole and said["parts"] == [_crc(buffers) for buffers in _contents(rows)]
        return (rows, said["facts"]) if whole else None
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        pa.ArrowException,
    ):  # the cache may be harmed or gone at any time
        return None


def _seal_of(table: Path) -> dict | None:
    try:
        sealed = json.loads(table.with_suffix(".json").read_text(encoding="utf-8"))
        said = sealed["table"]
        return said if sealed["crc32"] == _crc([json.dumps(said).encode()]) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _damaged(table: Path) -> UserError:
    """What to raise; the table no longer counts."""
    with contextlib.suppress(OSError):
        table.with_suffix(".json").unlink()
    return UserError(
        f"the token cache {table} is damaged; start again, with --resume after a save: it is made again"
    )


def _contents(rows: Dataset) -> list[list[pa.Buffer]]:
    """The memory of the ids and learned flags of each part."""
    columns = zip(*(rows.data.column(name).chunks for name in ("ids", "learned")), strict=True)
    return [[buffer for column in part for buffer in column.buffers()[2:]] for part in columns]


def _outline(table: Path, rows: Dataset) -> int:
    """The checksum of all else: what each part is made of, where its rows end, and their
    numbers.
    """
    with pa.memory_map(str(table)) as file:
        messages = [message.metadata for message in pa.ipc.MessageReader.open_stream(file)]
    buffers = (part.buffers()[:2] for column in rows.data.columns for part in column.chunks)
    return _crc(chain(messages, *buffers))


def _crc(buffers: Iterable[pa.Buffer | bytes | None]) -> int:
    total = 0
    for buffer in buffers:
        total = zlib.crc32(buffer or b"", total)
    return total


class TokenRows:
    """Zero-copy numpy views of a memory-mapped table's rows, for a chosen subset of them.

    Twelve bytes of memory a row: ``chosen`` (rows of the table), ``lengths`` and ``first_target``,
    each (rows,) int32. A row has something to learn within its first ``n`` tokens where
    ``first_target < n``. Pickles by file name, so that worker processes map the same pages.

    Each part of the table is checked in each process when a row of it is first asked for. What
    differs from what was written is never returned: it raises ``UserError``, and the next start
    makes the table again.
    """

    def __init__(self, table: Dataset, chosen: np.ndarray):
        self.table = table
        self.chosen = chosen.astype(np.int32, copy=False)
        self._map()

    def _map(self) -> None:
        ids, self._learned, first_targets = (
            self.table.data.column(name).chunks for name in ("ids", "learned", "first_target")
        )
        self._ids = [part.values.to_numpy() for part in ids]
        self._offsets = [
            part.offsets.to_numpy() for part in ids
        ]  # of each row in its part; the end beside the start
        self._firsts = list(
            accumulate(map(len, ids), initial=0)
        )  # row of the table that each part begins with
        self._file = Path(self.table.cache_files[0]["filename"])
        if (said := _seal_of(self._file)) is None:
            raise _damaged(self._file)
        self._unchecked = dict(enumerate(zip(_contents(self.table), said["parts"], strict=True)))
        self.lengths = np.concatenate([np.diff(offsets) for offsets in self._offsets])[self.chosen]
        self.first_target = np.concatenate([part.to_numpy() for part in first_targets])[self.chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def ids(self, row: int, first: int = 0, last: int | None = None) -> np.ndarray:
        """The ids of a row, (length,) uint16 or int32: all, or those from ``first`` to before
        ``last``.
        """
        part, start, end = self._place(row, first, last)
        return self._ids[part][start:end]

    def learned(self, row: int, first: int = 0, last: int | None = None) -> np.ndarray:
        """The learned flags of the same ids, (length,) bool."""
        part, start, end = self._place(row, first, last)
        return self._learned[part].values.slice(start, end - start).to_numpy(zero_copy_only=False)

    def _place(self, row: int, first: int, last: int | None) -> tuple[int, int, int]:
        """The part that holds a row, and where in it the asked-for tokens start and end."""
        at = int(self.chosen[row])
        part = bisect_right(self._firsts, at) - 1
        if part in self._unchecked:
            buffers, expected = self._unchecked[part]
            if _crc(buffers) != expected:
                raise _damaged(self._file)
            del self._unchecked[part]
        start, end = map(int, self._offsets[part][at - self._firsts[part] :][:2])
        return part, start + first, end if last is None else min(start + last, end)

    def __getstate__(self) -> dict:
        return {"table": self.table, "chosen": self.chosen}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)
