"""What convert_model.py does in each direction: write or read, read again, compare, publish."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch

from core.files import publish, unfinished
from core.options import require
from core.paths import TOKENIZER_DIR, find_skill, is_pretrained, lora_path, skill_weights
from dataset.tokenizer import load_tokenizer, tokenizer_fingerprint, tokenizer_of
from interop import gguf, minimind, peft
from interop.check import logits_of, require_same, tolerance
from interop.llama import load_llama, save_llama, write_tokenizer
from interop.ollama import write_modelfile
from interop.rounding import rounded
from model.huggingface import open_causal
from model.lora.layer import exchange
from model.lora.library import SkillLibrary, merge_lora
from model.lora.skill_file import SkillMeta, attach_lora, read_lora, save_lora
from model.lora.targets import linears
from model.lora.variants import lora_of
from model.weights import RunRecord, choose_base, load_base, save_base

# What to do instead where a format is for our bases only.
THEIR_OWN = {
    "gguf": "llama.cpp's convert_hf_to_gguf.py and convert_lora_to_gguf.py are for such",
    "minimind": "MiniMind's code of April 2025 opens no such model",
}


def write_base(options) -> Path:
    """A base of ours, perhaps with skills in its weights, as a Llama folder."""
    model, tokenizer = merged(options)
    dtype = getattr(torch, options.dtype)
    with unfinished(options.output) as folder:
        save_llama(model, tokenizer, folder, dtype)
        ours = logits_of(rounded(model, dtype))
        found = require_same(ours, logits_in(folder), "the folder")
        publish({folder: options.output})
    return saved(options.output, found)


def merged(options) -> tuple:
    """The model of a base of ours, perhaps with skills in its weights, and its tokenizer."""
    weights = skill_weights(options.skill)
    first = read_lora(find_skill(options.out_dir, next(iter(weights))))[1] if weights else None
    base, model, tokenizer = opened(options, first)
    require(not is_pretrained(base), f"{base} is a Hugging Face model; merge_lora.py writes such")
    alone, library = logits_of(model), SkillLibrary(model)
    for name in weights:
        path = find_skill(options.out_dir, name, model.config.dim)
        meta = library.add(name, path, allow_base_mismatch=options.allow_base_mismatch)
        if meta.load_in_4bit:
            better = "merge_lora.py --load_in_4bit merges into what it saw"
            print(f"note: {name} was trained on 4 bits; {better}")
    if weights:
        library.use(weights)
        attached = logits_of(model)
        merge_lora(model)
        allowed = tolerance(attached, alone)
        require_same(attached, logits_of(model), "the base with the skills merged", allowed)
    return model, tokenizer


def write_adapter(options) -> Path:
    """A skill as an adapter folder of PEFT."""
    skill, base, model, tokenizer, alone = skilled(options)
    ours = logits_of(model)
    with unfinished(options.output) as folder:
        peft.save_peft(skill, model, shared_name(base), folder)
        theirs = peft.logits_with(model, tokenizer, folder)
        found = require_same(ours, theirs, "the adapter", tolerance(ours, alone))
        publish({folder: options.output})
    return saved(options.output, found)


def skilled(options) -> tuple:
    """The skill, its base's path and model, which carries it, tokenizer and logits without it."""
    first = read_lora(find_skill(options.out_dir, options.lora_name))[1]
    base, model, tokenizer = opened(options, first)
    path = find_skill(options.out_dir, options.lora_name, model.config.hidden_size)
    skill, alone = read_lora(path), logits_of(model)
    attach_lora(model, path, skill, allow_base_mismatch=options.allow_base_mismatch)
    return skill, base, model, tokenizer, alone


def write_gguf(options) -> Path:
    """A base of ours, perhaps with skills in its weights, as a GGUF file."""
    model, tokenizer = merged(options)
    with unfinished(options.output) as folder:
        draft = folder / options.output.name
        found, change = gguf.save_base(model, tokenizer, draft, options.dtype)
        publish_both(draft, options.output, tokenizer, model.config.max_seq_len, draft.name)
    if options.dtype != "float32":
        print(f"{options.dtype} changes the logits by {change:.1e} of the largest")
    return saved(options.output, found)


