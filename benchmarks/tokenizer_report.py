"""Characters per token of the shipped tokenizer beside MiniMind's own 6,400 vocabulary, and exact
round trips.

python benchmarks/tokenizer_report.py --data_path FILE [FILE ...] --minimind CHECKOUT
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import run
from core.options import option, parse
from core.paths import REPOSITORY, TOKENIZER_DIR, bundled_data
from scripts.train_tokenizer import HELD_OUT, split_texts

RESULTS = REPOSITORY / "benchmarks" / "results" / "tokenizer.json"


@dataclass
class Options:
    """Compare two tokenizers on the texts that scripts/train_tokenizer.py held out, and check their
    round trips.
    """

    data_path: tuple[Path, ...] = option(
        (bundled_data("pretrain_mini.jsonl"), bundled_data("sft_mini.jsonl")),
        "data files: pretraining or chat rows",
    )
    minimind: Path = option(
        Path("minimind"), "checkout of MiniMind, with model/minimind_tokenizer/tokenizer.json"
    )
    results: Path = option(RESULTS, "file to write")


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    from benchmarks.result_file import measured_on, write_results
    from dataset.rows import read_texts

    tokenizers = {
        "ours": load(TOKENIZER_DIR),
        "minimind": load(options.minimind / "model" / "minimind_tokenizer"),
    }
    files = {}
    for path in options.data_path:
        _, texts = split_texts(read_texts(path))
        files[path.name] = {"rows": len(texts), "characters": sum(map(len, texts))} | {
            name: measure(tokenizer, texts) for name, tokenizer in tokenizers.items()
        }
    report = measured_on(("tokenizers",)) | {
        "held_out": f"every {HELD_OUT}th row of a file, the first included",
        "entries": {name: tokenizer.get_vocab_size() for name, tokenizer in tokenizers.items()},
        "files": files,
    }
    write_results(options.results, report)
    print(table(files))
    return report


def load(folder: Path):
    """The bare BPE, without control tokens: text alone is compared, as each tokenizer's vocabulary
    spells it.
    """
    from tokenizers import Tokenizer

    from core.errors import UserError

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a checkout of MiniMind with --minimind")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def measure(tokenizer, texts: list[str]) -> dict:
    """Tokens of all texts, characters and UTF-8 bytes per token, and how many texts do not come
    back exactly.
    """
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    tokens = sum(map(len, encoded))
    back = tokenizer.decode_batch(encoded, skip_special_tokens=False)
    return {
        "tokens": tokens,
        "characters_per_token": round(sum(map(len, texts)) / tokens, 4),
        "bytes_per_token": round(sum(len(text.encode()) for text in texts) / tokens, 4),
        "not_round_trip": sum(text != decoded for text, decoded in zip(texts, back, strict=True)),
    }


def table(files: dict) -> str:
    lines = [
        "| file | held-out rows | ours | MiniMind's | ours / MiniMind's | round trips: ours, MiniMind's |"
    ]
    lines.append("|---|---:|---:|---:|---:|---|")
    for name, figures in files.items():
        ours, theirs = figures["ours"], figures["minimind"]
        left, right = ours["characters_per_token"], theirs["characters_per_token"]
        exact = [
            f"{figures['rows'] - one['not_round_trip']} of {figures['rows']}"
            for one in (ours, theirs)
        ]
        lines.append(
            f"| {name} | {figures['rows']} | {left:.3f} | {right:.3f} | {left / right:.2f} | {', '.join(exact)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
