"""The questions of chats, and how alike they are: the Jaccard index of character trigrams."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dataset.files import data_files, read_rows
from dataset.rows import BadRow, clean_chat, settle_control_text


def trigrams(text: str) -> set[str]:
    """The runs of three characters, case-folded and without punctuation; a shorter text is one."""
    bare = " ".join(re.sub(r"[^\w\s]|_", "", text.casefold()).split())
    return {bare[n : n + 3] for n in range(max(len(bare) - 2, 1))}


class Neighbours:
    """Tells how near a text is to the nearest of ``texts``, of which there may be thousands."""

    def __init__(self, texts: Iterable[str]):
        found = [trigrams(text) for text in dict.fromkeys(texts)]
        self._sizes = np.array([len(grams) for grams in found])
        holders = defaultdict(list)
        for n, grams in enumerate(found):
            for gram in grams:
                holders[gram].append(n)
        self._holders = {gram: np.array(numbers) for gram, numbers in holders.items()}

    def similarity(self, text: str) -> float:
        """Shared trigrams / trigrams of both, with the nearest text: 0 (none shared) to 1."""
        grams = trigrams(text)
        holders = [self._holders[gram] for gram in grams if gram in self._holders]
        if not holders:
            return 0.0
        shared = np.bincount(np.concatenate(holders), minlength=len(self._sizes))
        return float((shared / (self._sizes + len(grams) - shared)).max())


def chats_in(paths: Sequence[Path], *how: object, **more: object) -> Iterator[list[dict]]:
    """The messages of each usable chat of these files or folders, read as by ``rows_in``."""
    return map(chat_of, rows_in(paths, *how, **more))


def chat_of(row: dict) -> list[dict]:
    """The messages of a clean chat, or of the chosen chat of a clean pair."""
    return row["pair"]["chosen"] if "pair" in row else row["conversations"]


def rows_in(
    paths: Sequence[Path],
    spelling: re.Pattern | None = None,
    control_text: str = "keep",
    clean: Callable[[dict], dict] = clean_chat,
) -> Iterator[dict]:
    """What ``clean`` makes of each row that it can use, of these files or folders.

    ``control_text`` is what becomes of texts that spell a control token, as ``spelling`` finds.
    """
    for path in data_files(paths):
        rows = read_rows(path, clean)
        if spelling is not None:
            rows, _ = settle_control_text(list(rows), spelling, control_text)
        for _, row in rows:
            if not isinstance(row, BadRow):
                yield row


def questions_in(messages: list[dict]) -> list[str]:
    """The user turns of a chat."""
    return [message["content"] for message in messages if message["role"] == "user"]


def spread(items: Sequence, most: int) -> Sequence:
    """At most ``most`` items, evenly spread over all."""
    return [items[n * len(items) // most] for n in range(most)] if len(items) > most else items
