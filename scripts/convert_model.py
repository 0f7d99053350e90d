"""Bases and skills for other tools, and from them: python scripts/convert_model.py --to FORMAT

    --to huggingface --base out/full_sft_512.pth --output DIR          a stock Llama folder
    --to huggingface --skill medical=0.7 identity --output DIR         the same with skills merged
    --to peft --lora_name medical --output DIR                         an adapter folder
    --to gguf --base out/full_sft_512.pth --output FILE.gguf           for llama.cpp and Ollama
    --to gguf --lora_name medical --output FILE.gguf                   an adapter for these
    --from huggingface --source DIR --output theirs/full_sft_512.pth   a Llama folder as a base
    --from peft --source DIR --base BASE --lora_name NAME              an adapter folder as a skill

Nothing that is there is touched. What was written gets its name only after it was read again and
computed the same logits.
"""

import gc
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import run
from core.files import publish, unfinished
from core.options import CheckedOptions, option, parse, require
from core.paths import find_skill, is_pretrained, lora_path, skill_name, skill_weights

BASE_HELP = "base file, Hugging Face folder or owner/model (default: the skill's own, or newest)"
TEMPLATE_HELP = "how a skill from PEFT is asked, such as 'Q: {user}\\nA: '"
OUTPUT_HELP = "what to write: a folder, a .gguf file, or with --from a base file (.pth)"
DTYPE_HELP = "of a written base's weights; q8_0 and q4_0 with --to gguf only"
Format = Literal["huggingface", "peft"]
# The flags of each direction and format: those it needs, and those it can do without.
FLAGS = {
    "--to huggingface": (
        {"output"},
        {"base", "skill", "dtype", "out_dir", "tokenizer_path", "allow_base_mismatch"},
    ),
    "--to peft": (
        {"lora_name", "output"},
        {"base", "out_dir", "tokenizer_path", "allow_base_mismatch"},
    ),
    "--from huggingface": ({"source", "output"}, set()),
    "--from peft": (
        {"source", "base", "lora_name"},
        {"out_dir", "tokenizer_path", "prompt_template"},
    ),
}
ADAPTER = "--to gguf --lora_name"
FLAGS |= {"--to gguf": FLAGS["--to huggingface"], ADAPTER: FLAGS["--to peft"]}
# By what ``to`` says, where the output is no folder: what it is, the ending of its name, and of
# that of the file beside it.
FILES = {"gguf": ("a file", ".gguf", ".Modelfile"), None: ("a base file", ".pth", ".json")}


@dataclass
class Options(CheckedOptions):
    """Write a base or a skill as another tool's files (--to), or read such files (--from)."""

    to: Literal["huggingface", "peft", "gguf"] | None = option(None, "format to write")
    source_format: Format | None = option(None, "format to read", flag="from")
    source: Path | None = option(None, "folder to read, with --from")
    output: Path | None = option(None, OUTPUT_HELP)
    base: Path | None = option(None, BASE_HELP)
    lora_name: str | None = option(None, "the skill that an adapter stands for")
    skill: tuple[str, ...] = option((), "NAME or NAME=WEIGHT: skills to merge into the base")
    dtype: Literal["float32", "bfloat16", "float16", "q8_0", "q4_0"] = option("float32", DTYPE_HELP)
    out_dir: Path = option(Path("out"), "folder of the trained files")
    tokenizer_path: Path | None = option(None, "tokenizer folder (default: the base's own)")
    prompt_template: str | None = option(None, TEMPLATE_HELP)
    allow_base_mismatch: bool = option(False, "use a skill on a base it was not trained on")

    def __post_init__(self):
        super().__post_init__()
        one = (self.to is None) != (self.source_format is None)
        require(one, "choose a direction: --to FORMAT or --from FORMAT")
        task = f"--to {self.to}" if self.to else f"--from {self.source_format}"
        task = ADAPTER if self.to == "gguf" and self.lora_name is not None else task
        given = {entry.name for entry in fields(self) if getattr(self, entry.name) != entry.default}
        needed, optional = FLAGS[task]
        missing = " and ".join(f"--{name}" for name in sorted(needed - given))
        require(not missing, f"{task} needs {missing}; see --help")
        idle = given - needed - optional - {"to", "source_format"}
        unused = ", ".join(f"--{name}" for name in sorted(idle))
        require(not unused, f"{task} has no use for {unused}; leave it out")
        skill_weights(self.skill)
        if self.lora_name is not None:
            skill_name(self.lora_name)
        if self.output is not None:
            self._check_output()
        fits = self.to == "gguf" or "float" in self.dtype
        require(fits, f"--dtype {self.dtype} is for --to gguf only")

    def _check_output(self) -> None:
        kind, ending, beside = FILES.get(self.to, ("a folder", "", ""))
        kind += f", whose name ends in {ending}" if ending else ""
        found = self.output.suffix if self.output.suffix in (".gguf", ".pth") else ""
        require(found == ending, f"--output {self.output} must be {kind}")
        for path in (self.output, self.output.with_suffix(beside)) if ending else (self.output,):
            there = os.path.lexists(path)  # even a link to nothing
            require(not there, f"--output: {path} exists; choose another or delete it")


