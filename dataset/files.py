"""From a data file to its rows: lines, arrays and tables, packed or not, in one stream of JSON.

What a file is follows from its content where that tells, else from the ending of its name.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from core.errors import UserError
from core.files import read_object
from dataset import tables
from dataset.rows import BadRow, are_messages, clean_any, clean_row, style_of

CHUNK_BYTES = 1 << 18  # of a JSON array that are read at once
BLOCK_BYTES = 1 << 21  # of rows that are parsed and tokenised together
SHOWN_BAD_ROWS = 20
LONGEST_WORD = 16  # characters, more than any JSON literal or escape has
GAP = re.compile(r"[ \t\r\n,]*")  # between the items of an array
MESSAGE = re.compile(rb'\[\s*\{\s*"(role|from|content|value)"')  # how a chat begins that is a list
PACKED = (".gz", ".zst")
Place = int | str  # of a row in its file: the line where it begins, or "row 3" of a table
CleanRow = TypeVar("CleanRow")


class Block(NamedTuple):
    """About ``BLOCK_BYTES`` of neighbouring rows of a file, not parsed yet."""

    rows: list[tuple[Place, bytes | BadRow]]  # each with its JSON
    read: int  # bytes of the file that were read for it; if compressed, compressed bytes


def data_files(paths: Iterable[Path]) -> tuple[Path, ...]:
    """The files that ``paths`` name; a folder stands for the data files in it, by their names.

    Raises ``UserError`` for what does not exist, is no data file, or holds none.
    """
    files = []
    for path in paths:
        if path.is_dir():
            files += _files_in(path)
        elif not path.is_file():
            raise UserError(f"data file {path} does not exist; check its path")
        elif format_of(path) is None:
            known = f"{', '.join(FORMATS)}, also with {' or '.join(PACKED)}"
            wrong = f"data file {path} has an unknown ending; use one of {known}"
            raise UserError(f"{wrong}; save a spreadsheet as .csv in UTF-8")
        else:
            files.append(path)
    return tuple(files)


def _files_in(folder: Path) -> list[Path]:
    """The data files of a folder; those of one that ``datasets`` saved, in their order."""
    if saved := read_object(folder / "state.json").get("_data_files"):
        return [folder / entry["filename"] for entry in saved]
    found = sorted(path for path in folder.iterdir() if path.is_file() and format_of(path))
    found = [path for path in found if path.name[0] != "." and path.name != "dataset_dict.json"]
    if not found:
        inner = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        way_out = f"name one of its folders: {inner}" if inner else "name a data file"
        raise UserError(f"data folder {folder} holds no data file itself; {way_out}")
    return found


def format_of(path: Path) -> str | None:
    """The ending that says how to read a file, such as ".csv" of A.CSV.gz, or None."""
    endings = [ending.lower() for ending in path.suffixes if ending.lower() not in PACKED]
    return endings[-1] if endings and endings[-1] in FORMATS else None


def place_of(path: Path, place: Place) -> str:
    """``file:line`` or ``file: row N``."""
    return f"{path}:{place}" if isinstance(place, int) else f"{path}: {place}"


def read_rows(path: Path, clean: Callable[[dict], dict]) -> Iterator[tuple[Place, dict | BadRow]]:
    """Place and row for every row of ``path``, as ``clean_row`` returns it."""
    for block in read_blocks(path):
        for place, row in block.rows:
            yield place, clean_row(row, clean)


def usable_rows(
    paths: Iterable[Path], clean: Callable[[dict], CleanRow], bad_rows: str = "stop"
) -> list[CleanRow]:
    """What ``clean`` makes of every row of all files; ``bad_rows`` is as in ``settle_bad_rows``."""
    good, bad = [], []
    for path in data_files(paths):
        for place, row in read_rows(path, clean):
            if isinstance(row, BadRow):
                bad.append(f"{place_of(path, place)}: {row}")
            else:
                good.append(row)
    if bad:
        settle_bad_rows(len(bad), bad[:SHOWN_BAD_ROWS], bad_rows)
    return good


def read_blocks(path: Path) -> Iterator[Block]:
    """The rows of ``path`` in order, a block at a time, so that memory does not grow with it.

    Only a JSON object that wraps all rows, and UTF-16, are held whole. Raises ``UserError`` if the
    file itself cannot be read.
    """
    (path,) = data_files([path])
    try:
        with path.open("rb") as file:
            rows, size, before, is_ascii = [], 0, 0, True
            for place, row in FORMATS[format_of(path)](_unpacked(file)):
                if is_ascii and isinstance(row, bytes) and not row.isascii():
                    is_ascii = False
                    _check_encoding(path, row)
                rows.append((place, row))
                size += len(row if isinstance(row, bytes) else str(row))
                if size >= BLOCK_BYTES:
                    yield Block(rows, file.tell() - before)
                    rows, size, before = [], 0, file.tell()
            yield Block(rows, path.stat().st_size - before)
    except (OSError, EOFError, zlib.error, ValueError, LookupError) as error:
        raise UserError(f"cannot read {path}: {error}; download or convert it again") from error


def _unpacked(file: BinaryIO) -> io.BufferedReader:
    """The bytes of ``file``, unpacked as its first bytes say, and as UTF-8 without its mark."""
    if file.peek(4).startswith(b"PK\x03\x04"):
        way_out = "save its table as CSV in UTF-8"
        raise UserError(f"{file.name} is a spreadsheet or an archive; {way_out}")
    if file.peek(4).startswith(b"\x1f\x8b"):
        file = gzip.GzipFile(fileobj=file)
    elif file.peek(4).startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow

        file = io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    if file.peek(2).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return io.BufferedReader(io.BytesIO(file.read().decode("utf-16").encode()))
    if file.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    return file


def _check_encoding(path: Path, row: bytes) -> None:
    """Raise ``UserError`` if the first ``row`` that tells is no UTF-8 but may be Chinese."""
    try:
        row.decode()
    except UnicodeDecodeError:
        try:
            row.decode("gb2312")  # its narrowest form: nearly no other encoding reads as that
        except UnicodeDecodeError:
            return  # the row alone is damaged
        way_out = "save it as UTF-8, such as with iconv -f GB18030 -t UTF-8"
        raise UserError(f"{path} looks like GB18030 (GBK) and not UTF-8; {way_out}") from None


def _json_rows(text: io.BufferedReader) -> Iterator[tuple[Place, bytes | BadRow]]:
    """Place and JSON of each row: a line, an item of an array, or an object of several lines."""
    line, head = 1, text.readline(CHUNK_BYTES)
    while head.isspace():
        line += head.count(b"\n")
        head = text.readline(CHUNK_BYTES)
    start = head.lstrip()
    if start.startswith(b"[") and not MESSAGE.match(start + text.peek(99)):
        rest = head.partition(b"[")[2]
        yield from _values(chain([rest], iter(lambda: text.read(CHUNK_BYTES), b"")), line, "]")
        return
    first = head if head.endswith(b"\n") else head + text.readline()
    second = text.readline()
    goes_on = _is_open(first) and (not second or _is_open(first + second) is not False)
    if goes_on and not (second.startswith(b"{") and _is_open(second) is None):
        chunks = chain([first + second], iter(lambda: text.read(CHUNK_BYTES), b""))
        rows = _values(chunks, line, "")
    else:
        lines = enumerate(chain([first, second], text), line)
        rows = ((number, row.rstrip()) for number, row in lines if row.rstrip())
    first_two = [row for _, row in zip(range(2), rows, strict=False)]
    yield from _unwrapped(*first_two[0]) if len(first_two) == 1 else chain(first_two, rows)


def _is_open(text: bytes) -> bool | None:
    """Whether JSON goes on after ``text``; None if it ends there, False if it is broken."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text.decode(errors="replace").rstrip())
    except (ValueError, RecursionError):
        return False
    return None


