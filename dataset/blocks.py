"""From a data file to its rows, still unparsed: JSON lines or one JSON array, plain or compressed,
of any size.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

from core.errors import UserError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
CHUNK_BYTES = 1 << 18  # read at once
BLOCK_BYTES = 1 << 21  # of rows that are parsed and tokenised together
PACKED = 3  # text shrinks to about a third in .gz and .zst files


class BadRow(Exception):
    """Why one row is unusable; the message is the reason alone."""


class Block(NamedTuple):
    """Some neighbouring rows of a file, not parsed yet: about ``BLOCK_BYTES`` of them."""

    lines: list[
        tuple[int, bytes | BadRow]
    ]  # the line where a row begins, its JSON (or why it cannot be cut out)
    read: int  # bytes of the file, compressed as it is, that were read for it


def text_bytes(path: Path) -> int:
    """About how much text a file holds, packed or not."""
    path = Path(path)
    return path.stat().st_size * (PACKED if path.suffix in (".gz", ".zst") else 1)


def read_blocks(path: Path) -> Iterator[Block]:
    """The rows of ``path``, in order and a block at a time, so that memory does not grow with the
    file.

    Reads JSON lines or one JSON array, plain, ``.gz`` or ``.zst``, UTF-8 with or without a
    byte-order mark. Raises ``UserError`` when the file itself cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"data file {path} does not exist; check its path")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"data file {path} has an unknown ending; use one of {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            lines, size, before = [], 0, 0
            for number, line in _cut(_chunks(file, path)):
                lines.append((number, line))
                size += 0 if isinstance(line, BadRow) else len(line)
                if size >= BLOCK_BYTES:
                    yield Block(lines, file.tell() - before)
                    lines, size, before = [], 0, file.tell()
            yield Block(lines, file.tell() - before)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; download or copy it again") from error


def _chunks(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The decompressed content."""
    if path.suffix == ".zst":
        yield from _zstd_chunks(file, path)
        return
    with gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else nullcontext(file) as plain:
        while chunk := plain.read(CHUNK_BYTES):
            yield chunk


def _zstd_chunks(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The content of a zstd stream. (The package's own reader takes a truncated file for a whole
    one.)
    """
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise UserError(f"{path} needs the zstandard package: pip install zstandard") from error
    frame = None
    while chunk := file.read(CHUNK_BYTES):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            chunk = frame.unused_data
            frame = None if frame.eof else frame
    if frame:
        raise EOFError("the compressed file ends too early")


def _cut(chunks: Iterator[bytes]) -> Iterator[tuple[int, bytes | BadRow]]:
    """The rows of JSON lines, or of one array if the first thing is its bracket, each with its
    line.
    """
    head = b""
    while not head.removeprefix(codecs.BOM_UTF8).strip() or len(head) < len(codecs.BOM_UTF8):
        chunk = next(chunks, None)
        if chunk is None:
            break
        head += chunk
    head = head.removeprefix(codecs.BOM_UTF8)
    if head.lstrip().startswith(b"["):
        before, _, rest = head.partition(b"[")
        yield from _array_items(chain([rest], chunks), 1 + before.count(b"\n"))
        return
    for number, line in enumerate(_lines(chain([head], chunks)), 1):
        if line and not line.isspace():
            yield number, line.rstrip(b"\r")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = bytearray()
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest += first
        if others:
            yield bytes(rest)
            rest = bytearray(others.pop())
            yield from others
    yield bytes(rest)


def _array_items(chunks: Iterator[bytes], line: int) -> Iterator[tuple[int, bytes | BadRow]]:
    """Items of a JSON array, whose opening bracket stood on ``line`` and is gone, each with its own
    line.

    Holds little more text than the longest item. After a broken item the rest cannot be told apart:
    it is one last ``BadRow``.
    """
    # Bytes that are no UTF-8 travel on as they are, so that only their own item is refused.
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    scan = json.JSONDecoder().raw_decode
    text, counted, end, is_all = "", 0, 0, False
    while True:
        start = _skip(text, end, " \t\r\n,")
        line, counted = line + text.count("\n", counted, start), start
        if text.startswith("]", start):
            break
        try:
            (_, end), broken = scan(text, start), None
            cut_off = end == len(text)  # a number may go on
        except (ValueError, RecursionError) as error:
            broken, cut_off = error, _is_cut_off(error, text)
        if cut_off and not is_all:
            text, is_all = _longer(text[start:], chunks, decode)
            counted = end = 0
            continue
        if start == len(text):
            yield line, BadRow("the JSON array is not closed")
            return
        if broken:
            yield (
                line,
                BadRow(
                    f"invalid JSON, the rest of the array is unreadable: {getattr(broken, 'msg', broken)}"
                ),
            )
            return
        yield line, text[start:end].encode("utf-8", "surrogateescape")
    end = start + 1
    while (start := _skip(text, end, " \t\r\n")) == len(text) and not is_all:
        line += text.count("\n", counted)
        text, is_all = _longer("", chunks, decode)
        counted = end = 0
    if start < len(text):
        line += text.count("\n", counted, start)
        yield line, BadRow("text after the end of the JSON array; give one row a line")


def _is_cut_off(error: Exception, text: str) -> bool:
    """Whether more text might mend what ``json`` complains of: an open string, or something at the
    very end.
    """
    unterminated = isinstance(error, json.JSONDecodeError) and error.msg.startswith("Unterminated")
    return (
        unterminated or getattr(error, "pos", 0) > len(text) - 16
    )  # longer than any literal or escape


def _longer(
    text: str, chunks: Iterator[bytes], decode: Callable[[bytes, bool], str]
) -> tuple[str, bool]:
    """``text`` at least doubled, so that a long item is not scanned again and again; and: is it all
    there is?
    """
    pieces, missing = [text], max(len(text), 1)
    while missing > 0:
        chunk = next(chunks, None)
        pieces.append(decode(chunk or b"", chunk is None))
        if chunk is None:
            return "".join(pieces), True
        missing -= len(chunk)
    return "".join(pieces), False


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position
