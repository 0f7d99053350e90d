"""Bases and skills for other tools, and from them: python scripts/convert_model.py --to FORMAT

    --to huggingface --base out/full_sft_512.pth --output DIR          a stock Llama folder
    --to huggingface --skill medical=0.7 identity --output DIR         the same with skills merged
    --to peft --lora_name medical --output DIR                         an adapter folder
    --from huggingface --source DIR --output out/full_sft_512.pth      a Llama folder as a base
    --from peft --source DIR --base BASE --lora_name NAME              an adapter folder as a skill

Nothing is overwritten. What was written is read again and must compute the same logits.
"""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import run
from core.options import CheckedOptions, option, parse, require
from core.paths import find_skill, is_pretrained, lora_path, skill_name, skill_weights

BASE_HELP = "base file, Hugging Face folder or owner/model (default: the skill's own, or newest)"
Format = Literal["huggingface", "peft"]


@dataclass
class Options(CheckedOptions):
    """Write a base or a skill as another tool's files (--to), or read such files (--from)."""

    to: Format | None = option(None, "format to write")
    source_format: Format | None = option(None, "format to read", flag="from")
    source: Path | None = option(None, "folder to read, with --from")
    output: Path | None = option(None, "what to write: a folder, with --from a base file (.pth)")
    base: Path | None = option(None, BASE_HELP)
    lora_name: str | None = option(None, "the skill that an adapter folder stands for")
    skill: tuple[str, ...] = option((), "NAME or NAME=WEIGHT: skills to merge into the base")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "of written weights")
    out_dir: Path = option(Path("out"), "folder of the trained files")
    tokenizer_path: Path | None = option(None, "tokenizer folder (default: the base's own)")
    allow_base_mismatch: bool = option(False, "use a skill on a base it was not trained on")

    def __post_init__(self):
        super().__post_init__()
        one = (self.to is None) != (self.source_format is None)
        require(one, "choose a direction: --to FORMAT or --from FORMAT")
        if self.source_format is not None:
            require(self.source is not None, "name the folder to read with --source")
        skill_weights(self.skill)
        if "peft" in (self.to, self.source_format):
            require(self.lora_name is not None, "name the skill with --lora_name")
            require(not self.skill, "--skill merges into a base: write one with --to huggingface")
            skill_name(self.lora_name)
        if (self.to, self.source_format) != (None, "peft"):
            require(self.output is not None, "name what to write with --output")
            for path in (self.output, self.output.with_suffix(".json")):
                require(not path.exists(), f"--output: {path} exists; choose another or delete it")


def main(argv: list[str] | None = None) -> Path:
    """Convert, and return what was written."""
    options = parse(Options, argv)
    if options.to == "huggingface":
        return write_base(options)
    if options.to == "peft":
        return write_adapter(options)
    return read_base(options) if options.source_format == "huggingface" else read_skill(options)


def write_base(options: Options) -> Path:
    """A base of ours, perhaps with skills in its weights, as a Llama folder."""
    import torch

    from interop.check import logits_of, require_same, rounded
    from interop.llama import save_llama
    from model.huggingface import open_causal
    from model.lora.library import SkillLibrary, merge_lora

    weights = skill_weights(options.skill)
    base, model, tokenizer = opened(options, next(iter(weights), None))
    require(not is_pretrained(base), f"{base} is a Hugging Face model; merge_lora.py writes such")
    library = SkillLibrary(model)
    for name in weights:
        path = find_skill(options.out_dir, name, model.config.dim)
        library.add(name, path, allow_base_mismatch=options.allow_base_mismatch)
    library.use(weights)
    if weights:
        merge_lora(model)
    dtype = getattr(torch, options.dtype)
    save_llama(model, tokenizer, options.output, dtype)
    with undone(options.output):
        theirs = logits_of(open_causal(options.output))
        found = require_same(logits_of(rounded(model, dtype)), theirs, "the folder")
    return saved(options.output, found)


def write_adapter(options: Options) -> Path:
    """A skill as an adapter folder of PEFT."""
    from interop.check import logits_of, require_same
    from interop.peft import save_peft
    from model.lora.skill_file import attach_lora, read_lora

    base, model, tokenizer = opened(options, options.lora_name)
    path = find_skill(options.out_dir, options.lora_name, model.config.hidden_size)
    skill = read_lora(path)
    attach_lora(model, path, skill, allow_base_mismatch=options.allow_base_mismatch)
    ours = logits_of(model)
    save_peft(skill, model, base.as_posix(), options.output)
    with undone(options.output):
        theirs = logits_with(model, tokenizer, options.output)
        found = require_same(ours, theirs, "the adapter")
    return saved(options.output, found)


