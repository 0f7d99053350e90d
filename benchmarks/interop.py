"""Bases and skills in other tools' hands: python benchmarks/interop.py --minimind DIR --vllm DIR

Writes each kind of file that scripts/convert_model.py can, and lets the tools themselves compute
with it: transformers, PEFT, llama.cpp, mlx-lm, lm-evaluation-harness, MiniMind's own code and the
files of vLLM that read adapters.

    pip install "mlx[cpu]" mlx-lm lm-eval

A tool that is not installed is left out, and says so. Exit code 1: one computes something else.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.harness import apart as apart_by_task
from benchmarks.harness import harness, likelihoods, write_task
from benchmarks.llama_cpp import apart, llama_cpp
from benchmarks.result_file import measured_on, write_results
from benchmarks.seeded_model import fill, seeded_model
from benchmarks.vllm_child import REFUSED
from core.errors import UserError, run
from core.options import CheckedOptions, option, parse, require
from core.paths import REPOSITORY, TOKENIZER_DIR, bundled_data, lora_path
from dataset.tokenizer import load_tokenizer, tokenizer_fingerprint
from interop.check import difference, logits_of, probe
from interop.gguf import FORMATS
from interop.rounding import kept
from model.LMConfig import LMConfig
from model.lora.library import SkillLibrary
from model.lora.skill_file import SkillMeta, attach_lora, save_lora
from model.model import MiniMindLM
from model.model_lora import apply_lora, remove_lora
from model.weights import RunRecord, load_base, read_tensors, save_base
from scripts import convert_model, eval_benchmark
from scripts.quickstart_stages import flag_words

SHAPE = {"dim": 64, "n_layers": 2, "vocab_size": 6400, "max_seq_len": 256}
SKILLS = {
    "skill": {"rank": 16, "alpha": 32.0},
    "all": {"rank": 4, "target_modules": "all-linear"},
    "dora": {"rank": 16, "use_dora": True},
    "pissa": {"rank": 8, "init_lora_weights": "pissa"},
}
MIX = ("skill=0.7", "all")
UNLEARNED, CHATS = bundled_data("lora_medical.jsonl"), 400  # rows that no bundled base learns
MOST_RISE = 0.002  # nats, in q8_0
MOST_UNTRAINED = 5e-7  # of the largest logit, for mlx-lm
FOREIGN = "foreign"  # one that was made on a Hugging Face model
ADAPTERS = (*SKILLS, FOREIGN)
# The largest difference: of logits, by the largest logit, or of log-probabilities.
ALLOWED = {"transformers": 1e-4, "PEFT": 1e-4, "llama.cpp": 2e-3, "mlx-lm": 1e-4}
ALLOWED |= {"lm-eval": 2e-3, "vLLM": 1e-4, "MiniMind": 1e-4}
PACKAGES = {"PEFT": "peft", "llama.cpp": "xllamacpp", "mlx-lm": "mlx_lm", "lm-eval": "lm_eval"}
REFUSALS = {"llama.cpp": ("dora",), "vLLM": ("dora",), "MiniMind": ("all", "dora")}
MINIMIND = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from model.LMConfig import LMConfig
from model.model import MiniMindLM
from model.model_lora import apply_lora, load_lora
job = json.loads(sys.argv[2])
model = MiniMindLM(LMConfig(**job["config"])).eval()
model.load_state_dict(torch.load(job["base"], weights_only=True), strict=True)
if job["lora"]:
    apply_lora(model)
    load_lora(model, job["lora"])
with torch.no_grad():
    torch.save({"logits": model(torch.tensor(job["ids"])).logits[0]}, job["logits"])
"""


