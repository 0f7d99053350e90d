"""Bases and skills for other tools, and from them: python scripts/convert_model.py --to FORMAT

    --to huggingface --base out/full_sft_512.pth --output DIR          a stock Llama folder
    --to huggingface --skill medical=0.7 identity --output DIR         the same with skills merged
    --to peft --lora_name medical --output DIR                         an adapter folder
    --to gguf --base out/full_sft_512.pth --output FILE.gguf           for llama.cpp and Ollama
    --to gguf --lora_name medical --output FILE.gguf                   an adapter for these
    --to minimind --base out/full_sft_512.pth --output FILE.pth        for MiniMind of April 2025
    --to minimind --lora_name medical --output FILE.pth                a LoRA for it
    --from huggingface --source DIR --output theirs/full_sft_512.pth   a Llama folder as a base
    --from peft --source DIR --base BASE --lora_name NAME              an adapter folder as a skill
    --from minimind --source FILE --output theirs/full_sft_512.pth     MiniMind's base as ours
    --from minimind --source FILE --base BASE --lora_name NAME         MiniMind's LoRA as a skill

Nothing that is there is touched. What was written gets its name only after it was read again and
computed the same logits.
"""

import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import run
from core.options import CheckedOptions, option, parse, require
from core.paths import skill_name, skill_weights

BASE_HELP = "base file, Hugging Face folder or owner/model (default: the skill's own, or newest)"
TEMPLATE_HELP = "how a skill from elsewhere is asked, such as 'Q: {user}\\nA: '"
OUTPUT_HELP = "what to write: a folder, a .gguf file or a .pth file"
DTYPE_HELP = "of a written base's weights; q8_0 and q4_0 with --to gguf only"
# The flags of each direction and format: those it needs, and those it can do without.
WRITE = {"base", "out_dir", "tokenizer_path", "allow_base_mismatch"}
WRITE_BASE = ({"output"}, WRITE | {"skill", "dtype"})
WRITE_SKILL = ({"lora_name", "output"}, WRITE)
READ_SKILL = {"source", "base", "lora_name"}, {"out_dir", "tokenizer_path", "prompt_template"}
FLAGS = {"--to huggingface": WRITE_BASE, "--to peft": WRITE_SKILL}
FLAGS |= {"--to gguf": WRITE_BASE, "--to gguf --lora_name": WRITE_SKILL}
FLAGS |= {"--to minimind": WRITE_BASE, "--to minimind --lora_name": WRITE_SKILL}
FLAGS |= {"--from huggingface": ({"source", "output"}, set()), "--from peft": READ_SKILL}
FLAGS |= {"--from minimind": ({"source", "output"}, {"tokenizer_path"})}
FLAGS |= {"--from minimind --lora_name": READ_SKILL}
# By what ``to`` says, where the output is no folder: what it is, the ending of its name, and of
# that of the file beside it.
FILES = {"gguf": ("a file", ".gguf", ".Modelfile"), None: ("a base file", ".pth", ".json")}
FILES |= {"minimind": ("a file", ".pth", ".json")}


@dataclass
class Options(CheckedOptions):
    """Write a base or a skill as another tool's files (--to), or read such files (--from)."""

    to: Literal["huggingface", "peft", "gguf", "minimind"] | None = option(None, "format to write")
    source_format: Literal["huggingface", "peft", "minimind"] | None = option(
        None, "format to read", flag="from"
    )
    source: Path | None = option(None, "folder or MiniMind's file to read, with --from")
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
        self.task = f"--to {self.to}" if self.to else f"--from {self.source_format}"
        if self.lora_name is not None and f"{self.task} --lora_name" in FLAGS:
            self.task += " --lora_name"
        self._check_flags()
        skill_weights(self.skill)
        if self.lora_name is not None:
            skill_name(self.lora_name)
        if self.output is not None:
            self._check_output()
        fits = self.to == "gguf" or "float" in self.dtype
        require(fits, f"--dtype {self.dtype} is for --to gguf only")

    def _check_flags(self) -> None:
        given = {entry.name for entry in fields(self) if getattr(self, entry.name) != entry.default}
        needed, optional = FLAGS[self.task]
        missing = " and ".join(f"--{name}" for name in sorted(needed - given))
        require(not missing, f"{self.task} needs {missing}; see --help")
        idle = given - needed - optional - {"to", "source_format"}
        unused = ", ".join(f"--{name}" for name in sorted(idle))
        require(not unused, f"{self.task} has no use for {unused}; leave it out")

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
    from scripts.conversions import CONVERSIONS

    return CONVERSIONS[options.task](options)


if __name__ == "__main__":
    run(main)
