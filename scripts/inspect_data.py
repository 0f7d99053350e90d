"""Show what training makes of data files: python scripts/inspect_data.py my_chats.jsonl"""

import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import run
from core.options import CheckedOptions, option, parse
from core.paths import TOKENIZER_DIR
from trainer.options import TrainOptions

BAR = 40  # characters of the longest bar


@dataclass
class Options(CheckedOptions):
    """Show samples, lengths and every bad row. Exit code 1: not all rows are usable."""

    files: tuple[Path, ...] = option((), "data files: pretraining or chat rows", positional=True)
    n: int = option(3, "rows to show token by token, the first ones of each file", at_least=0)
    max_seq_len: int = option(TrainOptions.max_seq_len, "tokens of a row or window", at_least=2)
    tokenizer_path: Path = option(TOKENIZER_DIR, "tokenizer folder")


@dataclass
class Report:
    """What one file holds. Tokens include the template's, characters and bytes do not."""

    bad: list[str] = field(default_factory=list)  # file:line: reason
    lengths: list[int] = field(default_factory=list)  # of all usable rows
    taken: list[int] = field(default_factory=list)  # of the rows that training uses, truncated
    characters: int = 0
    bytes: int = 0


def main(argv: list[str] | None = None) -> int:
    """Report on each file; returns the exit code: 0 if training can use every row, else 1."""
    options = parse(Options, argv)
    from dataset.cache import kind_of
    from dataset.tokenizer import load_tokenizer

    tokenizer, is_usable = load_tokenizer(options.tokenizer_path), True
    for path in options.files:
        kind = kind_of(path)
        report = inspect(path, kind, tokenizer, options)
        show(path, kind, report, options.max_seq_len)
        is_usable = is_usable and bool(report.taken) and not report.bad
    return 0 if is_usable else 1


def inspect(path: Path, kind, tokenizer, options: Options) -> Report:
    """Read ``path`` as training would and show its first rows; without a kind, all are bad."""
    from dataset.cache import TEXT
    from dataset.rows import BadRow, clean_any, clean_row, read_blocks

    report = Report()
    for block in read_blocks(path):
        clean = kind.clean if kind else clean_any
        rows = [(line, clean_row(row, clean)) for line, row in block.rows]
        report.bad += [f"{path}:{line}: {row}" for line, row in rows if isinstance(row, BadRow)]
        good = [(line, row[kind.key]) for line, row in rows if not isinstance(row, BadRow)]
        encoded = kind.encode(tokenizer, [row for _, row in good]) if kind else []
        for (line, row), (ids, learned) in zip(good, encoded, strict=True):
            if len(report.lengths) < options.n:
                show_row(f"{path}:{line}", ids, learned, kind, tokenizer, options.max_seq_len)
            text = row if kind is TEXT else "".join(message["content"] for message in row)
            report.lengths.append(len(ids))
            if kind is TEXT or any(learned[1 : options.max_seq_len]):
                report.taken.append(min(len(ids), options.max_seq_len))
            report.characters += len(text)
            report.bytes += len(text.encode())
    return report


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


def show(path: Path, kind, report: Report, max_seq_len: int) -> None:
    """Print the bad rows, the figures of the whole file and how its lengths are spread."""
    import numpy as np

    from dataset.batches import Batches

    names = {"text": "pretraining rows", "chat": "chat rows"}
    found = names[kind.name] if kind else "neither pretraining nor chat rows"
    rows, tokens = len(report.lengths), sum(report.lengths)
    print("", *report.bad, f"{path}: {found}", sep="\n")
    print(f"rows: {rows} usable, {len(report.bad)} bad")
    if not rows:
        return
    counts = [sum(length > max_seq_len for length in report.lengths), rows - len(report.taken)]
    long, left_out = (f"{count} ({100 * count / rows:.1f} %)" for count in counts)
    print(f"tokens: {tokens}, median {median(report.lengths):.0f}, longest {max(report.lengths)}")
    if kind.name == "text":
        print(f"longer than a window of {max_seq_len}: {long}; they are split, 0 % is truncated")
    else:
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
