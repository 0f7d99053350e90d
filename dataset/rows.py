"""From a data file to clean rows: ``{"text"}`` for pretraining, ``{"conversations"}`` for chats.

A row that cannot be used is reported as ``file:line: reason`` and never reaches the model.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from core.errors import UserError

ROLES = ("system", "user", "assistant")
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")


class BadRow(Exception):
    """Why one row is unusable; the message is the reason alone."""


def read_rows(path: Path, clean: Callable[[Any], dict]) -> Iterator[tuple[int, dict | BadRow]]:
    """Yield ``(line number, row)`` for every row of ``path``; the row is a ``BadRow`` when ``clean`` refuses it.

    ``clean`` is ``clean_text`` or ``clean_chat``. Reads JSON lines or one JSON array, plain, ``.gz`` or ``.zst``, UTF-8
    with or without a byte-order mark. Raises ``UserError`` when the file itself cannot be read.
    """
    for line, parsed in _read_values(Path(path)):
        try:
            if isinstance(parsed, BadRow):
                raise parsed
            yield line, clean(parsed)
        except BadRow as bad:
            yield line, bad


def read_texts(path: Path) -> list[str]:
    """One text a row of a data file of either kind; a chat's is its contents, a line each.

    Bad rows are left out, with a count in print. Raises ``UserError`` if no row is left.
    """
    rows = [row for _, row in read_rows(path, clean_any)]
    good = [row for row in rows if not isinstance(row, BadRow)]
    if len(good) < len(rows):
        print(f"{path}: {len(rows) - len(good)} bad rows left out (scripts/inspect_data.py lists them)")
    if not good:
        raise UserError(f"no usable row in {path}; look at it with scripts/inspect_data.py")
    return [row["text"] if "text" in row else "\n".join(m["content"] for m in row["conversations"]) for row in good]


def clean_any(row: Any) -> dict:
    """A pretraining or a chat row, whichever it is, or ``BadRow``."""
    return clean_text(row) if isinstance(row, dict) and "text" in row else clean_chat(row)


def clean_text(row: Any) -> dict:
    """``{"text": str}`` with text in it, or ``BadRow``."""
    row = _object(row)
    if "text" not in row:
        raise BadRow(f'no "text" among its keys {_keys(row)}')
    return {"text": _content(row["text"], '"text"')}


def clean_chat(row: Any) -> dict:
    """``{"conversations": [{"role", "content"}, ...]}`` from any of the three chat formats, or ``BadRow``.

    The roles in the data are honoured: an optional system turn, then user and assistant in turn. At least one
    assistant turn, or there is nothing to learn.
    """
    row = _object(row)
    for key in ("conversations", "messages"):
        if key in row:
            return {"conversations": check_messages(row[key])}
    if "instruction" in row and "output" in row:
        question = _content(row["instruction"], '"instruction"')
        if row.get("input"):
            question += "\n" + _content(row["input"], '"input"')
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
        if row.get("system"):
            messages.insert(0, {"role": "system", "content": row["system"]})
        return {"conversations": check_messages(messages)}
    raise BadRow(f'no "conversations", "messages" or "instruction" with "output" among its keys {_keys(row)}')


def check_messages(messages: Any) -> list[dict]:
    """A list of ``{"role", "content"}`` in a legal order, without other keys. Raises ``BadRow``."""
    if not isinstance(messages, list) or not messages:
        raise BadRow("the conversation is not a list of messages")
    clean = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise BadRow(f'message {number} is not an object with "role" and "content"')
        role = message["role"]
        if role not in ROLES:
            raise BadRow(f"message {number} has role {role!r}, not one of {', '.join(ROLES)}")
        if role == "system" and number > 1:
            raise BadRow(f"message {number} is a system turn, which may only come first")
        if clean and role == clean[-1]["role"]:
            raise BadRow(f"messages {number - 1} and {number} are both from {role}")
        if role == "assistant" and (not clean or clean[-1]["role"] == "system"):
            raise BadRow(f"message {number} is an answer to no question")
        clean.append({"role": role, "content": _content(message["content"], f"message {number}")})
    if clean[-1]["role"] != "assistant":
        raise BadRow("the conversation does not end with an assistant turn")
    return clean


def _read_values(path: Path) -> Iterator[tuple[int, Any]]:
    if not path.is_file():
        raise UserError(f"data file {path} does not exist; check its path")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"data file {path} has an unknown ending; use one of {', '.join(SUFFIXES)}")
    try:
        lines = enumerate(_lines(path), 1)
        first = True
        for number, line in lines:
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            if first and line.lstrip().startswith(b"["):
                yield from _array_items(line + b"".join(rest for _, rest in lines), number)
                return
            first = False
            yield number, _parse(line.rstrip(b"\r\n"))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; download or copy it again") from error


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        yield from _zstd_lines(file, path) if path.suffix == ".zst" else file


def _zstd_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Lines of a zstd stream. (The package's own reader takes a truncated file for a whole one.)"""
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise UserError(f"{path} needs the zstandard package: pip install zstandard") from error
    line, frame = b"", None
    while chunk := file.read(1 << 20):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                *lines, line = (line + frame.decompress(chunk)).split(b"\n")
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            yield from (whole + b"\n" for whole in lines)
            chunk = frame.unused_data
            frame = None if frame.eof else frame
    if frame:
        raise EOFError("the compressed file ends too early")
    yield line


def _array_items(array: bytes, line: int) -> Iterator[tuple[int, Any]]:
    """Items of a JSON array, which begins on ``line``, each with its own line.

    After a broken item the rest cannot be told apart: it is one last ``BadRow``.
    """
    try:
        text = array.decode()
    except UnicodeDecodeError as error:
        line += array.count(b"\n", 0, error.start)
        yield line, BadRow(f"not UTF-8 ({error.reason}), the array is unreadable; re-save the file as UTF-8")
        return
    decoder = json.JSONDecoder()
    position = text.index("[") + 1
    counted = 0
    while True:
        position = _skip(text, position, " \t\r\n,")
        line, counted = line + text.count("\n", counted, position), position
        if position == len(text):
            yield line, BadRow("the JSON array is not closed")
            return
        if text[position] == "]":
            break
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield line, BadRow(f"invalid JSON, the rest of the array is unreadable: {getattr(error, 'msg', error)}")
            return
        yield line, _parse(text[position:end].encode())
        position = end
    end = _skip(text, position + 1, " \t\r\n")
    if end < len(text):
        yield line + text.count("\n", counted, end), BadRow("text after the end of the JSON array; give one row a line")


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode(), object_pairs_hook=_without_duplicates)
    except BadRow as bad:
        return bad
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 at byte {error.start + 1} of the line ({error.reason}); re-save the file as UTF-8")
    except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return BadRow(f"invalid JSON{column}: {getattr(error, 'msg', error)}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise BadRow("a key appears twice")
    return row


def _object(row: Any) -> dict:
    if not isinstance(row, dict):
        raise BadRow(f"a row must be a JSON object, not {type(row).__name__}")
    return row


def _content(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{where} is not text but {type(value).__name__}")
    if not value.strip():
        raise BadRow(f"{where} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{where} holds half of a surrogate pair, which is no Unicode text") from error
    return value


def _keys(row: dict) -> str:
    return "(" + ", ".join(map(repr, list(row)[:6])) + ")" if row else "(none)"
