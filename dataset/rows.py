"""What a row is: one text, or one chat, in whichever style it is written.

    text       {"text": "..."}
    messages   {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]},
               or conversations, conversation, dialog; a bare list; {"from": "human", "value": ...}
    roles      user, human; assistant, gpt, bot, model, chatgpt; system, developer; in any case
    contents   texts, or lists of {"type": "text", "text": "..."}
    Alpaca     {"instruction", "input", "output"}, perhaps with "history": [["...", "..."], ...]
    columns    prompt, query, question, q, instruction or input, with
               response, answer, a, output, completion or target
    system     "system" or "system_prompt" beside a chat: its system turn
    unlearned  an answer with "weight": 0, "loss": false, "train": false or "masked": true is
               context only

Any other row is reported as ``file:line: reason`` and never reaches the model: so are rows with
tool calls or reasoning fields, with preferences (chosen, rejected), or with two readings.
"""

import json
import re
from collections.abc import Callable
from difflib import SequenceMatcher
from typing import Any

LIST = "list of messages"  # the key that a chat gets which is a bare list
CHATS = ("conversations", "messages", "conversation", "dialog", LIST)
QUESTIONS = ("prompt", "query", "question", "q", "instruction", "input")
ANSWERS = ("response", "answer", "a", "output", "completion", "target")
STYLES = (  # usual ones, of which a reason names the nearest
    *(("messages",), ("conversations",), ("conversation",), ("dialog",)),
    *(("instruction", "output"), ("prompt", "response"), ("question", "answer")),
    *(("query", "response"), ("prompt", "completion"), ("input", "output"), ("input", "target")),
)
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt"), "assistant"),
}
TOOL_ROLES = ("tool", "tool_call", "tool_response", "function", "function_call", "observation")
NOT_LEARNED = ("tool_calls", "function_call", "tools", "reasoning_content", "reasoning", "thinking")
MARKS = {"weight": 0, "loss": 0, "train": 0, "masked": 1}  # an answer with it is context only
JSON_TYPES = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}


class BadRow(Exception):
    """Why one row is unusable; the message is the reason alone."""


def clean_row(row: bytes | BadRow, clean: Callable[[dict], dict]) -> dict | BadRow:
    """What ``clean``, such as ``clean_chat``, makes of a row's JSON, or why it cannot."""
    try:
        return clean(parsed(row))
    except BadRow as bad:
        return bad


