"""Fuse skills: python scripts/merge_lora.py medical=0.7 identity --output
out/full_sft_medic_512.pth
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import UserError, run
from core.options import option, parse, require
from core.paths import lora_path, lora_paths, skill_name, skill_of, skill_weights, weights_text


@dataclass
class Options:
    """Write skills into a copy of their base (--output), or several skills into one
    (--lora_name).
    """

    skills: tuple[str, ...] = option(
        (), "NAME or NAME=WEIGHT; a negative weight subtracts", positional=True
    )
    out_dir: Path = option(Path("out"), "folder of the trained files")
    base: Path | None = option(
        None, "base file, Hugging Face folder or owner/model (default: the first skill's own)"
    )
    output: Path | None = option(None, "new base: a .pth file, or a folder for a Hugging Face base")
    dtype: Literal["float32", "bfloat16"] = option("float32", "of the new base's weights")
    load_in_4bit: bool = option(
        False, "into the base as its 4 bits stand for it, as QLoRA skills were trained"
    )
    lora_name: str | None = option(None, "new skill: the weighted sum, exact unless --rank cuts it")
    rank: int = option(
        0, "largest rank of the new skill, by singular values; 0: the sum of all ranks"
    )
    tokenizer_path: Path | None = option(
        None, "tokenizer of a Hugging Face base (default: the base's own)"
    )
    allow_base_mismatch: bool = option(False, "use a skill on a base it was not trained on")

    def __post_init__(self):
        skill_weights(self.skills)
        require(
            (self.output is None) != (self.lora_name is None),
            "choose --output (a base) or --lora_name (a skill)",
        )
        require(self.rank >= 0, f"--rank {self.rank} must not be negative")
        require(
            not (self.rank and self.output),
            "--rank cuts a skill: give --lora_name instead of --output",
        )
        of_base = self.load_in_4bit or self.dtype != "float32" or self.tokenizer_path is not None
        wrong = "--dtype, --load_in_4bit and --tokenizer_path are for --output, not for --lora_name"
        require(not (of_base and self.lora_name), wrong)
        if self.lora_name is not None:
            skill_name(self.lora_name)


def main(argv: list[str] | None = None) -> Path:
    options = parse(Options, argv)
    from model.bases import choose_base, open_base
    from model.lora.library import SkillLibrary
    from model.lora.skill_file import read_lora
    from model.quantized import quantize

    weights = skill_weights(options.skills)
    first = read_lora(skill_file(options, next(iter(weights))))[1]
    base = choose_base(options.out_dir, options.base, first["base"])
    model, record = open_base(base)
    print(f"base: {base}")
    if options.load_in_4bit:
        quantize(model)
    library, tokenizers = SkillLibrary(model), set()
    for name in weights:
        path = skill_file(options, name, model.config.hidden_size)
        meta = library.add(name, path, allow_base_mismatch=options.allow_base_mismatch)
        tokenizers.add(meta.get("tokenizer"))
        if options.output and meta["options"].get("load_in_4bit") and not options.load_in_4bit:
            print(
                f"note: {name} was trained on 4 bits; --load_in_4bit merges into the weights that it has seen"
            )
    if len(tokenizers - {None}) > 1:
        print(
            f"note: the skills were trained with other tokenizers or templates; {next(iter(weights))}'s is taken"
        )
    if options.output:
        return merge_into_base(options, base, record, first, library, weights)
    return fuse(options, base, first, library, weights)


def skill_file(options: Options, name: str, dim: int | None = None) -> Path:
    """The skill's file, of this ``dim`` or the newest of any."""
    if dim is not None:
        found = [path for path in (lora_path(options.out_dir, name, dim),) if path.is_file()]
    else:
        found = lora_paths(options.out_dir, name)
    if not found:
        there = (
            ", ".join(sorted({skill_of(path) for path in lora_paths(options.out_dir)}))
            or "none yet"
        )
        raise UserError(
            f"there is no file {lora_path(options.out_dir, name, dim or '<dim>')}; skills here: {there}"
        )
    return found[-1]