def main(argv: list[str] | None = None) -> Path:
    """Convert, and return what was written."""
    options = parse(Options, argv)
    if options.to == "huggingface":
        return write_base(options)
    if options.to == "peft":
        return write_adapter(options)
    if options.to == "gguf":
        return write_gguf(options) if options.lora_name is None else write_gguf_adapter(options)
    return read_base(options) if options.source_format == "huggingface" else read_skill(options)


def write_base(options: Options) -> Path:
    """A base of ours, perhaps with skills in its weights, as a Llama folder."""
    import torch

    from interop.check import logits_of, require_same, rounded
    from interop.llama import save_llama

    model, tokenizer = merged(options)
    dtype = getattr(torch, options.dtype)
    with unfinished(options.output) as folder:
        save_llama(model, tokenizer, folder, dtype)
        ours = logits_of(rounded(model, dtype))
        found = require_same(ours, logits_in(folder), "the folder")
        publish({folder: options.output})
    return saved(options.output, found)


def merged(options: Options) -> tuple:
    """The model of a base of ours, perhaps with skills in its weights, and its tokenizer."""
    from interop.check import logits_of, require_same, tolerance
    from model.lora.library import SkillLibrary, merge_lora
    from model.lora.skill_file import read_lora

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


def write_adapter(options: Options) -> Path:
    """A skill as an adapter folder of PEFT."""
    from interop.check import logits_of, require_same, tolerance
    from interop.peft import logits_with, save_peft

    skill, base, model, tokenizer, alone = skilled(options)
    ours = logits_of(model)
    with unfinished(options.output) as folder:
        save_peft(skill, model, shared_name(base), folder)
        theirs = logits_with(model, tokenizer, folder)
        found = require_same(ours, theirs, "the adapter", tolerance(ours, alone))
        publish({folder: options.output})
    return saved(options.output, found)


def skilled(options: Options) -> tuple:
    """The skill, its base's path and model, which carries it, tokenizer and logits without it."""
    from interop.check import logits_of
    from model.lora.skill_file import attach_lora, read_lora

    first = read_lora(find_skill(options.out_dir, options.lora_name))[1]
    base, model, tokenizer = opened(options, first)
    path = find_skill(options.out_dir, options.lora_name, model.config.hidden_size)
    skill, alone = read_lora(path), logits_of(model)
    attach_lora(model, path, skill, allow_base_mismatch=options.allow_base_mismatch)
    return skill, base, model, tokenizer, alone


def write_gguf(options: Options) -> Path:
    """A base of ours, perhaps with skills in its weights, as a GGUF file."""
    from interop.gguf import save_base

    model, tokenizer = merged(options)
    with unfinished(options.output) as folder:
        draft = folder / options.output.name
        found, change = save_base(model, tokenizer, draft, options.dtype)
        publish_both(draft, options.output, tokenizer, model.config.max_seq_len, draft.name)
    if options.dtype != "float32":
        print(f"{options.dtype} changes the logits by {change:.1e} of the largest")
    return saved(options.output, found)


