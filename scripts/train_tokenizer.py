"""Train a byte-level BPE tokenizer: python scripts/train_tokenizer.py --data_path a.jsonl b.json"""

import json
import random
import sys
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import UserError, run
from core.files import atomic_write
from core.options import CheckedOptions, option, parse
from core.paths import bundled_data

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # pad, bos, eos: ids 0, 1, 2
BYTES = 256
HELD_OUT = 20
BUNDLED = (bundled_data("pretrain_mini.jsonl"), bundled_data("sft_mini"))
MOST_CHARACTERS = 5_000_000  # of Chinese, about 1 GB of memory; of English, a tenth
CHARACTERS_HELP = "train on about so many characters of each file, drawn at random; 0: all"
# ChatML without a default system prompt. The generation marks tell other trainers what is learned.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass
class Options(CheckedOptions):
    """Train a byte-level BPE tokenizer on data files and report how well it packs held-out rows."""

    data_path: tuple[Path, ...] = option(BUNDLED, "data files: pretraining or chat rows")
    vocab_size: int = option(6400, "entries; 259 are bytes and special tokens", at_least=BYTES + 3)
    tokenizer_path: Path = option(Path("out/tokenizer"), "folder to write")
    max_characters: int = option(MOST_CHARACTERS, CHARACTERS_HELP, at_least=0)
    held_out: int = option(HELD_OUT, "every N-th row is held out for the report", at_least=2)


def main(argv: list[str] | None = None) -> Path:
    options = parse(Options, argv)
    from dataset.files import data_files

    paths = data_files(options.data_path)
    drawn = (learned_texts(path, options.held_out, options.max_characters) for path in paths)
    tokenizer = train_bpe(chain.from_iterable(drawn), options.vocab_size)
    if len(tokenizer) < options.vocab_size:
        wrong = f"the data yields only {len(tokenizer)} entries, not --vocab_size"
        raise UserError(f"{wrong} {options.vocab_size}: give more data or a smaller size")
    save_tokenizer(tokenizer, options.tokenizer_path)
    print(f"{len(tokenizer)} entries -> {options.tokenizer_path}\n")
    print("file | held-out rows | characters per token")
    for path in paths:
        rows = characters = tokens = 0
        for text in texts_of(path, options.held_out, held_out=True):
            rows, characters = rows + 1, characters + len(text)
            tokens += len(tokenizer(text, add_special_tokens=False).input_ids)
        print(f"{path.name} | {rows} | {characters / tokens:.3f}")
    return options.tokenizer_path


def texts_of(path: Path, every: int = HELD_OUT, *, held_out: bool) -> Iterator[str]:
    """The texts to train on, or every N-th, the first included, which is held out for figures.

    A chat's contents make one text. Bad rows are left out, with a line that counts them. Raises
    ``UserError`` for a file without a usable row.
    """
    from dataset.files import read_rows
    from dataset.rows import BadRow, clean_any, texts_of

    good = bad = 0
    for _, row in read_rows(path, clean_any):
        if isinstance(row, BadRow):
            bad += 1
            continue
        if (good % every == 0) == held_out:
            yield "\n".join(texts_of(row))
        good += 1
    if bad and held_out:
        print(f"{path}: {bad} bad rows left out")
    if not good:
        raise UserError(f"no usable row in {path}; give rows with a text or with a conversation")


def learned_texts(path: Path, every: int, max_characters: int) -> Iterator[str]:
    """Random texts of a file, always the same ones, about ``max_characters`` in all; 0: all.

    A cap keeps a large file from spending the whole vocabulary on its own language. The file is
    read twice, so that no more than the lengths of its texts is held.
    """
    texts = texts_of(path, every, held_out=False) if max_characters else ()
    lengths = array("q", map(len, texts))
    chosen = draw(lengths, max_characters)
    if len(chosen) < len(lengths):
        shares = f"{sum(lengths[n] for n in chosen):,} of {sum(lengths):,}"
        print(f"{path.name}: {shares} characters are drawn; --max_characters 0 takes all")
    for n, text in enumerate(texts_of(path, every, held_out=False)):
        if not max_characters or n in chosen:
            yield text


def draw(lengths: Sequence[int], max_characters: int) -> set[int]:
    """The numbers of random texts of these lengths, until ``max_characters`` are reached."""
    drawn, chosen = 0, set()
    for number in random.Random(0).sample(range(len(lengths)), len(lengths)):
        if drawn >= max_characters:
            break
        drawn += lengths[number]
        chosen.add(number)
    return chosen


def train_bpe(texts: Iterator[str], vocab_size: int):
    """A ``PreTrainedTokenizerFast`` for any Unicode text; ids 0, 1, 2 are pad, bos and eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    wanted = {"vocab_size": vocab_size, "special_tokens": list(SPECIAL_TOKENS)}
    wanted["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    progress = sys.stderr.isatty()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(**wanted, show_progress=progress))
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=True))
    settings = {"chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names, **settings)


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write ``folder``, whole or not at all, in a form that transformers 4 and 5 read alike.

    Raises ``UserError`` if the disk refuses, or if another tokenizer is there: models may need it.
    """
    from dataset.tokenizer import load_tokenizer, tokenizer_fingerprint

    if (folder / "tokenizer.json").exists():
        if tokenizer_fingerprint(load_tokenizer(folder)) == tokenizer_fingerprint(tokenizer):
            return
        wrong = f"{folder} holds another tokenizer, which models may have been trained with"
        raise UserError(f"{wrong}; delete it or choose another --tokenizer_path")
    with tempfile.TemporaryDirectory() as unfinished:
        tokenizer.save_pretrained(unfinished)
        files = {path.name: path.read_bytes() for path in Path(unfinished).iterdir()}
    # transformers 4 knows neither the class name of transformers 5 nor a template in another file.
    config = json.loads(files["tokenizer_config.json"])
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["chat_template"] = tokenizer.chat_template
    config.pop("extra_special_tokens", None)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    files["tokenizer_config.json"] = text.encode()
    # The file that makes the folder a tokenizer comes last.
    for name in sorted(files, key=lambda name: name == "tokenizer.json"):
        atomic_write(folder / name, lambda file, name=name: file.write(files[name]))


if __name__ == "__main__":
    run(main)