def merge_into_base(
    options: Options, base: Path, record: dict, first: dict, library, weights: dict
) -> Path:
    """Write the base with the skills in its weights, and say how far its logits are from the
    attached skills'.
    """
    import torch

    from dataset.tokenizer import check_trained_with, tokenizer_of
    from model.bases import save_folder
    from model.LMConfig import context_of
    from model.lora.library import merge_lora
    from model.model import MiniMindLM
    from model.quantized import dequantize
    from model.weights import save_base

    model, output = library.model, options.output
    ours = isinstance(model, MiniMindLM)
    ending = "end in .pth" if ours else "be a folder, not a .pth file"
    require((output.suffix == ".pth") == ours, f"--output {output} must {ending}")
    for path in (output, output.with_suffix(".json")) if ours else (output,):
        require(not path.exists(), f"--output: {path} exists; choose another or delete it")
    if ours:
        require(
            options.tokenizer_path is None,
            f"--tokenizer_path is for Hugging Face bases, and {base} is none",
        )
    else:
        tokenizer = tokenizer_of(
            base,
            options.tokenizer_path,
            options.out_dir,
            fingerprint=record.get("tokenizer"),
            vocab_size=record["config"]["vocab_size"],
            is_foreign="stage" in record and record.get("tokenizer") is None,
            prompt_template=first["options"].get("prompt_template"),
        )
        if not options.allow_base_mismatch:
            check_trained_with(tokenizer, first.get("tokenizer"), next(iter(weights)))
    ids = (
        torch.arange(min(64, context_of(model.config)))[None] * 31 % record["config"]["vocab_size"]
    )

    @torch.no_grad()
    def logits() -> torch.Tensor:
        return model(input_ids=ids).logits.float()

    library.use(weights)
    attached = logits()
    dequantize(model)
    merge_lora(model)
    model.to(getattr(torch, options.dtype))
    drift = (logits() - attached).abs().max()
    print(
        f"merged {weights_text(weights)}: logits differ by at most {drift:.1e} from those with the skills attached"
    )
    if ours:
        fused = {
            "base": {"file": base.name, "fingerprint": record["fingerprint"]},
            "skills": weights,
        }
        save_base(output, model, {**record, "merged": fused})
    else:
        save_folder(model, tokenizer, output)
    print(f"saved {output}")
    return output


def fuse(options: Options, base: Path, first: dict, library, weights: dict) -> Path:
    """Write the weighted sum of the skills as one skill, which is asked as the first of them
    was.
    """
    from model.lora.library import truncated
    from model.lora.skill_file import base_fingerprint, write_lora

    path = lora_path(options.out_dir, options.lora_name, library.model.config.hidden_size)
    if path.exists():
        raise UserError(f"{path} exists; choose another --lora_name or delete it")
    factors, lost = library.factors(weights), 0.0
    if options.rank:
        factors, lost = truncated(factors, options.rank)
    tensors = {}
    for target, (A, B) in factors.items():
        tensors |= {f"{target}.lora.A.weight": A, f"{target}.lora.B.weight": B}
    asked = {"prompt_template": first["options"].get("prompt_template")}
    meta = {
        "stage": "lora",
        "base": {"file": base.name},
        "tokenizer": first.get("tokenizer"),
        "options": asked,
    }
    meta["fused"] = weights
    write_lora(path, tensors, dict.fromkeys(factors, 1.0), base_fingerprint(library.model), meta)
    ranks = sorted({A.size(0) for A, _ in factors.values()})
    print(
        f"fused {weights_text(weights)}: rank {', '.join(map(str, ranks))}, {100 * lost:.2f} % of the update is lost"
    )
    print(f"saved {path}")
    return path


if __name__ == "__main__":
    run(main)
