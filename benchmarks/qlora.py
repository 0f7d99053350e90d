"""What a base in 4 bits costs and saves: the same skill on the same base, in fp32 and in NF4, two seeds each.

python benchmarks/qlora.py --base FILE --data medical_zh.jsonl.gz   (needs requirements-4bit.txt)
"""

import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import UserError, run
from core.options import option, parse, require

DOOR = Path(__file__).resolve().parent.parent / "train_lora.py"
SEEDS = (1, 2)
METHODS = {"fp32": [], "nf4": ["--load_in_4bit"]}


@dataclass
class Options:
    """Bits a parameter, peak memory, speed, and the gap in held-out loss."""

    base: Path | None = option(None, "chat base")
    data: Path | None = option(None, "chats of the skill")
    max_steps: int = option(150, "optimizer steps of a run")
    batch_size: int = option(16, "rows of a step")
    out_dir: Path = option(Path("out/qlora"), "folder of the runs")
    result: Path | None = option(Path("benchmarks/results/qlora.json"), "file of the figures")

    def __post_init__(self):
        require(self.base is not None, "name a chat base with --base")
        require(self.data is not None, "name the skill's chats with --data")
        require(min(self.max_steps, self.batch_size) >= 1, "--max_steps and --batch_size begin at 1")


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    from benchmarks.result_file import measured_on, write_results

    runs = {method: [] for method in METHODS}
    for seed in SEEDS:
        for method, found in runs.items():
            found.append(train(method, seed, options))
            print(method, seed, found[-1], flush=True)
    gaps = [small["loss"] - whole["loss"] for small, whole in zip(runs["nf4"], runs["fp32"], strict=True)]
    settings = {"base": options.base.name, "data": options.data.name}
    settings |= {"max_steps": options.max_steps, "batch_size": options.batch_size}
    figures = {"settings": settings, "runs": runs, "gaps": gaps, "mean_gap": statistics.mean(gaps)}
    figures |= measured_on(("torch", "transformers", "bitsandbytes"))
    print(f"NF4 - fp32: {', '.join(f'{gap:+.4f}' for gap in gaps)} nats a token")
    write_results(options.result, figures)
    return figures


def train(method: str, seed: int, options: Options) -> dict:
    """One skill, in a process of its own."""
    from core.paths import metrics_path
    from model.model_lora import read_lora

    out = options.out_dir / f"{method}-{seed}"
    command = [sys.executable, DOOR, "--base", options.base, "--data_path", options.data, "--out_dir", out]
    command += ["--lora_name", "medical", "--seed", seed, "--max_steps", options.max_steps, "--device", "cpu"]
    command += ["--batch_size", options.batch_size, "--val_tokens", 65536, *METHODS[method]]
    environment = os.environ | {"PYTHONUTF8": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise UserError(f"{method} failed: {(done.stderr.strip() or f'exit code {done.returncode}').splitlines()[-1]}")
    (path,) = (out / "lora").glob("lora_medical_*.pth")
    held_out = read_lora(path)[1]["metrics"]["domain"]
    summary = json.loads(metrics_path(out, path.stem).read_text(encoding="utf-8").splitlines()[-1])["summary"]
    figures = {"seed": seed, "base_loss": held_out["first"]["loss"], "loss": held_out["last"]["loss"]}
    figures |= {name: summary[name] for name in ("tokens_per_second", "peak_memory_mb")}
    if bits := re.search(r"NF4: ([\d.]+) bits a parameter there, ([\d.]+) in the whole base", done.stdout):
        figures |= {"bits_per_parameter": float(bits[1]), "bits_of_the_whole_base": float(bits[2])}
    return figures


if __name__ == "__main__":
    run(main)