def write_gguf_adapter(options: Options) -> Path:
    """A skill as a LoRA adapter in a GGUF file."""
    from interop.gguf import doubts, save_adapter

    skill, base, model, tokenizer, _ = skilled(options)
    expected = options.output.with_name(base.with_suffix(".gguf").name)
    with unfinished(options.output) as folder:
        draft = folder / options.output.name
        found = save_adapter(skill, model, draft)
        names = expected.name, draft.name
        publish_both(draft, options.output, tokenizer, model.config.max_seq_len, *names)
    print(f"the adapter is for {base}, and expects its GGUF file as {expected}")
    if doubt := doubts(expected, model):
        print(f"note: {expected} {doubt}; write it with --to gguf --base {base}")
    return saved(options.output, found)


def publish_both(draft: Path, path: Path, *told) -> None:
    """``publish`` a GGUF file, with the Modelfile of what is ``told`` if there can be one."""
    from interop.ollama import write_modelfile

    drafts = draft.with_suffix(".Modelfile"), draft
    write_modelfile(drafts[0], *told)
    publish({x: path.with_suffix(x.suffix) for x in drafts if x.exists()})


def read_base(options: Options) -> Path:
    """A Llama folder as a base file, with its tokenizer in the folder beside it."""
    from dataset.tokenizer import load_tokenizer, tokenizer_fingerprint
    from interop.check import logits_of, require_same
    from interop.llama import load_llama, write_tokenizer
    from model.weights import RunRecord, load_base, save_base

    model, tokenizer = load_llama(options.source), load_tokenizer(options.source)
    known, rows = tokenizer_fingerprint(tokenizer), model.config.vocab_size
    sizes = f"the embedding has {rows} rows, the tokenizer {len(tokenizer)} tokens"
    way_out = "make them equal with resize_token_embeddings(len(tokenizer)) in transformers"
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
        require(same, f"the tokenizer in {options.source} changes when it is written")
        ours = logits_of(load_base(folder / output.name)[0])
        found = require_same(ours, logits_in(options.source), "the base")
        written = (output.with_suffix(".json"), output)  # a .pth alone would load as another
        places = {} if is_there else {own: beside}
        publish(places | {folder / path.name: path for path in written})
    return saved(output, found)


def read_skill(options: Options) -> Path:
    """An adapter folder of PEFT as a skill file."""
    from dataset.tokenizer import tokenizer_fingerprint
    from interop.check import logits_of, require_same, tolerance
    from interop.peft import foreign_name, load_peft, logits_with
    from model.lora.layer import exchange
    from model.lora.skill_file import attach_lora, save_lora
    from model.lora.targets import linears
    from model.lora.variants import lora_of

    base, model, tokenizer = opened(options)
    path = lora_path(options.out_dir, options.lora_name, model.config.hidden_size)
    there = os.path.lexists(path)
    require(not there, f"{path} exists; choose another --lora_name or delete it")
    updates, meta = load_peft(options.source, model)
    if named := foreign_name(options.source, base):
        print(f"note: the adapter says it is for {named}; only that its shapes fit {base} is known")
    meta.tokenizer, meta.base = tokenizer_fingerprint(tokenizer), {"file": base.name}
    meta.prompt_template = options.prompt_template
    alone, theirs = logits_of(model), logits_with(model, tokenizer, options.source)
    modules = linears(model)
    exchange(model, {n: lora_of(modules[n], x, meta.scaling[n]) for n, x in updates.items()})
    with unfinished(path) as folder:
        save_lora(model, folder / path.name, meta)
        exchange(model, {})
        attach_lora(model, folder / path.name)
        ours = logits_of(model)
        found = require_same(ours, theirs, "the skill", tolerance(theirs, alone))
        publish({folder / path.name: path})
    return saved(path, found)


def opened(options: Options, skill=None) -> tuple:
    """The base (of the skill with this meta, if none is named), its model and its tokenizer."""
    from dataset.tokenizer import tokenizer_of
    from model.weights import choose_base, load_base

    base = choose_base(options.out_dir, options.base, skill and skill.base)
    foreign = options.to == "gguf" and is_pretrained(base)
    theirs = "llama.cpp's own convert_hf_to_gguf.py and convert_lora_to_gguf.py are for such"
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
    from interop.check import logits_of
    from model.huggingface import open_causal

    logits = logits_of(open_causal(folder))
    gc.collect()  # Windows renames no folder while a model still maps a file in it
    return logits


def saved(path: Path, found: float) -> Path:
    print(f"saved {path}: read again, its logits differ by {found:.1e} of the largest")
    return path


if __name__ == "__main__":
    run(main)
