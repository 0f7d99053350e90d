"""Show what training makes of data files: python scripts/inspect_data.py my_chats.jsonl"""

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import run
from core.options import CheckedOptions, option, parse
from core.paths import TOKENIZER_DIR
from dataset import rows
from scripts.exam import UNSPACED
from trainer.options import TrainOptions

BAR = 40  # characters of the longest bar
WORD = re.compile(rf"[{UNSPACED}]|[^\W\d_{UNSPACED}]+")  # where no space separates: a character
SHOWN_WORDS, KINDS = 30, ("words", "tokens")
KNOWN_HELP = (
    "what a base was trained on: list the words and tokens that no file or folder of these holds"
)
BESIDE = ("system", "system_prompt", "history")  # keys that are read beside a style's own


@dataclass
class Options(CheckedOptions):
    """Show samples, styles, lengths and every bad row. Exit code 1: not all rows are usable."""

    files: tuple[Path, ...] = option((), "data files or folders of them", positional=True)
    stage: Literal["auto", "pretrain", "sft", "dpo"] = option(
        "auto", "read a row's text, chat, or pair; auto: text or chat, as the first usable row"
    )
    n: int = option(3, "rows to show token by token, the first ones of each file", at_least=0)
    max_seq_len: int = option(TrainOptions.max_seq_len, "tokens of a row or window", at_least=2)
    tokenizer_path: Path = option(TOKENIZER_DIR, "tokenizer folder")
    known_data: tuple[Path, ...] = option((), KNOWN_HELP)


Options.__doc__ += f"\n\n{rows.__doc__}"


@dataclass
class Report:
    """What one file holds. Tokens include the template's, characters and bytes do not."""

    bad: list[str] = field(default_factory=list)  # file:line: reason
    styles: Counter = field(default_factory=Counter)  # rows by the keys that they are read from
    unused: Counter = field(default_factory=Counter)  # rows by a key that is not read
    answers: int = 0  # of the usable rows
    learned: int = 0  # of the answers
    spelled: int = 0  # rows that spell control tokens as text
    lengths: list[int] = field(default_factory=list)  # of all usable rows; of pairs, both chats
    taken: list[int] = field(default_factory=list)  # of the rows that training uses, truncated
    characters: int = 0
    bytes: int = 0


def main(argv: list[str] | None = None) -> int:
    """Report on each file; returns the exit code: 0 if training can use every row, else 1."""
    options = parse(Options, argv)
    from dataset.cache import CHAT, TEXT, kind_of
    from dataset.files import data_files
    from dataset.preferences import PAIR
    from dataset.tokenizer import load_tokenizer

    tokenizer, is_usable = load_tokenizer(options.tokenizer_path), True
    known = words_and_tokens(options.known_data, tokenizer)
    for path in data_files(options.files):
        kinds = {"pretrain": TEXT, "sft": CHAT, "dpo": PAIR}
        kind = kinds.get(options.stage) or kind_of(path)
        report = inspect(path, kind, tokenizer, options)
        show(path, kind, report, options.max_seq_len)
        if kind is CHAT and report.lengths:
            show_learned(tokenizer)
        if options.known_data:
            for name, own, read in zip(
                KINDS, words_and_tokens([path], tokenizer), known, strict=True
            ):
                show_unknown(name, own, read)
        is_usable = is_usable and bool(report.taken) and not report.bad
    return 0 if is_usable else 1


def words_and_tokens(paths: Sequence[Path], tokenizer) -> tuple[Counter, Counter]:
    """How often each word, in lower case, and each token stand in the usable rows of these files.

    A word that is known in lower case may be cut into other tokens where it has a capital.
    """
    from dataset.files import data_files, read_rows
    from dataset.tokenizer import spelled_bytes

    words, ids = Counter(), Counter()
    for path in data_files(paths) if paths else ():
        found = [row for _, row in read_rows(path, rows.clean_any)]
        texts = [t for row in found if not isinstance(row, rows.BadRow) for t in rows.texts_of(row)]
        for text in texts:
            words.update(WORD.findall(text.lower()))
        for encoded in tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ():
            ids.update(encoded)
    names = (repr(each.decode(errors="replace")) for each in spelled_bytes(tokenizer, list(ids)))
    return words, Counter(dict(zip(names, ids.values(), strict=True)))


def show_unknown(name: str, own: Counter, known: Counter) -> None:
    """Print what is in ``own`` and not ``known``, the most frequent first."""
    unknown = [(each, n) for each, n in own.most_common() if each not in known]
    print(f"{name} that the known data does not hold: {len(unknown)} of {len(own)}")
    if unknown:
        more = ", ..." if len(unknown) > SHOWN_WORDS else ""
        print("  " + ", ".join(f"{word} ({n})" for word, n in unknown[:SHOWN_WORDS]) + more)