@dataclass
class Options(CheckedOptions):
    """Print a matrix of tools and files: the largest difference, or why a cell is empty."""

    minimind: Path | None = option(None, "the folder of MiniMind's code of April 2025")
    vllm: Path | None = option(None, "a folder with vLLM's source, which is not installed")
    base: Path | None = option(None, "a chat base, whose loss in every GGUF format is measured")
    result: Path | None = option(
        REPOSITORY / "benchmarks/results/interop.json", "file of the figures"
    )

    def __post_init__(self):
        super().__post_init__()
        for name, wanted in (("minimind", "model/model.py"), ("vllm", "vllm/lora/lora_model.py")):
            folder = getattr(self, name)
            is_it = folder is None or (folder / wanted).is_file()
            require(is_it, f"--{name} {folder} holds no {wanted}")


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder), options.minimind, options.vllm)
        cells = {file: files.row(file) for file in ("base", *ADAPTERS, "merged", "mix")}
        rises = loss_rises(options.base, Path(folder)) if options.base else {}
        untrained = mlx_untrained(Path(folder)) if find_spec("mlx_lm") else None
    figures = {"allowed": ALLOWED, "cells": cells, "loss rises": rises}
    figures["mlx-lm, untrained"] = untrained
    installed = [name for name in PACKAGES.values() if find_spec(name)]
    packages = ["torch", "transformers", *(name.replace("_", "-") for name in installed)]
    write_results(options.result, figures | measured_on(tuple(packages)))
    print(table(cells))
    tools = [(file, tool) for file, row in cells.items() for tool in row]
    wrong = [f"{tool} on {file}" for file, tool in tools if bad(file, cells[file], tool)]
    if rises.get("q8_0", 0) > MOST_RISE:
        wrong.append(f"the loss in q8_0 rises by {rises['q8_0']:.4f}")
    if untrained and untrained > MOST_UNTRAINED:
        wrong.append(f"mlx-lm on an untrained base, by {untrained:.1e}")
    if wrong:
        sys.exit(f"computed otherwise: {', '.join(wrong)}")
    return cells


def loss_rises(base: Path, folder: Path) -> dict[str, float]:
    """By how many nats the loss of ``UNLEARNED`` chats rises with matrices in each GGUF format.

    They are rounded by us: ``save_base`` has checked that its files hold the same.
    """
    losses, tokenizer = {}, base.parent / "tokenizer"
    for dtype in FORMATS:
        model, record = load_base(base)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept(parameter, dtype if parameter.ndim == 2 else "float32", name))
        path = folder / f"full_sft_{dtype}.pth"
        save_base(path, model, record)
        flags = {"base": path, "out_dir": folder, "tokenizer_path": tokenizer, "most": CHATS}
        scored = eval_benchmark.main([str(UNLEARNED), *flag_words(flags)])
        losses[dtype] = scored["data"][0]["scores"]["base"]["loss"]
    rises = {dtype: loss - losses["float32"] for dtype, loss in losses.items()}
    print("the loss rises by", ", ".join(f"{rise:.4f} ({dtype})" for dtype, rise in rises.items()))
    return rises


def mlx_untrained(folder: Path) -> float:
    """mlx-lm on an untrained base: its logits are small, so that both round less."""
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(**SHAPE))
    base, llama = folder / "untrained_64.pth", folder / "untrained"
    known = tokenizer_fingerprint(load_tokenizer(TOKENIZER_DIR))
    save_base(base, model, RunRecord(stage="full_sft", tokenizer=known))
    convert_model.main(flag_words({"to": "huggingface", "base": base, "output": llama}))
    return difference(logits_of(model), mlx_logits(llama))


def mlx_logits(llama: Path) -> torch.Tensor:
    import mlx.core as mx
    from mlx_lm import load

    model, _ = load(str(llama))
    logits = model(mx.array(probe(SHAPE["vocab_size"]).tolist()))[0].astype(mx.float32)
    return torch.tensor(logits.tolist())


def bad(file: str, row: dict, tool: str) -> bool:
    """Whether a tool computes something else, or a file is refused that should not be."""
    found = row[tool]
    if isinstance(found, float):
        return tool in ALLOWED and not found <= ALLOWED[tool]
    return found.startswith("refused") and file not in REFUSALS.get(tool, ())


