"""Tokenise data files ahead of training: python scripts/prepare_data.py my.jsonl

Training, which would do the same itself, must be given the same files in the same order.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import UserError, run
from core.options import CheckedOptions, option, parse
from core.paths import TOKENIZER_DIR, cache_dir
from trainer.options import TrainOptions


@dataclass
class Options(CheckedOptions):
    """Tokenise rows into out/cache, where training with the same --out_dir finds them."""

    files: tuple[Path, ...] = option((), "data files of one run, texts or chats", positional=True)
    stage: Literal["auto", "pretrain", "sft", "dpo"] = option(
        "auto", "tokenise rows' texts, chats, or pairs; auto: texts or chats, as the first one"
    )
    out_dir: Path = option(TrainOptions.out_dir, "folder of all results, made if missing")
    tokenizer_path: Path = option(TOKENIZER_DIR, "tokenizer folder")
    bad_rows: Literal["stop", "skip"] = option(TrainOptions.bad_rows, "what to do about bad rows")
    control_text: Literal["keep", "drop", "refuse"] = option(
        TrainOptions.control_text, "what to do about control tokens that a row spells as text"
    )
    workers: int = option(0, "processes; 0: one for each core", at_least=0)


def main(argv: list[str] | None = None) -> None:
    options = parse(Options, argv)
    from dataset.cache import CHAT, TEXT, kind_of, tokenize_files
    from dataset.preferences import PAIR
    from dataset.tokenizer import load_tokenizer

    first = options.files[0]
    kinds = {"pretrain": TEXT, "sft": CHAT, "dpo": PAIR}
    kind = kinds.get(options.stage) or kind_of(first)
    if kind is None:
        raise UserError(f"no usable row in {first}; look at it with scripts/inspect_data.py")
    tokenizer, cache = load_tokenizer(options.tokenizer_path), cache_dir(options.out_dir)
    how = options.bad_rows, options.control_text, options.workers
    rows = tokenize_files(options.files, kind, tokenizer, cache, *how)
    print(f"{len(rows.lengths):,} {kind.name} rows, {int(rows.lengths.sum()):,} tokens in {cache}")


if __name__ == "__main__":
    run(main)
