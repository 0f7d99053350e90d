"""Fuse skills: python scripts/merge_lora.py medical=0.7 identity --output out/full_sft_m_512.pth"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import run
from core.options import CheckedOptions, option, parse, require
from core.paths import find_skill, is_pretrained, lora_path, skill_name, skill_weights, weights_text

BASE_HELP = "base file, Hugging Face folder or owner/model (default: the first skill's own)"


@dataclass
class Options(CheckedOptions):
    """Write skills into a copy of their base (--output), or several into one (--lora_name)."""

    skills: tuple[str, ...] = option((), "NAME or NAME=WEIGHT, perhaps below 0", positional=True)
    out_dir: Path = option(Path("out"), "folder of the trained files")
    base: Path | None = option(None, BASE_HELP)
    output: Path | None = option(None, "new base: a .pth file, or a folder for a Hugging Face base")
    dtype: Literal["float32", "bfloat16"] = option("float32", "of the new base's weights")
    load_in_4bit: bool = option(False, "merge into the base as its 4 bits stand for it (QLoRA)")
    lora_name: str | None = option(None, "new skill: the weighted sum, exact unless --rank cuts it")
    rank: int = option(0, "largest rank of the new skill; 0: the sum of all ranks", at_least=0)
    tokenizer_path: Path | None = option(None, "of a Hugging Face base (default: its own)")
    allow_base_mismatch: bool = option(False, "use a skill on a base it was not trained on")

    def __post_init__(self):
        super().__post_init__()
        skill_weights(self.skills)
        one_result = (self.output is None) != (self.lora_name is None)
        require(one_result, "choose --output (a base) or --lora_name (a skill)")
        if self.lora_name is None:
            require(self.rank == 0, "--rank cuts a skill: give --lora_name instead of --output")
            return
        skill_name(self.lora_name)
        of_base = self.load_in_4bit or self.dtype != "float32" or self.tokenizer_path is not None
        wrong = "--dtype, --load_in_4bit and --tokenizer_path are for --output, not for --lora_name"
        require(not of_base, wrong)


def main(argv: list[str] | None = None) -> Path:
    options = parse(Options, argv)
    from model.lora.library import SkillLibrary
    from model.lora.skill_file import read_lora
    from model.quantized import quantize
    from model.weights import choose_base, load_base

    weights = skill_weights(options.skills)
    first = next(iter(weights))
    _, meta = read_lora(find_skill(options.out_dir, first))
    base = choose_base(options.out_dir, options.base, meta.base)
    model, record = load_base(base)
    print(f"base: {base}")
    if options.load_in_4bit:
        quantize(model)
    library, metas = SkillLibrary(model), []
    for name in weights:
        path = find_skill(options.out_dir, name, model.config.hidden_size)
        metas.append(library.add(name, path, allow_base_mismatch=options.allow_base_mismatch))
        if options.output and metas[-1].load_in_4bit and not options.load_in_4bit:
            print(f"note: {name} was trained on 4 bits; --load_in_4bit merges into what it saw")
    if len({meta.tokenizer for meta in metas} - {None}) > 1:
        print(f"note: the skills had other tokenizers or templates in training; {first}'s is taken")
    if options.lora_name is not None:
        return fuse(options, base, metas[0], library, weights)
    merge_into_base(options, base, record, metas[0], library, weights)
    return options.output


def merge_into_base(options: Options, base: Path, record, first, library, weights) -> None:
    """Write the base with the skills in its weights, and say how far this moves its logits."""
    import torch

    from dataset.tokenizer import check_trained_with, tokenizer_of
    from model.huggingface import save_folder
    from model.LMConfig import context_of
    from model.lora.library import merge_lora
    from model.quantized import dequantize
    from model.weights import save_base

    model, output, ours = library.model, options.output, not is_pretrained(base)
    wrong = f"--output {output} must {'end in .pth' if ours else 'be a folder, not a .pth file'}"
    require((output.suffix == ".pth") == ours, wrong)
    for path in (output, output.with_suffix(".json")) if ours else (output,):
        require(not path.exists(), f"--output: {path} exists; choose another or delete it")
    if ours:
        wrong = f"--tokenizer_path is for Hugging Face bases, and {base} is none"
        require(options.tokenizer_path is None, wrong)
    else:
        named, template = options.tokenizer_path, first.prompt_template
        tokenizer = tokenizer_of(record, base, named, options.out_dir, template)
        if not options.allow_base_mismatch:
            check_trained_with(tokenizer, first.tokenizer, next(iter(weights)))
    length = min(64, context_of(model.config))
    ids = torch.arange(length)[None] * 31 % record.config["vocab_size"]
    library.use(weights)
    with torch.no_grad():
        attached = model(input_ids=ids).logits.float()
        dequantize(model)
        merge_lora(model)
        model.to(getattr(torch, options.dtype))
        drift = (model(input_ids=ids).logits.float() - attached).abs().max()
    said = f"logits differ by at most {drift:.1e} from those with the skills attached"
    print(f"merged {weights_text(weights)}: {said}")
    if ours:
        origin = {"file": base.name, "fingerprint": record.fingerprint}
        merged = {"merged": {"base": origin, "skills": weights}}
        save_base(output, model, replace(record, metrics={}, more=record.more | merged))
    else:
        save_folder(model, tokenizer, output)
    print(f"saved {output}")


def fuse(options: Options, base: Path, first, library, weights) -> Path:
    """Write the weighted sum of the skills as one skill, which is asked as the first was."""
    from model.lora.layer import exchange
    from model.lora.library import loras_of, truncated
    from model.lora.skill_file import SkillMeta, save_lora

    model = library.model
    path = lora_path(options.out_dir, options.lora_name, model.config.hidden_size)
    require(not path.exists(), f"{path} exists; choose another --lora_name or delete it")
    factors, lost = library.factors(weights), 0.0
    if options.rank:
        factors, lost = truncated(factors, options.rank)
    exchange(model, loras_of(model, factors))
    asked = {"tokenizer": first.tokenizer, "prompt_template": first.prompt_template}
    more = {"fused": weights}
    save_lora(model, path, SkillMeta(stage="lora", base={"file": base.name}, more=more, **asked))
    ranks = ", ".join(map(str, sorted({A.size(0) for A, _ in factors.values()})))
    print(f"fused {weights_text(weights)}: rank {ranks}, {100 * lost:.2f} % of the update is lost")
    print(f"saved {path}")
    return path


if __name__ == "__main__":
    run(main)