def parsed(row: bytes | BadRow) -> dict:
    """The JSON object of a row, without null values; a bare list stands at ``LIST``.

    Raises ``BadRow``.
    """
    if isinstance(row, BadRow):
        raise row
    try:
        found = json.loads(row.decode(), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        place = f"byte {error.start + 1} of the row ({error.reason})"
        raise BadRow(f"not UTF-8 at {place}; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:  # a number may have too many digits for Python
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadRow(f"invalid JSON{column}: {getattr(error, 'msg', error)}") from error
    found = {LIST: found} if isinstance(found, list) else found
    if not isinstance(found, dict):
        raise BadRow(f"a row must be a JSON object, not {type_of(found)}")
    return {key: value for key, value in found.items() if value is not None}


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
    (key,) = style_of(row, "text")
    return {"text": content(row[key], f'"{key}"')}


def clean_chat(row: dict) -> dict:
    """``{"conversations": [{"role", "content"}, ...]}`` from a row of any chat style.

    An optional system turn, then user and assistant in turn, the last an assistant's. An answer
    that is context only also has ``"learned": False``. Raises ``BadRow``.
    """
    messages, clean, before = _messages_of(row, style_of(row, "chat")), [], None
    for number, message in enumerate(messages, 1):
        turn = _clean_message(message, f"message {number}")
        role = turn["role"]
        if role == "system" and number > 1:
            raise BadRow(f"message {number} is a system turn, which may only come first")
        if role == before:
            raise BadRow(f"messages {number - 1} and {number} are both from {role}")
        if role == "assistant" and before != "user":
            raise BadRow(f"message {number} is an answer to no question")
        if turn["content"]:
            clean.append(turn)
        before = role
    if before != "assistant":
        raise BadRow("the conversation does not end with an assistant turn")
    keys = [key for key in ("system", "system_prompt") if not is_blank(row.get(key))]
    named = {content(row[key], f'"{key}"') for key in keys}
    if clean[0]["role"] == "system":
        named.add(clean.pop(0)["content"])
    if len(named) > 1:
        raise BadRow("the row has two different system turns; keep one")
    return {"conversations": [{"role": "system", "content": text} for text in named] + clean}


def style_of(row: dict, kind: str) -> tuple[str, ...]:
    """The keys that a row is read from for a ``kind`` of training: text, chat or preference.

    Raises ``BadRow``, with the keys found, where the row has no reading or more than one.
    """
    if kind == "text" and "text" in row:
        return ("text",)
    if {"chosen", "rejected"} <= row.keys():
        if kind == "preference":
            return ("chosen", "rejected")
        raise BadRow("a preference row (chosen, rejected), which this training does not learn from")
    if kind == "chat" and isinstance(row.get("label"), bool):
        raise BadRow("a label that is true or false makes it a preference row; this learns answers")
    chats = [key for key in CHATS if not is_blank(row.get(key))]
    if chats and row.get("history"):
        chats.append("history")
    if kind == "chat" and len(chats) == 1:
        return (chats[0],)
    questions, answers = [_named(row, keys) if not chats else [] for keys in (QUESTIONS, ANSWERS)]
    readings = len(questions) * len(answers) - (questions == ["instruction", "input"])
    if kind != "chat" or not (chats or readings):
        raise BadRow(_not_understood(row, kind))
    if len(chats) > 1 or readings > 1:
        found = chats or [*questions, *answers]
        raise BadRow(f"more than one reading, by the keys {', '.join(found)}; keep one chat")
    context = [] if is_blank(row.get("context")) else ["context"]  # as Dolly has it
    return (*questions, *context, *answers)


def _named(row: dict, keys: tuple[str, ...]) -> list[str]:
    """Those of ``keys`` whose value is not blank; or else one that is there."""
    found = [key for key in keys if key in row]
    return [key for key in found if not is_blank(row[key])] or found[:1]


def _not_understood(row: dict, kind: str) -> str:
    """The keys of a row without a reading, and the style of chats that they are most like."""
    if kind == "preference":
        return f'no "chosen" and "rejected" among its keys {keys_of(row)}: it is no pair'
    if kind == "text":
        return f'no "text" among its keys {keys_of(row)}, and pretraining reads nothing else'
    if "text" in row:
        return f'a row with "text" among its keys {keys_of(row)} is for pretraining; give chats'

    def likeness(style: tuple[str, ...]) -> float:
        ratios = (max([SequenceMatcher(None, k, key).ratio() for k in row] or [0]) for key in style)
        return sum(ratios) / len(style)

    nearest = " with ".join(f'"{key}"' for key in max(STYLES, key=likeness))
    return f"no style of chats has its keys {keys_of(row)}; the nearest one has {nearest}"


def _messages_of(row: dict, keys: tuple[str, ...]) -> list:
    """The messages of a chat row that is read from ``keys``; not yet checked."""
    _refuse_not_learned(row, "the row")
    if keys[0] in CHATS:
        if not (messages := _list(row[keys[0]], "the conversation")):
            raise BadRow("the conversation is an empty list")
        return messages
    *questions, answer = keys
    turns, history = [], row.get("history")
    for number, pair in enumerate([] if is_blank(history) else _list(history, '"history"'), 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f'part {number} of "history" is no [question, answer] pair')
        turns += [("user", pair[0]), ("assistant", pair[1])]
    if are_messages(row[questions[0]]):
        last = row[answer] if are_messages(row[answer]) else [("assistant", row[answer])]
        turns += [*row[questions[0]], *last]
    else:
        question = "\n".join(content(row[key], f'"{key}"') for key in questions)
        turns += [("user", question), ("assistant", content(row[answer], f'"{answer}"'))]
    return [t if isinstance(t, dict) else {"role": t[0], "content": t[1]} for t in turns]


def are_messages(value: Any) -> bool:
    """Whether ``value`` is a list of what looks like messages."""
    turns = [m for m in value if isinstance(m, dict)] if isinstance(value, list) else []
    return any(turn.keys() & {"role", "from"} for turn in turns)


def _clean_message(message: Any, where: str) -> dict:
    """``{"role", "content"}``, perhaps with ``"learned": False``; a blank system turn is ""."""
    if not isinstance(message, dict):
        raise BadRow(f"{where} is not an object but {type_of(message)}")
    if len(message) > 2 or "content" not in message:
        message = {key: value for key, value in message.items() if value is not None}
        _refuse_not_learned(message, where)
    name = message.get("role", message.get("from"))
    known = str(name).lower()
    if known in TOOL_ROLES:
        raise BadRow(f"{where} is a {known} turn, which is not learned here")
    if known not in ROLES:
        raise BadRow(f'{where} has "role" {name!r}, none of {", ".join(ROLES)}')
    role, text = ROLES[known], message.get("content", message.get("value"))
    if role == "system" and is_blank(text):
        return {"role": role, "content": ""}
    turn = {"role": role, "content": content(text, where)}
    for mark in MARKS.keys() & message.keys() if role == "assistant" else ():
        value, off = message[mark], MARKS[mark]
        if value not in (0, 1):  # true and false are, too
            raise BadRow(f'{where} has "{mark}" {value!r}, which is neither on nor off')
        if value == off:
            turn["learned"] = False
    return turn


def _refuse_not_learned(holder: dict, where: str) -> None:
    for key in NOT_LEARNED:
        if holder.get(key) not in (None, "", [], {}, "[]", "{}"):
            raise BadRow(f"{where} holds {key}: that is not learned here")


def content(value: Any, where: str) -> str:
    """``value``, a text or a list of text parts, if it is not blank. ``BadRow`` names ``where``."""
    if isinstance(value, list):
        value = "".join(_text_of(part, where) for part in value)
    if not isinstance(value, str):
        raise BadRow(f"{where} is not text but {type_of(value)}")
    if is_blank(value):
        raise BadRow(f"{where} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{where} holds half of a surrogate pair, which is no Unicode text") from error
    return value


def _text_of(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise BadRow(f"{where} is a list that holds {type_of(part)}, not a part with a type")
    if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        raise BadRow(f"{where} holds a part of type {part.get('type')!r}; only texts are learned")
    return part["text"]


def _list(value: Any, where: str) -> list:
    if not isinstance(value, list):
        raise BadRow(f"{where} is not a list but {type_of(value)}")
    return value


def is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def type_of(value: Any) -> str:
    """What JSON calls the type of ``value``, with an article."""
    return JSON_TYPES.get(type(value), "text" if isinstance(value, str) else "a number")


def keys_of(row: dict) -> str:
    """The first keys of a row, for a message."""
    return "(" + ", ".join(map(repr, list(row)[:6])) + ")" if row else "(none)"


def settle_control_text(
    cleaned: list[tuple[Any, dict | BadRow]], spelling: re.Pattern, control_text: str
) -> tuple[list[tuple[Any, dict | BadRow]], int]:
    """Clean rows, and how many of them match ``spelling``: kept, without it, or refused."""
    settled, spelled = [], 0
    for place, row in cleaned:
        found = None if isinstance(row, BadRow) else spelling.search("\n".join(texts_of(row)))
        spelled += found is not None
        if found and control_text == "refuse":
            row = BadRow(f"it spells the control token {found[0]} as text")
        elif found and control_text == "drop":
            row = _without(row, spelling)
        settled.append((place, row))
    return settled, spelled


def _without(row: dict, spelling: re.Pattern) -> dict | BadRow:
    texts = texts_of(row)
    for number, text in enumerate(texts):
        while (shorter := spelling.sub("", text)) != text:  # what is left may spell one again
            text = shorter
        texts[number] = text
    if not all(map(str.strip, texts)):
        return BadRow("it holds nothing but control tokens in a text")
    if "text" in row:
        return {"text": texts[0]}
    left = iter(texts)
    chats = {
        side: [{**turn, "content": next(left)} for turn in chat]
        for side, chat in row.get("pair", row).items()
    }
    return {"pair": chats} if "pair" in row else chats


def texts_of(row: dict) -> list[str]:
    """The text of a clean row, or the contents of its messages."""
    if "text" in row:
        return [row["text"]]
    return [turn["content"] for chat in row.get("pair", row).values() for turn in chat]