def inspect(path: Path, kind, tokenizer, options: Options) -> Report:
    """Read ``path`` as training would and show its first rows; without a kind, all are bad."""
    from dataset.cache import CHAT
    from dataset.files import place_of, read_blocks
    from dataset.rows import BadRow, clean_any, clean_row, settle_control_text, texts_of
    from dataset.tokenizer import control_spelling

    report, reads, spelling = Report(), kind or CHAT, control_spelling(tokenizer)
    for block in read_blocks(path):
        clean = kind.clean if kind else clean_any
        cleaned = [(place, clean_row(row, clean)) for place, row in block.rows]
        report.spelled += settle_control_text(cleaned, spelling, "keep")[1]
        chosen = [row[reads.key] for _, row in cleaned if not isinstance(row, BadRow)]
        encoded = iter(reads.encode(tokenizer, chosen))
        for (place, row), (_, given) in zip(cleaned, block.rows, strict=True):
            outcome = row if isinstance(row, BadRow) else next(encoded)
            where = place_of(path, place)
            if isinstance(outcome, BadRow):
                report.bad.append(f"{where}: {outcome}")
                continue
            ids, learned = outcome
            if len(report.lengths) < options.n:
                show_row(where, ids, learned, reads, tokenizer, options.max_seq_len)
            count(report, given, row, learned, reads)
            report.lengths.append(len(ids))
            if reads is not CHAT or any(learned[1 : options.max_seq_len]):
                report.taken.append(min(len(ids), options.max_seq_len))
            text = "".join(texts_of(row))
            report.characters += len(text)
            report.bytes += len(text.encode())
    return report


def count(report: Report, given: bytes, row: dict, learned: list[bool], kind) -> None:
    """Add to a report how the row ``given`` was read, and how many of its answers are learned."""
    from dataset.rows import is_blank, parsed, style_of

    keys = parsed(given)
    style = style_of(keys, kind.name)
    report.styles[" + ".join(style)] += 1
    used = {*style, *(BESIDE if kind.name != "text" else ())}
    used |= {*rows.CHATS, *rows.QUESTIONS} if kind.name == "preference" else set()
    report.unused.update(key for key in keys if key not in used and not is_blank(keys[key]))
    chats = row.get("pair", row).values() if kind.name != "text" else ()
    report.answers += sum(turn["role"] == "assistant" for chat in chats for turn in chat)
    report.learned += sum(now and not before for before, now in pairwise([False, *learned]))


def show_row(place: str, ids: list[int], learned: list[bool], kind, tokenizer, max_seq_len: int):
    """Print each token as Python text, which shows blanks; part of a character as Python bytes."""
    from dataset.tokenizer import spelled_bytes

    print(f"\n{place}: {len(ids)} tokens\n{'token':<24} | {'id':>6} | learned")
    tokens = spelled_bytes(tokenizer, ids[:max_seq_len])
    for token_id, token, flag in zip(ids, tokens, learned, strict=False):
        try:
            text = repr(token.decode())
        except UnicodeDecodeError:
            text = repr(token)
        wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
        text += " " * (24 - len(text) - wide)
        print(f"{text} | {token_id:>6} | {'yes' if flag else '-'}")
    if len(ids) > max_seq_len:
        fate = "go to the next window" if kind.name == "text" else "are cut off"
        print(f"... {len(ids) - max_seq_len} more tokens {fate}")


def show_learned(tokenizer) -> None:
    """Print what is learned of a turn in this tokenizer's template, and what is unusual in it."""
    from dataset.chat import chat_notes, encode_chat

    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
    ids, learned = encode_chat(tokenizer, turns)
    text = tokenizer.decode([token for token, flag in zip(ids, learned, strict=True) if flag])
    print(f"learned of a turn: {text!r}", *(f"note: {n}" for n in chat_notes(tokenizer)), sep="\n")


def show(path: Path, kind, report: Report, max_seq_len: int) -> None:
    """Print the bad rows, the figures of the whole file and how its lengths are spread."""
    import numpy as np

    from dataset.batches import Batches

    names = {"text": "pretraining rows", "chat": "chat rows", "preference": "pairs"}
    found = names[kind.name] if kind else "neither pretraining nor chat rows"
    rows, tokens = len(report.lengths), sum(report.lengths)
    print("", *report.bad, f"{path}: {found}", sep="\n")
    print(f"rows: {rows} usable, {len(report.bad)} bad")
    if not rows:
        return
    for name, counter in (("read from", report.styles), ("set aside", report.unused)):
        if counter:
            print(f"{name}: {', '.join(f'{key} ({n} rows)' for key, n in counter.most_common())}")
    if report.answers:
        print(f"answers: {report.answers}, of which {report.learned} are learned")
    if report.spelled:
        print(f"rows that spell control tokens as text: {report.spelled}; see --control_text")
    counts = [sum(length > max_seq_len for length in report.lengths), rows - len(report.taken)]
    long, left_out = (f"{count} ({100 * count / rows:.1f} %)" for count in counts)
    print(f"tokens: {tokens}, median {median(report.lengths):.0f}, longest {max(report.lengths)}")
    if kind.name == "text":
        print(f"longer than a window of {max_seq_len}: {long}; they are split, 0 % is truncated")
    elif kind.name == "chat":
        print(f"truncated at {max_seq_len}: {long}")
        print(f"without targets after truncation, left out in training: {left_out}")
        if report.taken:  # on a CPU, with the doors' defaults
            door, chats = TrainOptions, SimpleNamespace(lengths=np.array(report.taken))
            epoch = Batches(chats, door.batch_size, door.accumulation_steps, door.seed)
            padding = f"{1 - epoch.useful_share():.1%}"
            print(f"padding in an epoch of training at batch {door.batch_size}: {padding}")
    characters, size = report.characters / tokens, report.bytes / tokens
    print(f"per token: {characters:.2f} characters, {size:.2f} bytes")
    counts = Counter((length - 1).bit_length() for length in report.lengths)
    for n in range(min(counts), max(counts) + 1):  # 2^(n-1) < length <= 2^n
        bar = "#" * -(-BAR * counts[n] // max(counts.values()))
        print(f"{2 ** (n - 1) + 1:>8} to {2**n:>8} tokens | {bar:<{BAR}} | {counts[n]}")


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
