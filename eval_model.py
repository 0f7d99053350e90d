"""Chat with a trained model and swap its skills: python eval_model.py --lora_name identity"""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path

from core.errors import run
from core.options import CheckedOptions, option, parse, require
from core.paths import find_skill, skill_name

BASE_HELP = "base file, Hugging Face folder or owner/model (default: the skill's, else the newest)"
TEMPLATE_HELP = r"asks a base without chat template (default: as its skill did): 'Q: {user}\nA: '"
PENALTY_HELP = "above 1 makes tokens that were used before less likely"


@dataclass
class Options(CheckedOptions):
    """Chat with a base and its skills in the terminal; a pretrained base continues your text."""

    out_dir: Path = option(Path("out"), "folder of the trained files")
    base: Path | None = option(None, BASE_HELP)
    prompt_template: str | None = option(None, TEMPLATE_HELP)
    lora_name: str | None = option(None, "skill to start with")
    system: str | None = option(None, "system turn that every conversation begins with")
    prompt: str | None = option(None, "answer this once and leave")
    temperature: float = option(0.7, "0 always takes the likeliest token", at_least=0)
    top_p: float = option(0.9, "draw from the likeliest with this share", above=0, at_most=1)
    top_k: int = option(0, "draw from this many likeliest tokens; 0: all", at_least=0)
    repetition_penalty: float = option(1.0, PENALTY_HELP, at_least=0.1, at_most=10)
    max_new_tokens: int = option(512, "longest answer", at_least=1)
    history_cnt: int = option(6, "earlier messages sent with a question, even", at_least=0)
    seed: int | None = option(None, "makes answers repeatable", at_least=0, below=2**63)
    load_in_4bit: bool = option(False, "the base in 4 bits, as its QLoRA skills were trained")
    device: str = option("auto", "auto (cuda, then mps, then cpu), or a device such as cuda:1")
    tokenizer_path: Path | None = option(None, "tokenizer folder (default: the base's own)")
    allow_base_mismatch: bool = option(False, "use a skill on a base it was not trained on")

    def __post_init__(self):
        super().__post_init__()
        # A temperature so small that the division overflows means greedy, and that is written 0.
        wrong = f"--temperature {self.temperature} must be 0 (greedy) or at least 0.01"
        require(self.temperature == 0 or self.temperature >= 0.01, wrong)
        wrong = f"--history_cnt {self.history_cnt} must be even: a question and its answer make two"
        require(self.history_cnt % 2 == 0, wrong)
        # Bytes that were no text in the terminal's encoding arrive as lone surrogates.
        for name in ("prompt", "system"):
            if (text := getattr(self, name)) is not None:
                setattr(self, name, text.encode(errors="replace").decode())
                require(bool(text.strip()), f"--{name} is empty")
        if self.lora_name is not None:
            skill_name(self.lora_name)


def main(argv: list[str] | None = None) -> None:
    options = parse(Options, argv)
    import torch

    from dataset.tokenizer import tokenizer_of
    from model.generation import Sampling
    from serving.session import ChatSession
    from serving.terminal import answer, chat
    from trainer.runtime import Runtime

    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # a pipe on Windows is not UTF-8 by itself
            stream.reconfigure(encoding="utf-8", errors="replace")
    runtime = Runtime.start(options.device, "float32")
    base, model, record, skill = opened(options, runtime.device)
    templates = options.prompt_template, skill and skill[1].prompt_template
    tokenizer = tokenizer_of(record, base, options.tokenizer_path, options.out_dir, *templates)
    sampling = Sampling(**{each.name: getattr(options, each.name) for each in fields(Sampling)})
    names = ("history_cnt", "out_dir", "allow_base_mismatch")
    settings = {name: getattr(options, name) for name in names}
    settings["seed"] = torch.seed() if options.seed is None else options.seed
    settings["continues"] = (record.stage or base.name.partition("_")[0]) == "pretrain"
    settings["keeps_template"] = options.prompt_template is not None
    session = ChatSession(model, tokenizer, sampling, **settings)
    if options.lora_name is not None:
        session.use_skill(options.lora_name, skill)
    session.use_system(options.system)
    print(f"base: {base}, skill: {session.skill or 'none'}, {runtime}", file=sys.stderr)
    if options.prompt is None:
        chat(session)
    else:
        answer(session, options.prompt)


def opened(options: Options, device) -> tuple:
    """Path, model and record of the base, and what ``read_lora`` gave for the skill, or None."""
    # The skill decides the base, unless one is named, and the base which of the skill's files.
    from model.lora.skill_file import read_lora
    from model.quantized import quantize
    from model.weights import choose_base, load_base

    path = skill = None
    if options.lora_name is not None and options.base is None:
        path = find_skill(options.out_dir, options.lora_name)
        skill = read_lora(path)
    base = choose_base(options.out_dir, options.base, skill and skill[1].base)
    model, record = load_base(base, device)
    if options.load_in_4bit:
        with redirect_stdout(sys.stderr):  # an answer can be piped
            quantize(model)
    if options.lora_name is not None:
        found = find_skill(options.out_dir, options.lora_name, model.config.hidden_size)
        skill = skill if found == path else read_lora(found)
    return base, model, record, skill


if __name__ == "__main__":
    run(main)
