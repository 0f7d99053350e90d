"""Data files that are no JSON: tables with a row of column names, and plain text."""

import csv
import io
import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from dataset.rows import BadRow

SEPARATORS = ",;\t"
END_OF_DOCUMENT = b"<|endoftext|>"  # as in TinyStories
LONGEST_CELL = 2**31 - 1  # characters, the most that the csv module takes on Windows

Rows = Iterator[tuple[str, bytes | BadRow]]  # "row 3" and its JSON; row 1 is below the names


def _table_rows(text: io.BufferedReader, **dialect: Any) -> Rows:
    """Each row of a table as an object of texts: ``007`` and ``NA`` stay what they are.

    A blank line is skipped, except in a table of one column: there a text is missing.
    """
    csv.field_size_limit(LONGEST_CELL)
    if "delimiter" not in dialect:
        names = text.peek().partition(b"\n")[0].decode("utf-8", "replace")
        dialect["delimiter"] = max(SEPARATORS, key=re.sub('"[^"]*"', "", names).count)
    with io.TextIOWrapper(text, "utf-8", "surrogateescape", newline="") as lines:
        table = csv.reader(lines, strict=True, **dialect)
        header = _header(table)
        if isinstance(header, BadRow):
            yield "the header", header
        else:
            yield from _below(header, table)


def _below(header: list[str], table: Any) -> Rows:
    """The rows below the header."""
    number = blank = 0
    while True:
        first = table.line_num + 1
        try:
            cells = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            number += 1
            where = f"lines {first} to {table.line_num}"
            if "end of data" in str(error):  # more than one row is lost
                raise ValueError(f"a quote opens on line {first} and never closes") from error
            yield f"row {number}", BadRow(f"{where} make no row: {error}")
            continue
        if not cells:
            blank += len(header) == 1
            continue
        for missing in range(number + 1, number + blank + 1):
            yield f"row {missing}", BadRow("the line is empty")
        number, blank = number + blank + 1, 0
        if len(cells) == len(header):
            yield f"row {number}", _json(dict(zip(header, cells, strict=True)))
        else:
            reason = f"{len(cells)} columns, the header has {len(header)}"
            yield f"row {number}", BadRow(reason)


def _header(table: Iterator[list[str]]) -> list[str] | BadRow:
    """The names of the columns, or what is wrong with them."""
    try:
        names = [name.strip() for name in next(table, [])]
    except csv.Error as error:
        return BadRow(f"the names of the columns cannot be read: {error}")
    twice = [name for n, name in enumerate(names) if name in names[:n]]
    if twice and not twice[0]:
        return BadRow("two columns have no name; name them or delete them")
    return BadRow(f"two columns are named {twice[0]!r}; rename one") if twice else names


csv_rows = _table_rows
tsv_rows = partial(_table_rows, delimiter="\t", quoting=csv.QUOTE_NONE)  # as in GLUE's files


def parquet_rows(file: io.BufferedReader) -> Rows:
    """The rows of a Parquet file, a few at a time."""
    import pyarrow.parquet

    return _arrow_rows(pyarrow.parquet.ParquetFile(file).iter_batches(1000))


def arrow_rows(file: io.BufferedReader) -> Rows:
    """The rows of an Arrow stream, such as ``datasets`` saves, or file (Feather)."""
    import pyarrow

    if not file.peek(6).startswith(b"ARROW1"):
        return _arrow_rows(pyarrow.ipc.open_stream(file))
    reader = pyarrow.ipc.open_file(file)
    return _arrow_rows(map(reader.get_batch, range(reader.num_record_batches)))


def _arrow_rows(batches: Any) -> Rows:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"row {number}", _json(row)


def documents(text: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """The documents of a plain text, parted by lines of ``END_OF_DOCUMENT``, by first line."""
    held, first = [], 1
    for number, line in enumerate(text, 1):
        if line.strip() == END_OF_DOCUMENT:
            yield from _document(held, first)
            held, first = [], number + 1
        else:
            held.append(line)
    yield from _document(held, first)


def _document(lines: list[bytes], first: int) -> Iterator[tuple[int, bytes]]:
    if document := b"".join(lines).strip(b"\r\n"):
        yield first, _json({"text": document.decode("utf-8", "surrogateescape")})


def _json(row: dict) -> bytes:
    """``row`` as JSON; what JSON cannot hold, such as bytes or a date, is an object there."""
    text = json.dumps(row, ensure_ascii=False, default=lambda value: {"type": str(type(value))})
    return text.encode("utf-8", "surrogateescape")
