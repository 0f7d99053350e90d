"""From a data file to clean rows: ``{"text"}`` for pretraining, ``{"conversations"}`` for chats.

A row that cannot be used is reported as ``file:line: reason`` and never reaches the model.
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

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
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
    """Yield ``(line number, row)`` for every row of ``path``.

    ``clean`` turns a parsed JSON object into a row or raises ``BadRow``, which is then yielded in
    place of the row. Reads the formats of ``read_blocks``.
    """
    for block in read_blocks(path):
        yield from clean_rows(block, clean)


def read_blocks(path: Path) -> Iterator[Block]:
    """The rows of ``path`` in order, a block at a time, so that memory does not grow with it.

    Reads JSON lines or one JSON array, plain, ``.gz`` or ``.zst``, UTF-8 with or without a
    byte-order mark. Raises ``UserError`` if the file itself cannot be read.
    """
    if not path.is_file():
        raise UserError(f"data file {path} does not exist; check its path")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"data file {path} has an unknown ending; use one of {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            text = file
            if path.suffix == ".gz":
                text = gzip.GzipFile(fileobj=file)
            elif path.suffix == ".zst":
                import pyarrow

                text = io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
            rows, size, before = [], 0, 0
            for line, row in _cut(text):
                rows.append((line, row))
                size += 0 if isinstance(row, BadRow) else len(row)
                if size >= BLOCK_BYTES:
                    yield Block(rows, file.tell() - before)
                    rows, size, before = [], 0, file.tell()
            yield Block(rows, file.tell() - before)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; download or copy it again") from error


def _cut(text: io.BufferedReader) -> Iterator[tuple[int, bytes | BadRow]]:
    """Line number and JSON of each row: a line, or an item if the file begins with a ``[``."""
    if text.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
        text.read(len(codecs.BOM_UTF8))
    line, head = 1, text.readline(CHUNK_BYTES)
    while head.isspace():
        line += head.count(b"\n")
        head = text.readline(CHUNK_BYTES)
    if head.lstrip().startswith(b"["):
        rest = head.partition(b"[")[2]
        chunks = chain([rest], iter(lambda: text.read(CHUNK_BYTES), b""))
        yield from _array_items(chunks, line)
        return
    first = head if head.endswith(b"\n") else head + text.readline()
    for number, row in enumerate(chain([first], text), line):
        if row and not row.isspace():
            yield number, row.rstrip(b"\r\n")


def _array_items(chunks: Iterator[bytes], line: int) -> Iterator[tuple[int, bytes | BadRow]]:
    """The items of a JSON array, each with the line where it begins.

    ``chunks`` follow the opening bracket, which stands on ``line``. Holds little more text than the
    longest item. Nobody can tell where a broken item ends: it is the last one, a ``BadRow``.
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


def clean_rows(block: Block, clean: Callable[[dict], dict]) -> Iterator[tuple[int, dict | BadRow]]:
    """``(line number, row)`` for every row of a block, as ``read_rows`` yields them."""
    for line, row in block.rows:
        try:
            found = clean(_parsed(row))
        except BadRow as bad:
            found = bad
        yield line, found


def _parsed(row: bytes | BadRow) -> dict:
    """The JSON object of a row. Raises ``BadRow`` if there is none."""
    if isinstance(row, BadRow):
        raise row
    try:
        parsed = json.loads(row.decode(), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        place = f"byte {error.start + 1} of the row ({error.reason})"
        raise BadRow(f"not UTF-8 at {place}; re-save the file as UTF-8") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # also a number with more digits than Python reads
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadRow(f"invalid JSON{column}: {getattr(error, 'msg', error)}") from error
    if not isinstance(parsed, dict):
        raise BadRow(f"a row must be a JSON object, not {type(parsed).__name__}")
    return parsed


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise BadRow("a key appears twice")
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
    """``{"conversations": [{"role", "content"}, ...]}`` from any of the three chat formats.

    The roles in the data are honoured: an optional system turn, then user and assistant in turn,
    with at least one assistant turn, or there would be nothing to learn. Raises ``BadRow``.
    """
    if "conversations" in row:
        messages = row["conversations"]
    elif "messages" in row:
        messages = row["messages"]
    elif "instruction" in row and "output" in row:
        question = content(row["instruction"], '"instruction"')
        if row.get("input"):
            question += "\n" + content(row["input"], '"input"')
        turns = {"system": row["system"]} if row.get("system") else {}
        turns |= {"user": question, "assistant": row["output"]}
        messages = [{"role": role, "content": turn} for role, turn in turns.items()]
    else:
        names = '"conversations", "messages" or "instruction" with "output"'
        raise BadRow(f"no {names} among its keys {keys_of(row)}")
    return {"conversations": _checked(messages)}


def _checked(messages: Any) -> list[dict]:
    """A list of ``{"role", "content"}`` in a legal order, without other keys. Raises ``BadRow``."""
    if not isinstance(messages, list) or not messages:
        raise BadRow("the conversation is not a list of messages")
    clean = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise BadRow(f'message {number} is not an object with "role" and "content"')
        role, before = message["role"], clean[-1]["role"] if clean else None
        if role not in ROLES:
            raise BadRow(f"message {number} has role {role!r}, not one of {', '.join(ROLES)}")
        if role == "system" and number > 1:
            raise BadRow(f"message {number} is a system turn, which may only come first")
        if role == before:
            raise BadRow(f"messages {number - 1} and {number} are both from {role}")
        if role == "assistant" and before != "user":
            raise BadRow(f"message {number} is an answer to no question")
        clean.append({"role": role, "content": content(message["content"], f"message {number}")})
    if clean[-1]["role"] != "assistant":
        raise BadRow("the conversation does not end with an assistant turn")
    return clean


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
    """Continue without the ``count`` bad rows if ``bad_rows`` is "skip", and print how many.

    Otherwise print ``shown``, the first of them, and raise ``UserError`` if there are any. With
    ``bad_rows`` "refuse" the message does not offer to skip them.
    """
    if count and bad_rows == "skip":
        print(f"bad rows skipped: {count}, the first {shown[0]}")
    elif count:
        advice = "" if bad_rows == "refuse" else " or choose bad_rows=skip"
        print("\n".join(shown), *["..."] * (count > len(shown)), sep="\n", flush=True)
        raise UserError(f"{count} bad rows, the first {shown[0]}; mend them{advice}")


def read_texts(path: Path) -> list[str]:
    """One text for each row of a data file of either kind: a chat's contents, one a line.

    Bad rows are left out, and their number is printed. Raises ``UserError`` if no row is left.
    """
    texts, bad = [], 0
    for _, row in read_rows(path, clean_any):
        if isinstance(row, BadRow):
            bad += 1
        elif "text" in row:
            texts.append(row["text"])
        else:
            texts.append("\n".join(message["content"] for message in row["conversations"]))
    if bad:
        print(f"{path}: {bad} bad rows left out")
    if not texts:
        raise UserError(f"no usable row in {path}; give rows with a text or with a conversation")
    return texts
