"""Training and answering on a GPU: python benchmarks/gpu.py

Runs the training commands with the default model on the accelerator of this machine, and measures
speed and memory, how far logits are from the CPU's, and whether runs repeat and resume bit for bit.
"""

import hashlib
import importlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.result_file import measured_on, write_results
from core.errors import UserError, run
from core.options import CheckedOptions, option, parse
from core.paths import (
    REPOSITORY,
    base_path,
    bundled_data,
    checkpoints_dir,
    lora_path,
    metrics_path,
)
from interop.check import difference, logits_of, probe
from model.generation import Sampling, generate
from model.weights import load_base
from trainer.runtime import Runtime

TEXTS, CHATS = bundled_data("pretrain_mini.jsonl"), bundled_data("sft_mini")
ROWS = bundled_data("lora_medical.jsonl")
MANY = 10**4  # epochs: the steps end a run
WIDE = f"train_pretrain --data_path {TEXTS} --epochs {MANY} --batch_size 128 --max_steps"
PRETRAIN = f"train_pretrain --data_path {TEXTS} --epochs {MANY} --max_steps"
CHAT = f"train_full_sft --data_path {CHATS} --epochs {MANY} --max_steps"
LORA = f"train_lora --data_path {ROWS} --general_data {CHATS} --epochs {MANY} --max_steps"
# What is timed -> the run whose metrics tell, and its command.
TIMED = {
    "pretraining": ("pretrain_512", f"{WIDE} 60"),
    "pretraining, compiled": ("pretrain_512", f"{WIDE} 60 --compile"),
    "pretraining, float32": ("pretrain_512", f"{WIDE} 20 --dtype float32"),
    "pretraining, float16": ("pretrain_512", f"{WIDE} 60 --dtype float16"),
    "chats": ("full_sft_512", f"{CHAT} 100 --batch_size 256"),
    "skill": ("lora_timed_512", f"{LORA} 100 --batch_size 64 --lora_name timed"),
    "skill, 4 bits": (
        "lora_timed_512",
        f"{LORA} 100 --batch_size 64 --lora_name timed --load_in_4bit --optimizer paged_adamw",
    ),
    "skill, keep 0": ("lora_timed_512", f"{LORA} 100 --batch_size 64 --lora_name timed --keep 0"),
}
# A run -> the file that it writes, and its command: 20 steps, saved after 10 and 20.
EXACT = {
    "pretrain_512": (base_path, f"{PRETRAIN} 20"),
    "full_sft_512": (base_path, f"{CHAT} 20"),
    "lora_exact_512": (lora_path, f"{LORA} 20 --lora_name exact"),
}


@dataclass
class Options(CheckedOptions):
    """Measure training and answering on this machine's accelerator."""

    device: str = option("cuda", "the accelerator, as the training commands name it")
    new_tokens: int = option(400, "tokens of the answer whose speed is measured", at_least=2)
    result: Path = option(REPOSITORY / "benchmarks/results/gpu.json", "file of the figures")


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    device = Runtime.start(options.device).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    found = measured_on(("torch", "transformers")) | {"device": name}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.device)
        for name, figures in bench.measured(options.new_tokens):
            found.setdefault(name, {}).update(figures)
            print(json.dumps({name: figures}), flush=True)
            write_results(options.result, found)
    return found


class Bench:
    """One folder of results, filled by commands on one device."""

    def __init__(self, out: Path, device: str):
        self.out, self.device = out, device

    def measured(self, new_tokens: int) -> Iterator[tuple[str, dict]]:
        """Everything, one measurement after another, under the names of its figures."""
        yield "exact", self.exact()
        yield "apart", self.apart()
        yield "answering", self.answering(new_tokens)
        for name in TIMED:
            yield "timed", {name: self.timed(name)}

    def train(self, command: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        flags = f"--out_dir {self.out} --device {self.device} --log_interval 10".split()
        door, *words = command.split()
        importlib.import_module(door).main(words + flags)

    def exact(self) -> dict:
        """Whether each run's file is the same when it is repeated, and when it is resumed."""
        found = {}
        for name, (path, command) in EXACT.items():
            stage, _, dim = name.removeprefix("lora_").rpartition("_")
            file, command = path(self.out, stage, int(dim)), f"{command} --save_interval 10"
            self.train(command)
            once = digest(file)
            self.train(command)
            again = digest(file)
            states = sorted(checkpoints_dir(self.out, name).glob("step-*"))
            shutil.rmtree(states[-1])
            self.train(f"{command} --resume")
            found[name] = {"repeated": once == again, "resumed": digest(file) == again}
        return found

    def apart(self) -> dict:
        """The largest difference to the CPU's float32 logits, by the largest of these."""
        model, _ = load_base(base_path(self.out, "full_sft", 512))
        expected, found = logits_of(model), {}
        model.to(self.device)
        ids = probe(model.config.vocab_size).to(self.device)
        for dtype in ("float32", "bfloat16", "float16"):
            with torch.no_grad(), Runtime.start(self.device, dtype).autocast():
                found[dtype] = difference(expected, model(ids).logits[0].float().cpu())
        return found

    def answering(self, new_tokens: int) -> dict:
        """Tokens/s of one greedy answer in float32, as the chat computes it."""
        model, _ = load_base(base_path(self.out, "full_sft", 512))
        model.to(self.device).eval()
        prompt, speeds = probe(model.config.vocab_size)[0].tolist(), []
        for _ in range(3):
            began = time.perf_counter()
            settings = Sampling(temperature=0, max_new_tokens=new_tokens)
            count = sum(1 for _ in generate(model, prompt, settings, set(), torch.Generator()))
            speeds.append(count / (time.perf_counter() - began))
        return {"tokens_per_second": max(speeds)}

    def timed(self, name: str) -> dict:
        """Speed, share of the products' ceiling, memory and last loss of a run of ``TIMED``."""
        run_name, command = TIMED[name]
        try:
            self.train(command)
        except UserError as error:  # such as 4 bits without bitsandbytes
            return {"failed": str(error)}
        lines = metrics_path(self.out, run_name).read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        last = [record for record in records if record.get("tokens_per_second")][-1]
        names = ("loss", "tokens_per_second", "matmul_share", "peak_memory_mb")
        return {field: last[field] for field in names}


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    run(main)
