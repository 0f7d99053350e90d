"""From a data file to clean rows: ``{"text"}`` for pretraining, ``{"conversations"}`` for chats.

A row that cannot be used is reported as ``file:line: reason`` and never reaches the model.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from core.errors import UserError
from dataset.blocks import BadRow, Block, read_blocks

ROLES = ("system", "user", "assistant")
SHOWN_BAD_ROWS = 20


def read_rows(path: Path, clean: Callable[[Any], dict]) -> Iterator[tuple[int, dict | BadRow]]:
    """Yield ``(line number, row)`` for every row of ``path``; the row is a ``BadRow`` when
    ``clean`` refuses it.

    ``clean`` makes a row of what was parsed, or raises ``BadRow``. Reads what ``read_blocks``
    reads.
    """
    for block in read_blocks(path):
        yield from clean_rows(block, clean)


def clean_rows(block: Block, clean: Callable[[Any], dict]) -> Iterator[tuple[int, dict | BadRow]]:
    """``(line number, row)`` of a block's rows, as ``read_rows`` gives them."""
    for number, line in block.lines:
        try:
            parsed = line if isinstance(line, BadRow) else _parse(line)
            if isinstance(parsed, BadRow):
                raise parsed
            yield number, clean(parsed)
        except BadRow as bad:
            yield number, bad


def settle_bad_rows(count: int, shown: list[str], bad_rows: str) -> None:
    """Go on without ``count`` bad rows, of which ``shown`` are the first, if ``bad_rows`` is
    "skip"; it is printed.

    Raises ``UserError`` otherwise, if there are any; ``bad_rows`` "refuse" is for where skipping is
    no choice.
    """
    if count and bad_rows == "skip":
        print(f"bad rows skipped: {count}, the first {shown[0]}")
    elif count:
        advice = "" if bad_rows == "refuse" else " or pass --bad_rows skip"
        print("\n".join(shown), *["..."] * (count > len(shown)), sep="\n", flush=True)
        raise UserError(f"{count} bad rows, the first {shown[0]}; mend them{advice}")


def read_texts(path: Path) -> list[str]:
    """One text a row of a data file of either kind; a chat's is its contents, a line each.

    Bad rows are left out, with a count in print. Raises ``UserError`` if no row is left.
    """
    rows = [row for _, row in read_rows(path, clean_any)]
    good = [row for row in rows if not isinstance(row, BadRow)]
    if len(good) < len(rows):
        print(
            f"{path}: {len(rows) - len(good)} bad rows left out (scripts/inspect_data.py lists them)"
        )
    if not good:
        raise UserError(f"no usable row in {path}; look at it with scripts/inspect_data.py")
    return [
        row["text"] if "text" in row else "\n".join(m["content"] for m in row["conversations"])
        for row in good
    ]


def clean_any(row: Any) -> dict:
    """A pretraining or a chat row, whichever it is, or ``BadRow``."""
    return clean_text(row) if isinstance(row, dict) and "text" in row else clean_chat(row)


def clean_text(row: Any) -> dict:
    """``{"text": str}`` with text in it, or ``BadRow``."""
    row = _object(row)
    if "text" not in row:
        raise BadRow(f'no "text" among its keys {keys_of(row)}')
    return {"text": content(row["text"], '"text"')}


def clean_chat(row: Any) -> dict:
    """``{"conversations": [{"role", "content"}, ...]}`` from any of the three chat formats, or
    ``BadRow``.

    The roles in the data are honoured: an optional system turn, then user and assistant in turn. At
    least one assistant turn, or there is nothing to learn.
    """
    row = _object(row)
    for key in ("conversations", "messages"):
        if key in row:
            return {"conversations": check_messages(row[key])}
    if "instruction" in row and "output" in row:
        question = content(row["instruction"], '"instruction"')
        if row.get("input"):
            question += "\n" + content(row["input"], '"input"')
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": row["output"]},
        ]
        if row.get("system"):
            messages.insert(0, {"role": "system", "content": row["system"]})
        return {"conversations": check_messages(messages)}
    raise BadRow(
        f'no "conversations", "messages" or "instruction" with "output" among its keys {keys_of(row)}'
    )


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
        clean.append({"role": role, "content": content(message["content"], f"message {number}")})
    if clean[-1]["role"] != "assistant":
        raise BadRow("the conversation does not end with an assistant turn")
    return clean


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode(), object_pairs_hook=_without_duplicates)
    except BadRow as bad:
        return bad
    except UnicodeDecodeError as error:
        return BadRow(
            f"not UTF-8 at byte {error.start + 1} of the row ({error.reason}); re-save the file as UTF-8"
        )
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


def content(value: Any, where: str) -> str:
    """``value``, if it is a text with something in it, else ``BadRow``; ``where`` names it."""
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