def read_base(options: Options) -> Path:
    """A Llama folder as a base file, with its tokenizer in the folder beside it."""
    from dataset.tokenizer import load_tokenizer, tokenizer_fingerprint
    from interop.check import logits_of, require_same
    from interop.llama import load_llama, write_tokenizer
    from model.huggingface import open_causal, write_folder
    from model.weights import RunRecord, load_base, save_base

    require(options.output.suffix == ".pth", f"--output {options.output} must end in .pth")
    beside = options.output.parent / "tokenizer"
    model, tokenizer = load_llama(options.source), load_tokenizer(options.source)
    known, rows = tokenizer_fingerprint(tokenizer), model.config.vocab_size
    sizes = f"the embedding has {rows} rows, the tokenizer {len(tokenizer)} tokens"
    way_out = "make them equal with resize_token_embeddings(len(tokenizer)) in transformers"
    require(len(tokenizer) == rows, f"{options.source}: {sizes}; {way_out}")
    record = RunRecord(tokenizer=known)
    is_there = beside.exists()
    same = not is_there or tokenizer_fingerprint(load_tokenizer(beside)) == known
    require(same, f"{beside} is not the tokenizer of {options.source}; choose another folder")
    with undone(
        options.output, options.output.with_suffix(".json"), *([] if is_there else [beside])
    ):
        save_base(options.output, model, record)
        context = model.config.max_seq_len
        if not is_there:
            write_folder(beside, lambda folder: write_tokenizer(tokenizer, folder, context))
        same = tokenizer_fingerprint(load_tokenizer(beside)) == known
        require(same, f"the tokenizer in {options.source} changes when it is written")
        ours = logits_of(load_base(options.output)[0])
        found = require_same(ours, logits_of(open_causal(options.source)), "the base")
    return saved(options.output, found)


def read_skill(options: Options) -> Path:
    """An adapter folder of PEFT as a skill file."""
    from dataset.tokenizer import tokenizer_fingerprint
    from interop.check import logits_of, require_same
    from interop.peft import load_peft
    from model.lora.layer import exchange
    from model.lora.skill_file import attach_lora, save_lora
    from model.lora.targets import linears
    from model.lora.variants import lora_of

    require(options.base is not None, "name the base that the adapter was made for with --base")
    base, model, tokenizer = opened(options)
    path = lora_path(options.out_dir, options.lora_name, model.config.hidden_size)
    require(not path.exists(), f"{path} exists; choose another --lora_name or delete it")
    updates, meta = load_peft(options.source, model)
    meta.tokenizer, meta.base = tokenizer_fingerprint(tokenizer), {"file": base.name}
    theirs, modules = logits_with(model, tokenizer, options.source), linears(model)
    loras = {n: lora_of(modules[n], parts, meta.scaling[n]) for n, parts in updates.items()}
    exchange(model, loras)
    with undone(path):
        save_lora(model, path, meta)
        exchange(model, {})
        attach_lora(model, path)
        found = require_same(logits_of(model), theirs, "the skill")
    return saved(path, found)


def opened(options: Options, skill: str | None = None) -> tuple:
    """The base (of ``skill``, if none is named), its model and its tokenizer."""
    from dataset.tokenizer import tokenizer_of
    from model.lora.skill_file import read_lora
    from model.weights import choose_base, load_base

    origin = read_lora(find_skill(options.out_dir, skill))[1].base if skill else None
    base = choose_base(options.out_dir, options.base, origin)
    model, record = load_base(base)
    tokenizer = tokenizer_of(record, base, options.tokenizer_path, options.out_dir)
    print(f"base: {base}")
    return base, model, tokenizer


def logits_with(model, tokenizer, adapter: Path):
    """What Hugging Face's model of the base computes with the adapter in its weights."""
    import copy

    from interop.check import logits_of
    from interop.llama import twin
    from interop.peft import merged_raw
    from model.lora.layer import exchange
    from model.model import MiniMindLM

    if isinstance(model, MiniMindLM):
        return logits_of(merged_raw(twin(model, tokenizer), adapter))
    alone = copy.deepcopy(model)
    exchange(alone, {})
    return logits_of(merged_raw(alone, adapter))


@contextlib.contextmanager
def undone(*paths: Path) -> Iterator[None]:
    """Whatever fails inside leaves none of ``paths`` behind."""
    try:
        yield
    except BaseException:
        for path in paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def saved(path: Path, found: float) -> Path:
    print(f"saved {path}: read again, its logits differ by {found:.1e} of the largest")
    return path


if __name__ == "__main__":
    run(main)