def _unwrapped(place: Place, only: bytes | BadRow) -> Iterator[tuple[Place, bytes | BadRow]]:
    """The rows in the one list of an object that is all of its file, unless it is itself a row."""
    row = clean_row(only, dict)
    readings = [clean_row(only, partial(style_of, kind=kind)) for kind in ("chat", "preference")]
    readings.append(clean_row(only, clean_any))
    is_question = not isinstance(row, BadRow) and {"question", "expect"} <= row.keys()
    is_usable = not all(isinstance(reading, BadRow) for reading in readings)
    if isinstance(row, BadRow) or is_question or is_usable:
        yield place, only
        return
    lists = {key: value for key, value in row.items() if value and isinstance(value, list)}
    items = next(iter(lists.values())) if len(lists) == 1 else []
    if are_messages(items):
        yield place, only
    elif items and "system" not in row and all(isinstance(item, dict | list) for item in items):
        for number, item in enumerate(items, 1):
            yield f"row {number}", json.dumps(item).encode()
    elif lists:
        found = ", ".join(f'"{key}" ({len(value)} items)' for key, value in lists.items())
        reason = f"the file is one JSON object with lists, {found}; give one row a line"
        yield place, BadRow(reason)
    else:
        yield place, only


def _values(
    chunks: Iterator[bytes], line: int, closing: str
) -> Iterator[tuple[int, bytes | BadRow]]:
    """JSON values up to ``closing``, each with its first line; holds little more than the longest.

    ``chunks`` begin on ``line``, after the opening bracket if there is a closing one. Nobody can
    tell where a broken value ends: it is the last one, a ``BadRow``.
    """
    # Bytes that are not UTF-8 pass through unchanged, so that only their own value is refused.
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    scan = json.JSONDecoder().raw_decode
    text, counted, end, more = "", 0, 0, True
    while True:
        start = GAP.match(text, end).end()
        line, counted = line + text.count("\n", counted, start), start
        try:
            error, end = None, scan(text, start)[1]
            place = end
        except (ValueError, RecursionError) as caught:
            error, place = caught, getattr(caught, "pos", 0)
        # More text can close a string, and continue a number or word at the very end.
        if more and ("Unterminated" in str(error) or place > len(text) - LONGEST_WORD):
            text, counted, end = text[start:], 0, 0
            enough = 2 * len(text)  # doubled, or a long value would be scanned again and again
            while more and len(text) <= enough:
                chunk = next(chunks, None)
                more = chunk is not None
                text += decode(chunk or b"", not more)
        elif error is None:
            yield line, text[start:end].encode("utf-8", "surrogateescape")
        elif start == len(text) and not closing:
            return
        elif closing and text.startswith(closing, start):
            break
        else:
            rest = f"the rest of the {'array' if closing else 'file'} is unreadable"
            reason = f"invalid JSON, {rest}: {getattr(error, 'msg', error)}"
            yield line, BadRow(reason if start < len(text) else "the JSON array is not closed")
            return
    for rest in chain([text[start + 1 :].encode("utf-8", "surrogateescape")], chunks):
        blank = len(rest) - len(rest.lstrip())
        line += rest.count(b"\n", 0, blank)
        if blank < len(rest):
            yield line, BadRow("text after the end of the JSON array; give one row a line")
            return


FORMATS = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), _json_rows),
    **{".csv": tables.csv_rows, ".tsv": tables.tsv_rows, ".txt": tables.documents},
    **{".parquet": tables.parquet_rows, ".arrow": tables.arrow_rows},
}


def settle_bad_rows(count: int, shown: list[str], bad_rows: str) -> None:
    """Go on without the ``count`` bad rows if ``bad_rows`` is "skip"; ``shown`` are the first.

    Otherwise list them and raise ``UserError``, which for "refuse" does not offer to skip them.
    """
    if bad_rows == "skip":
        print(f"bad rows skipped: {count}, the first {shown[0]}")
        return
    advice = "" if bad_rows == "refuse" else " or choose bad_rows=skip"
    print(*shown, *["..."] * (count > len(shown)), sep="\n", flush=True)
    found, them = ("1 bad row,", "it") if count == 1 else (f"{count} bad rows, the first", "them")
    raise UserError(f"{found} {shown[0]}; mend {them}{advice}")
