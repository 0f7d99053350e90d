"""Chat with a trained model and swap its skills: python eval_model.py --lora_name identity"""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from math import inf
from pathlib import Path

from core.errors import UserError, run
from core.options import option, parse, require
from core.paths import lora_path, lora_paths, skill_name


@dataclass
class Options:
    """Chat with a base and its skills in the terminal; a pretrained base continues your text
    instead.
    """

    out_dir: Path = option(Path("out"), "folder of the trained files")
    base: Path | None = option(
        None,
        "base file, Hugging Face folder or owner/model (default: the skill's own file, else the newest full_sft_*.pth,"
        " else pretrain_*.pth)",
    )
    prompt_template: str | None = option(
        None,
        r"how a Hugging Face base without a chat template is asked (default: as its skill was): 'Q: {user}\nA: '",
    )
    lora_name: str | None = option(None, "skill to start with")
    prompt: str | None = option(None, "answer this once and leave")
    temperature: float = option(0.7, "0 always takes the likeliest token")
    top_p: float = option(
        0.9, "draw from the likeliest tokens that sum to this probability; 1: all"
    )
    top_k: int = option(0, "draw from this many likeliest tokens; 0: all")
    repetition_penalty: float = option(
        1.0, "above 1 makes tokens that were used before less likely"
    )
    max_new_tokens: int = option(512, "longest answer")
    history_cnt: int = option(6, "earlier messages that go with a question, an even number")
    seed: int | None = option(None, "makes answers repeatable")
    load_in_4bit: bool = option(False, "the base in 4 bits, as its QLoRA skills were trained")
    device: str = option(
        "auto", "auto (cuda, then mps, then cpu), or a torch device such as cuda:1"
    )
    tokenizer_path: Path | None = option(
        None, "tokenizer folder (default: the one the base was trained with)"
    )
    allow_base_mismatch: bool = option(False, "use a skill on a base it was not trained on")

    def __post_init__(self):
        # A temperature so small that the division overflows means greedy, and that is written 0.
        require(
            self.temperature == 0 or 0.01 <= self.temperature < inf,
            f"--temperature {self.temperature} must be 0 (greedy) or at least 0.01",
        )
        require(0 < self.top_p <= 1, f"--top_p {self.top_p} must lie in (0, 1]")
        require(self.top_k >= 0, f"--top_k {self.top_k} must not be negative")
        require(
            0.1 <= self.repetition_penalty <= 10,
            f"--repetition_penalty {self.repetition_penalty} must lie between 0.1 and 10; 1 is none",
        )
        require(
            self.max_new_tokens >= 1, f"--max_new_tokens {self.max_new_tokens} must be at least 1"
        )
        require(
            self.history_cnt >= 0 and self.history_cnt % 2 == 0,
            f"--history_cnt {self.history_cnt} must be an even number: a question and its answer make two",
        )
        require(
            self.seed is None or 0 <= self.seed < 2**63,
            f"--seed {self.seed} must lie between 0 and 2^63",
        )
        if self.prompt is not None:
            # Bytes of the command line that were no text in the terminal's encoding arrive as lone
            # surrogates.
            self.prompt = self.prompt.encode(errors="replace").decode()
            require(bool(self.prompt.strip()), "--prompt is empty")
        if self.lora_name is not None:
            skill_name(self.lora_name)


def main(argv: list[str] | None = None) -> None:
    options = parse(Options, argv)
    import torch

    from dataset.tokenizer import tokenizer_of
    from model.bases import choose_base, open_base
    from model.generation import Sampling
    from model.quantized import quantize
    from serving.session import ChatSession
    from serving.terminal import answer, chat
    from trainer.runtime import Runtime

    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # a pipe on Windows is not UTF-8 by itself
            stream.reconfigure(encoding="utf-8", errors="replace")
    runtime = Runtime.start(options.device, "float32")
    base = choose_base(options.out_dir, options.base, skill_base(options))
    model, record = open_base(base, runtime.device)
    if options.load_in_4bit:
        with redirect_stdout(sys.stderr):  # an answer can be piped
            quantize(model)
    tokenizer = tokenizer_of(
        base,
        options.tokenizer_path,
        options.out_dir,
        fingerprint=record.get("tokenizer"),
        vocab_size=record["config"]["vocab_size"],
        is_foreign="stage" in record and record.get("tokenizer") is None,
        prompt_template=options.prompt_template,
        otherwise=skill_template(options, model.config.hidden_size),
    )
    session = ChatSession(
        model,
        tokenizer,
        Sampling(
            options.temperature,
            options.top_p,
            options.top_k,
            options.repetition_penalty,
            options.max_new_tokens,
        ),
        seed=torch.seed() if options.seed is None else options.seed,
        history_cnt=options.history_cnt,
        continues=record.get("stage", base.name.partition("_")[0]) == "pretrain",
        out_dir=options.out_dir,
        allow_base_mismatch=options.allow_base_mismatch,
        keeps_template=options.prompt_template is not None,
    )
    if options.lora_name is not None:
        session.use_skill(options.lora_name)
    print(f"base: {base}, skill: {session.skill or 'none'}, {runtime}", file=sys.stderr, flush=True)
    if options.prompt is None:
        chat(session)
    else:
        answer(session, options.prompt)


def skill_base(options: Options) -> dict | None:
    """What the asked-for skill's file says of its base, if it and no ``--base`` is named."""
    from model.lora.skill_file import read_lora

    if options.lora_name is None or options.base is not None:
        return None
    found = lora_paths(options.out_dir, options.lora_name)
    if not found:
        missing = lora_path(options.out_dir, options.lora_name, "<dim>")
        raise UserError(
            f"there is no skill file {missing}; train it with train_lora.py --lora_name {options.lora_name}"
        )
    return read_lora(found[-1])[1]["base"]


def skill_template(options: Options, dim: int) -> str | None:
    """The ``--prompt_template`` that the asked-for skill was trained with, if there was one."""
    from model.lora.skill_file import read_lora

    if (
        options.lora_name is None
        or not (path := lora_path(options.out_dir, options.lora_name, dim)).is_file()
    ):
        return None
    return read_lora(path)[1]["options"].get("prompt_template")


if __name__ == "__main__":
    run(main)
