"""Show what training makes of data files, and every row it cannot use: python
scripts/inspect_data.py my_chats.jsonl
"""

import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import median
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import run
from core.options import option, parse, require
from core.paths import TOKENIZER_DIR
from trainer.options import TrainOptions

ROWS_AT_ONCE = 1000  # encoded together
BAR = 40  # characters of the longest bar
ROW_NAMES = {
    "text": "pretraining rows",
    "chat": "chat rows",
    "unknown": "neither pretraining nor chat rows",
}


@dataclass
class Options:
    """Show samples token by token, lengths and shares, and list every bad row. Exit code 1: not all
    rows are usable.
    """

    files: tuple[Path, ...] = option((), "data files: pretraining or chat rows", positional=True)
    n: int = option(3, "rows to show token by token, the first ones of each file")
    max_seq_len: int = option(TrainOptions.max_seq_len, "tokens of a row or window in training")
    tokenizer_path: Path = option(TOKENIZER_DIR, "tokenizer folder")

    def __post_init__(self):
        require(self.n >= 0, f"--n {self.n} must not be negative")
        require(self.max_seq_len >= 2, f"--max_seq_len {self.max_seq_len} must be at least 2")


@dataclass
class Report:
    """What was found in one file. Tokens include the template's, characters and bytes are the
    contents' alone.
    """

    kind: str
    bad: list[str] = field(default_factory=list)  # file:line: reason
    samples: list[tuple[int, list[int], list[bool]]] = field(
        default_factory=list
    )  # line, ids, learned
    lengths: list[int] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)  # of the rows that training uses, truncated
    characters: int = 0
    bytes: int = 0


def main(argv: list[str] | None = None) -> int:
    """Report on each file; returns the exit code: 0 if training can use every row, else 1."""
    options = parse(Options, argv)
    from dataset.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer_path)
    exit_code = 0
    for path in options.files:
        report = inspect(path, tokenizer, options)
        show(path, report, tokenizer, options.max_seq_len)
        if report.bad or not report.taken:
            exit_code = 1
    return exit_code


def inspect(path: Path, tokenizer, options: Options) -> Report:
    """Read ``path`` once, as training would."""
    from dataset.rows import BadRow, read_rows
    from dataset.tokenized import TEXT

    kind = detect(path)
    report = Report(kind.name)
    rows = read_rows(path, kind.clean)
    while some := list(islice(rows, ROWS_AT_ONCE)):
        report.bad += [f"{path}:{line}: {row}" for line, row in some if isinstance(row, BadRow)]
        good = [(line, row) for line, row in some if not isinstance(row, BadRow)]
        encoded = kind.encode(tokenizer, [row for _, row in good])
        for (line, row), (ids, learned) in zip(good, encoded, strict=True):
            if len(report.samples) < options.n:
                report.samples.append((line, ids, learned))
            contents = (
                [row["text"]]
                if kind is TEXT
                else [message["content"] for message in row["conversations"]]
            )
            report.lengths.append(len(ids))
            if kind is TEXT or any(learned[1 : options.max_seq_len]):
                report.taken.append(min(len(ids), options.max_seq_len))
            report.characters += sum(map(len, contents))
            report.bytes += sum(len(content.encode()) for content in contents)
    return report


def detect(path: Path):
    """The kind of the first usable row; rows of the other kind are bad, as they are in training."""
    from dataset.rows import BadRow, clean_any, read_rows
    from dataset.tokenized import CHAT, TEXT

    for _, row in read_rows(path, clean_any):
        if not isinstance(row, BadRow):
            return TEXT if "text" in row else CHAT
    return replace(CHAT, name="unknown", clean=clean_any)


def show(path: Path, report: Report, tokenizer, max_seq_len: int) -> None:
    for line, ids, learned in report.samples:
        print(f"\n{path}:{line}: {len(ids)} tokens\n{'token':<24} | {'id':>6} | learned")
        for token_id, flag in list(zip(ids, learned, strict=True))[:max_seq_len]:
            print(f"{spelling(tokenizer, token_id, 24)} | {token_id:>6} | {'yes' if flag else '-'}")
        if len(ids) > max_seq_len:
            fate = "go to the next window" if report.kind == "text" else "are cut off"
            print(f"... {len(ids) - max_seq_len} more tokens {fate}")
    print("", *report.bad, f"{path}: {ROW_NAMES[report.kind]}", sep="\n")
    rows, tokens = len(report.lengths), sum(report.lengths)
    print(f"rows: {rows} usable, {len(report.bad)} bad")
    if not rows:
        return
    long = sum(length > max_seq_len for length in report.lengths)
    print(f"tokens: {tokens}, median {median(report.lengths):.0f}, longest {max(report.lengths)}")
    if report.kind == "text":
        print(
            f"longer than a window of {max_seq_len}: {share(long, rows)}; they are split, 0 % is truncated"
        )
    else:
        left_out = rows - len(report.taken)
        print(f"truncated at {max_seq_len}: {share(long, rows)}")
        print(f"without targets after truncation, left out in training: {share(left_out, rows)}")
        if report.taken:
            print(
                f"padding in an epoch of training at batch {TrainOptions.batch_size}: {padding(report.taken):.1%}"
            )
    print(
        f"per token: {report.characters / tokens:.2f} characters, {report.bytes / tokens:.2f} bytes"
    )
    histogram(report.lengths)


def padding(lengths: list[int]) -> float:
    """The part of all computed tokens that is padding, in one epoch on a CPU with the doors'
    defaults.
    """
    import numpy as np

    from dataset.batches import Batches

    chats = SimpleNamespace(lengths=np.array(lengths))
    epoch = Batches(
        chats, TrainOptions.batch_size, TrainOptions.accumulation_steps, TrainOptions.seed
    )
    return 1 - epoch.useful_share()


def histogram(lengths: list[int]) -> None:
    counts = Counter((length - 1).bit_length() for length in lengths)  # n: 2^(n-1) < length <= 2^n
    most = max(counts.values())
    for n in range(min(counts), max(counts) + 1):
        bar = "#" * -(-BAR * counts[n] // most)
        print(f"{2 ** (n - 1) + 1:>8} to {2**n:>8} tokens | {bar:<{BAR}} | {counts[n]}")


def spelling(tokenizer, token_id: int, columns: int) -> str:
    """A token as Python text, so that blanks and newlines show; part of a character as Python
    bytes. Padded.
    """
    from dataset.tokenizer import spelled_bytes

    spelled = spelled_bytes(tokenizer, token_id)
    try:
        text = repr(spelled.decode())
    except UnicodeDecodeError:
        text = repr(spelled)
    wide = sum(
        unicodedata.east_asian_width(character) in "WF" for character in text
    )  # two columns each
    return text + " " * (columns - len(text) - wide)


def share(part: int, whole: int) -> str:
    return f"{part} ({100 * part / whole:.1f} %)"


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