def table(cells: dict[str, dict]) -> str:
    names = ("change", *ALLOWED)
    lines = [["file", *names], ["---"] * (1 + len(names))]
    for file, row in cells.items():
        shown = (row.get(name, "") for name in names)
        lines.append([file, *(f"{x:.1e}" if isinstance(x, float) else x for x in shown)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Files:
    """A base and skills in ``folder``, and what every tool makes of their conversions."""

    def __init__(self, folder: Path, minimind: Path | None, vllm: Path | None):
        self.folder, self.minimind, self.source = folder, minimind, vllm
        self.tokenizer = load_tokenizer(TOKENIZER_DIR)
        self.base = folder / "full_sft_64.pth"
        model, _ = seeded_model(SHAPE)
        known = tokenizer_fingerprint(self.tokenizer)
        save_base(self.base, model, RunRecord(stage="full_sft", tokenizer=known))
        (folder / "lora").mkdir()
        for name, settings in SKILLS.items():
            apply_lora(model, **settings)
            move(model)
            save_lora(model, lora_path(folder, name, SHAPE["dim"]), SkillMeta(stage="lora"))
            remove_lora(model)
        self.hf = folder / "hf"
        convert_model.main(flag_words({"to": "huggingface", "base": self.base, "output": self.hf}))
        model, _ = load_base(self.hf)
        apply_lora(model, rank=4, target_modules=["q_proj", "down_proj"])
        move(model)
        save_lora(model, lora_path(folder, FOREIGN, SHAPE["dim"]), SkillMeta(stage="lora"))

    def row(self, file: str) -> dict[str, float | str]:
        """For each tool the largest difference on ``file``, or the reason why there is none."""
        found = {}
        if file in ADAPTERS:  # a file that changes nothing would be computed right by everyone
            changed = self.ours(file)
            found["change"] = difference(logits_of(self.ours("base")), logits_of(changed))
        judges = {"transformers": self.llama, "PEFT": self.peft, "llama.cpp": self.gguf}
        judges |= {"mlx-lm": self.mlx, "lm-eval": self.lm_eval, "vLLM": self.vllm}
        judges |= {"MiniMind": self.original}
        for tool, judge in judges.items():
            package = PACKAGES.get(tool)
            if package and not find_spec(package):
                found[tool] = f"not installed: {package}"
                continue
            try:
                found[tool] = judge(file)
            except UserError as error:
                found[tool] = f"refused: {error}"
            print(f"{file}, {tool}: {found[tool]}", flush=True)
        return found

    def converted(self, to: str, ending: str, **flags) -> Path:
        """A file in the format ``to``."""
        output = self.folder / f"{to}{len(list(self.folder.iterdir()))}{ending}"
        where = {"out_dir": self.folder, "base": self.base, "output": output}
        return convert_model.main(flag_words({"to": to} | where | flags))

    def merged(self, file: str) -> dict:
        """The flags that put ``file`` into a base."""
        return {"base": {}, "merged": {"skill": "all"}, "mix": {"skill": MIX}}[file]

    def ours(self, file: str):
        """Our own model of ``file``; for ``FOREIGN`` transformers', with our skill on it."""
        if file == FOREIGN:
            model, _ = load_base(self.hf)
            attach_lora(model, lora_path(self.folder, FOREIGN, SHAPE["dim"]))
            return model
        model, _ = load_base(self.base)
        weights = {"base": {}, "merged": {"all": 1.0}, "mix": {"skill": 0.7, "all": 1.0}}
        weights = weights.get(file, {file: 1.0})
        library = SkillLibrary(model)
        for name in weights:
            library.add(name, lora_path(self.folder, name, SHAPE["dim"]))
        library.use(weights)
        return model

    def adapter(self, file: str) -> Path:
        """An adapter folder of PEFT."""
        return self.converted("peft", "", lora_name=file, base=self.base_of(file))

    def base_of(self, file: str) -> Path:
        return self.hf if file == FOREIGN else self.base

    def llama(self, file: str) -> float | str:
        """transformers on a Llama folder."""
        if file in ADAPTERS:
            return "takes no adapter without PEFT"
        folder = self.converted("huggingface", "", **self.merged(file))
        return difference(logits_of(self.ours(file)), logits_of(opened(folder)))

    def peft(self, file: str) -> float | str:
        """PEFT on an adapter folder."""
        if file not in ADAPTERS:
            return "no adapter"
        theirs = opened(self.hf, self.adapter(file))
        return difference(logits_of(self.ours(file)), logits_of(theirs))

    def gguf(self, file: str) -> float | str:
        """llama.cpp on GGUF files."""
        if file == FOREIGN:
            return "its own converter is for these"
        base = self.converted("gguf", ".gguf", **({} if file in SKILLS else self.merged(file)))
        adapters = [self.converted("gguf", ".gguf", lora_name=file)] if file in SKILLS else []
        with llama_cpp(base, *adapters) as ask:
            return apart(ask, self.ours(file))

    def mlx(self, file: str) -> float | str:
        """mlx-lm on a Llama folder."""
        if file in ADAPTERS:
            return "adapters have a format of their own"
        folder = self.converted("huggingface", "", **self.merged(file))
        return difference(logits_of(self.ours(file)), mlx_logits(folder))

    def lm_eval(self, file: str) -> float | str:
        """lm-evaluation-harness on a local task, with ``peft=`` for a skill."""
        adapter = self.adapter(file) if file in ADAPTERS else None
        folder = self.hf if adapter else self.converted("huggingface", "", **self.merged(file))
        task = self.folder / f"task {file}"
        task.mkdir()
        data = write_task(task)
        known = likelihoods(self.ours(file), self.tokenizer, data, SHAPE["max_seq_len"])
        mix = {"base": (), "merged": ("all",), "mix": (" ".join(MIX),)}.get(file, (file,))
        flags = {"base": self.base_of(file), "out_dir": self.folder, "skills": mix}
        words = [str(data), "--language", "en", "--scored", "texts"]
        words += flag_words({name: value for name, value in flags.items() if value})
        scores = eval_benchmark.main(words)["data"][0]["scores"][mix[0] if mix else "base"]
        return apart_by_task((known, scores), harness(task, folder, adapter))

    def vllm(self, file: str) -> float | str:
        """The update that vLLM's own code reads in an adapter folder, in the weights of a Llama."""
        if self.source is None:
            return "not run: --vllm DIR"
        if file not in ADAPTERS:
            return "its engine was not run"
        adapter, output = self.adapter(file), self.folder / "updates.pth"
        child = Path(__file__).with_name("vllm_child.py")
        command = [sys.executable, "-X", "utf8", str(child)]
        command += map(str, (self.source, adapter, output))
        done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
        if done.returncode == REFUSED:
            raise UserError(done.stdout.strip().splitlines()[-1])
        done.check_returncode()
        model = opened(self.hf)
        with torch.no_grad():
            for name, update in read_tensors(output).items():
                model.get_submodule(name).weight += update
        return difference(logits_of(self.ours(file)), logits_of(model))

    def original(self, file: str) -> float | str:
        """MiniMind's own code on its files."""
        if self.minimind is None:
            return "not run: --minimind DIR"
        if file == FOREIGN:
            return "opens no Hugging Face model"
        base = self.converted("minimind", ".pth", **({} if file in SKILLS else self.merged(file)))
        lora = self.converted("minimind", ".pth", lora_name=file) if file in SKILLS else None
        logits = self.folder / "logits.pth"
        ids = probe(SHAPE["vocab_size"])
        job = {"config": SHAPE, "base": str(base), "lora": lora and str(lora)}
        job |= {"ids": ids.tolist(), "logits": str(logits)}
        command = [sys.executable, "-I", "-X", "utf8", "-c", MINIMIND]
        command += [str(self.minimind.resolve()), json.dumps(job)]
        subprocess.run(command, cwd=self.minimind, check=True)
        return difference(logits_of(self.ours(file)), read_tensors(logits)["logits"])


def move(model) -> None:
    """Give the LoRA of ``model`` weights that matter."""
    fill((name, p) for name, p in model.named_parameters() if p.requires_grad)


def opened(folder: Path, adapter: Path | None = None):
    """What transformers opens, under PEFT's adapter if one is given."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter is None:
        return model
    import peft

    return peft.PeftModel.from_pretrained(model, adapter)


if __name__ == "__main__":
    run(main)