def write_gguf_adapter(options) -> Path:
    """A skill as a LoRA adapter in a GGUF file."""
    skill, base, model, tokenizer, _ = skilled(options)
    expected = options.output.with_name(base.with_suffix(".gguf").name)
    with unfinished(options.output) as folder:
        draft = folder / options.output.name
        found = gguf.save_adapter(skill, model, draft)
        names = expected.name, draft.name
        publish_both(draft, options.output, tokenizer, model.config.max_seq_len, *names)
    print(f"the adapter is for {base}, and expects its GGUF file as {expected}")
    if doubt := gguf.doubts(expected, model):
        print(f"note: {expected} {doubt}; write it with --to gguf --base {base}")
    return saved(options.output, found)


def publish_both(draft: Path, path: Path, *told) -> None:
    """``publish`` a GGUF file, with the Modelfile of what is ``told`` if there can be one."""
    drafts = draft.with_suffix(".Modelfile"), draft
    write_modelfile(drafts[0], *told)
    publish({x: path.with_suffix(x.suffix) for x in drafts if x.exists()})


def write_minimind(options) -> Path:
    """A base of ours, perhaps with skills in its weights, as MiniMind's file of April 2025."""
    model, tokenizer = merged(options)
    dtype = getattr(torch, options.dtype)
    with unfinished(options.output) as folder:
        draft = folder / options.output.name
        minimind.save_minimind(model, draft, dtype)
        theirs = minimind.logits(draft, model, tokenizer)
        found = require_same(logits_of(rounded(model, dtype)), theirs, "the file")
        publish({draft: options.output})
    print(f"MiniMind opens it with LMConfig({minimind.differing(model.config)})")
    return saved(options.output, found)


def write_minimind_skill(options) -> Path:
    """A skill as MiniMind's LoRA file of April 2025."""
    skill, _, model, _, alone = skilled(options)
    ours = logits_of(model)
    with unfinished(options.output) as folder:
        draft = folder / options.output.name
        rank = minimind.save_skill(skill, model, draft)
        hang(model, *minimind.load_skill(draft, model))
        found = require_same(ours, logits_of(model), "the file", tolerance(ours, alone))
        publish({draft: options.output})
    print(f"MiniMind opens it after apply_lora(model, rank={rank})")
    return saved(options.output, found)


def read_base(options) -> Path:
    """A Llama folder as a base file, with its tokenizer in the folder beside it."""
    model, tokenizer = load_llama(options.source), load_tokenizer(options.source)
    return keep_base(options, model, tokenizer, logits_in(options.source))


def read_minimind(options) -> Path:
    """MiniMind's base file as ours, with its tokenizer (the shipped one, if none is named)."""
    model = minimind.load_minimind(options.source)
    tokenizer = load_tokenizer(options.tokenizer_path or TOKENIZER_DIR)
    return keep_base(options, model, tokenizer, minimind.logits(options.source, model, tokenizer))


def keep_base(options, model, tokenizer, theirs) -> Path:
    """Write ``model``, whose own tool computed the logits ``theirs``, and its tokenizer."""
    known, rows = tokenizer_fingerprint(tokenizer), model.config.vocab_size
    sizes = f"the embedding has {rows} rows, the tokenizer {len(tokenizer)} tokens"
    way_out = "make them equal with resize_token_embeddings(len(tokenizer)) in transformers"
    if options.source_format == "minimind":
        way_out = "name its tokenizer folder with --tokenizer_path"
    require(len(tokenizer) == rows, f"{options.source}: {sizes}; {way_out}")
    output, beside = options.output, options.output.parent / "tokenizer"
    is_there = os.path.lexists(beside)
    same = not is_there or tokenizer_fingerprint(load_tokenizer(beside)) == known
    require(same, f"{beside} is not the tokenizer of {options.source}; choose another folder")
    with unfinished(output) as folder:
        save_base(folder / output.name, model, RunRecord(tokenizer=known))
        own = folder / beside.name
        own.mkdir()
        write_tokenizer(tokenizer, own, model.config.max_seq_len)
        same = tokenizer_fingerprint(load_tokenizer(own)) == known
        require(same, f"the tokenizer of {options.source} changes when it is written")
        ours = logits_of(load_base(folder / output.name)[0])
        found = require_same(ours, theirs, "the base")
        written = (output.with_suffix(".json"), output)  # a .pth alone would load as another
        places = {} if is_there else {own: beside}
        publish(places | {folder / path.name: path for path in written})
    return saved(output, found)


