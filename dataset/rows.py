"""From a data file to clean rows: ``{"text"}`` for pretraining, ``{"conversations"}`` for chats.

``read_blocks`` decides what a file's rows are, ``clean_text`` and ``clean_chat`` which of them are
usable. Any other row is reported as ``file:line: reason`` and never reaches the model.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import UserError

TABLES = (".tsv", ".tsv.gz", ".tsv.zst")
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", *TABLES)
ROLES = ("system", "user", "assistant")
CHUNK_BYTES = 1 << 18  # of a JSON array that are read at once
BLOCK_BYTES = 1 << 21  # of rows that are parsed and tokenised together
SHOWN_BAD_ROWS = 20
LONGEST_WORD = 16  # characters, more than any JSON literal or escape has
GAP = re.compile(r"[ \t\r\n,]*")  # between the items of an array


class BadRow(Exception):
    """Why one row is unusable; the message is the reason alone."""


class Block(NamedTuple):
    """About ``BLOCK_BYTES`` of neighbouring rows of a file, not parsed yet."""

    rows: list[tuple[int, bytes | BadRow]]  # the line where a row begins, and its JSON
    read: int  # bytes of the file that were read for it; if compressed, compressed bytes


def read_rows(path: Path, clean: Callable[[dict], dict]) -> Iterator[tuple[int, dict | BadRow]]:
    """``(line number, row)`` for every row of ``path``, as ``clean_row`` returns it."""
    for block in read_blocks(path):
        for line, row in block.rows:
            yield line, clean_row(row, clean)


def read_blocks(path: Path) -> Iterator[Block]:
    """The rows of ``path`` in order, a block at a time, so that memory does not grow with it.

    Reads JSON lines, a JSON array or tab-separated columns; plain, ``.gz`` or ``.zst``; UTF-8 with
    or without a byte-order mark. Raises ``UserError`` if the file itself cannot be read.
    """
    if not path.is_file():
        raise UserError(f"data file {path} does not exist; check its path")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"data file {path} has an unknown ending; use one of {', '.join(SUFFIXES)}")
    rows_in = _table_rows if path.name.endswith(TABLES) else _json_rows
    try:
        with path.open("rb") as file:
            text = file
            if path.suffix == ".gz":
                text = gzip.GzipFile(fileobj=file)
            elif path.suffix == ".zst":
                import pyarrow

                text = io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
            if text.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
                text.read(len(codecs.BOM_UTF8))
            rows, size, before = [], 0, 0
            for line, row in rows_in(text):
                rows.append((line, row))
                size += len(row if isinstance(row, bytes) else str(row))
                if size >= BLOCK_BYTES:
                    yield Block(rows, file.tell() - before)
                    rows, size, before = [], 0, file.tell()
            yield Block(rows, file.tell() - before)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; download or copy it again") from error


def _table_rows(text: io.BufferedReader) -> Iterator[tuple[int, bytes | BadRow]]:
    """Line number and JSON of each line below the header. Quotes mean nothing, as in GLUE's files.

    Blank lines are skipped, except between the rows of a single column: there a text is missing.
    """
    header, blank = _cells(text.readline()), 0
    if len(set(header)) < len(header):
        yield 1, BadRow("a column's name is there twice; name each once")
        return
    for number, line in enumerate(text, 2):
        cells = _cells(line)
        if cells == [""]:
            blank += 1
            continue
        if len(header) == 1:
            yield from ((n, BadRow("the line is empty")) for n in range(number - blank, number))
        blank = 0
        if len(cells) == len(header):
            row = json.dumps(dict(zip(header, cells, strict=True)), ensure_ascii=False)
            yield number, row.encode("utf-8", "surrogateescape")
        else:
            yield number, BadRow(f"{len(cells)} columns, the header has {len(header)}")


def _cells(line: bytes) -> list[str]:
    return line.decode("utf-8", "surrogateescape").rstrip("\r\n").split("\t")


def _json_rows(text: io.BufferedReader) -> Iterator[tuple[int, bytes | BadRow]]:
    """Line number and JSON of each row: a line, or an item if the file begins with a ``[``."""
    line, head = 1, text.readline(CHUNK_BYTES)
    while head.isspace():
        line += head.count(b"\n")
        head = text.readline(CHUNK_BYTES)
    if head.lstrip().startswith(b"["):
        rest = head.partition(b"[")[2]
        yield from _array_items(chain([rest], iter(lambda: text.read(CHUNK_BYTES), b"")), line)
        return
    first = head if head.endswith(b"\n") else head + text.readline()
    for number, row in enumerate(chain([first], text), line):
        if row := row.rstrip():
            yield number, row


def _array_items(chunks: Iterator[bytes], line: int) -> Iterator[tuple[int, bytes | BadRow]]:
    """The items of a JSON array, each with its first line; holds little more than the longest.

    ``chunks`` follow the opening bracket, which stands on ``line``. Nobody can tell where a broken
    item ends: it is the last one, a ``BadRow``.
    """
    # Bytes that are not UTF-8 pass through unchanged, so that only their own item is refused.
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
            enough = 2 * len(text)  # doubled, or a long item would be scanned again and again
            while more and len(text) <= enough:
                chunk = next(chunks, None)
                more = chunk is not None
                text += decode(chunk or b"", not more)
        elif text.startswith("]", start):
            break
        elif error:
            reason = getattr(error, "msg", error)
            reason = f"invalid JSON, the rest of the array is unreadable: {reason}"
            yield line, BadRow(reason if start < len(text) else "the JSON array is not closed")
            return
        else:
            yield line, text[start:end].encode("utf-8", "surrogateescape")
    for rest in chain([text[start + 1 :].encode("utf-8", "surrogateescape")], chunks):
        blank = len(rest) - len(rest.lstrip())
        line += rest.count(b"\n", 0, blank)
        if blank < len(rest):
            yield line, BadRow("text after the end of the JSON array; give one row a line")
            return


def clean_row(row: bytes | BadRow, clean: Callable[[dict], dict]) -> dict | BadRow:
    """What ``clean``, such as ``clean_chat``, makes of a row's JSON object, or why it cannot."""
    if isinstance(row, BadRow):
        return row
    try:
        parsed = json.loads(row.decode(), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        place = f"byte {error.start + 1} of the row ({error.reason})"
        return BadRow(f"not UTF-8 at {place}; re-save the file as UTF-8")
    except (ValueError, RecursionError) as error:  # a number may have too many digits for Python
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return BadRow(f"invalid JSON{column}: {getattr(error, 'msg', error)}")
    if not isinstance(parsed, dict):
        return BadRow(f"a row must be a JSON object, not {type(parsed).__name__}")
    try:
        return clean(parsed)
    except BadRow as bad:
        return bad


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key appears twice")
    return row


def clean_any(row: dict) -> dict:
    """A pretraining or a chat row, whichever it is. Raises ``BadRow``."""
    return clean_text(row) if "text" in row else clean_chat(row)


def clean_text(row: dict) -> dict:
    """``{"text": str}`` with text in it. Raises ``BadRow``."""
    if "text" not in row:
        raise BadRow(f'no "text" among its keys {keys_of(row)}')
    return {"text": content(row["text"], '"text"')}


def clean_chat(row: dict) -> dict:
    """``{"conversations": [{"role", "content"}, ...]}`` from a row of any chat style.

    The roles are those of the data: an optional system turn, then user and assistant in turn, the
    last an assistant's, or there would be nothing to learn. Raises ``BadRow``.
    """
    messages, clean, before = _messages_of(row), [], None
    if not isinstance(messages, list) or not messages:
        raise BadRow("the conversation is not a list of messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise BadRow(f'message {number} is not an object with "role" and "content"')
        role = message["role"]
        if role not in ROLES:
            raise BadRow(f"message {number} has role {role!r}, not one of {', '.join(ROLES)}")
        if role == "system" and number > 1:
            raise BadRow(f"message {number} is a system turn, which may only come first")
        if role == before:
            raise BadRow(f"messages {number - 1} and {number} are both from {role}")
        if role == "assistant" and before != "user":
            raise BadRow(f"message {number} is an answer to no question")
        clean.append({"role": role, "content": content(message["content"], f"message {number}")})
        before = role
    if before != "assistant":
        raise BadRow("the conversation does not end with an assistant turn")
    return {"conversations": clean}


def _messages_of(row: dict) -> Any:
    """The messages of a chat row, whatever its style; unchecked. Raises ``BadRow`` without any."""
    for key in ("conversations", "messages"):
        if key in row:
            return row[key]
    if "instruction" not in row or "output" not in row:
        names = '"conversations", "messages" or "instruction" with "output"'
        raise BadRow(f"no {names} among its keys {keys_of(row)}")
    question = content(row["instruction"], '"instruction"')
    if row.get("input"):
        question += "\n" + content(row["input"], '"input"')
    turns = {"system": row["system"]} if row.get("system") else {}
    turns |= {"user": question, "assistant": row["output"]}
    return [{"role": role, "content": turn} for role, turn in turns.items()]


def content(value: Any, where: str) -> str:
    """``value`` if it is a text that is not blank. Raises ``BadRow``, which names ``where``."""
    if not isinstance(value, str):
        raise BadRow(f"{where} is not text but {type(value).__name__}")
    if not value.strip():
        raise BadRow(f"{where} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{where} holds half of a surrogate pair, which is no Unicode text") from error
    return value


def keys_of(row: dict) -> str:
    """The first keys of a row, for a message."""
    return "(" + ", ".join(map(repr, list(row)[:6])) + ")" if row else "(none)"


def settle_bad_rows(count: int, shown: list[str], bad_rows: str) -> None:
    """Go on without the ``count`` bad rows if ``bad_rows`` is "skip"; ``shown`` are the first.

    Otherwise list them and raise ``UserError``, which for "refuse" does not offer to skip them.
    """
    if bad_rows == "skip":
        print(f"bad rows skipped: {count}, the first {shown[0]}")
        return
    advice = "" if bad_rows == "refuse" else " or choose bad_rows=skip"
    print(*shown, *["..."] * (count > len(shown)), sep="\n", flush=True)
    raise UserError(f"{count} bad rows, the first {shown[0]}; mend them{advice}")


def read_texts(path: Path) -> list[str]:
    """One text for each usable row, a chat's contents line by line; ``UserError`` without any."""
    texts, bad = [], 0
    for _, row in read_rows(path, clean_any):
        if isinstance(row, BadRow):
            bad += 1
            continue
        messages = row.get("conversations") or [{"content": row["text"]}]
        texts.append("\n".join(message["content"] for message in messages))
    if bad:
        print(f"{path}: {bad} bad rows left out")
    if not texts:
        raise UserError(f"no usable row in {path}; give rows with a text or with a conversation")
    return texts