def read_adapter(options) -> Path:
    """An adapter folder of PEFT as a skill file."""
    base, model, tokenizer = opened(options)
    updates, meta = peft.load_peft(options.source, model)
    if named := peft.foreign_name(options.source, base):
        print(f"note: the adapter says it is for {named}; only that its shapes fit {base} is known")
    theirs = peft.logits_with(model, tokenizer, options.source)
    return keep_skill(options, (base, model, tokenizer), updates, meta, theirs)


def read_minimind_skill(options) -> Path:
    """MiniMind's LoRA file as a skill file."""
    base, model, tokenizer = opened(options)
    foreign = f"{base} is a Hugging Face model, which a LoRA of MiniMind does not fit"
    require(not is_pretrained(base), f"{foreign}; name a base file")
    updates, meta = minimind.load_skill(options.source, model)
    theirs = minimind.logits(options.source, model, tokenizer)
    return keep_skill(options, (base, model, tokenizer), updates, meta, theirs)


def keep_skill(options, on: tuple, updates, meta: SkillMeta, theirs) -> Path:
    """Write updates of the base that is ``on`` path, model and tokenizer as a skill file."""
    base, model, tokenizer = on
    path = lora_path(options.out_dir, options.lora_name, model.config.hidden_size)
    there = os.path.lexists(path)
    require(not there, f"{path} exists; choose another --lora_name or delete it")
    meta.tokenizer, meta.base = tokenizer_fingerprint(tokenizer), {"file": base.name}
    meta.prompt_template = options.prompt_template
    alone = logits_of(model)
    hang(model, updates, meta)
    with unfinished(path) as folder:
        save_lora(model, folder / path.name, meta)
        exchange(model, {})
        attach_lora(model, folder / path.name)
        ours = logits_of(model)
        found = require_same(ours, theirs, "the skill", tolerance(theirs, alone))
        publish({folder / path.name: path})
    return saved(path, found)


def hang(model, updates, meta: SkillMeta) -> None:
    """Replace what ``model`` carries by these updates."""
    modules = linears(model)
    exchange(model, {n: lora_of(modules[n], x, meta.scaling[n]) for n, x in updates.items()})


def opened(options, skill=None) -> tuple:
    """The base (of the skill with this meta, if none is named), its model and its tokenizer."""
    base = choose_base(options.out_dir, options.base, skill and skill.base)
    theirs = THEIR_OWN.get(options.to)
    foreign = theirs is not None and is_pretrained(base)
    require(not foreign, f"{base} is a Hugging Face model; {theirs}")
    model, record = load_base(base)
    asked = options.prompt_template, skill and skill.prompt_template
    tokenizer = tokenizer_of(record, base, options.tokenizer_path, options.out_dir, *asked)
    print(f"base: {base}")
    return base, model, tokenizer


def shared_name(base: Path) -> str | None:
    """What others call ``base``, without the folders of this machine; None for a file of ours."""
    if not is_pretrained(base):
        return None
    return base.resolve().name if base.is_dir() else base.as_posix()


def logits_in(folder: Path):
    """What Hugging Face's model in ``folder`` computes."""
    logits = logits_of(open_causal(folder))
    gc.collect()  # Windows renames no folder while a model still maps a file in it
    return logits


def saved(path: Path, found: float) -> Path:
    print(f"saved {path}: read again, its logits differ by {found:.1e} of the largest")
    return path


# By the direction, as convert_model.py calls it.
CONVERSIONS: dict[str, Callable[..., Path]] = {
    "--to huggingface": write_base,
    "--to peft": write_adapter,
    "--to gguf": write_gguf,
    "--to gguf --lora_name": write_gguf_adapter,
    "--to minimind": write_minimind,
    "--to minimind --lora_name": write_minimind_skill,
    "--from huggingface": read_base,
    "--from peft": read_adapter,
    "--from minimind": read_minimind,
    "--from minimind --lora_name": read_minimind_skill,
}
