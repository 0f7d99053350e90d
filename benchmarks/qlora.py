"""What a base in 4 bits costs and saves: the same skill on the same base, in fp32 and in NF4, two
seeds each.

python benchmarks/qlora.py --base FILE --data medical_zh.jsonl.gz   (needs requirements-4bit.txt)
"""

import statistics
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.result_file import write_results
from benchmarks.studies import Runs, SkillStudy, at_once, costs
from core.errors import run
from core.options import option, parse, require
from core.paths import lora_paths

SEEDS = (1, 2)
METHODS = {"fp32": [], "nf4": ["--load_in_4bit"]}


@dataclass
class Options(SkillStudy):
    """The gap in held-out loss; then, with nothing beside it, bits a parameter, peak memory and
    speed.
    """

    max_steps: int = option(100, "optimizer steps of a run")
    batch_size: int = option(16, "rows of a step")
    val_tokens: int = option(65536, "how many held-out tokens a score reads")
    larger: Path | None = option(
        None, "another base, a Hugging Face folder, of which only the costs are measured"
    )
    cost_rounds: int = option(3, "how often the speed and memory of each method are measured")
    out_dir: Path = option(Path("out/qlora"), "folder of the runs")
    result: Path = option(
        Path("benchmarks/results/qlora.json"), "file of the figures; what it holds is not run again"
    )

    def __post_init__(self):
        super().__post_init__()
        require(self.cost_rounds >= 1, f"--cost_rounds {self.cost_rounds} must be at least 1")


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    runs = Runs(options.result, options.settings(), ("torch", "transformers", "bitsandbytes"))

    def made(method: str, seed: int) -> dict:
        return runs.get(f"{method} {seed}", lambda: train(method, seed, options))

    at_once(options.jobs, lambda pair: made(*pair), product(METHODS, SEEDS))
    found = runs.found
    found["gaps"] = [made("nf4", seed)["loss"] - made("fp32", seed)["loss"] for seed in SEEDS]
    found["mean_gap"] = statistics.mean(found["gaps"])
    measured = found.setdefault("cost", {})
    for base, flags in ((options.base, []), (options.larger, ["--max_steps", 2])):
        if base is not None and base.name not in measured:
            measured[base.name] = cost_on(base, flags, options)
            write_results(options.result, found)
    print(f"NF4 - fp32: {', '.join(f'{gap:+.4f}' for gap in found['gaps'])} nats a token")
    for base, methods in found["cost"].items():
        for method, figures in methods.items():
            speed, memory = (
                statistics.median(figures[name]) for name in ("tokens_per_second", "peak_memory_mb")
            )
            bits, whole = (
                figures.get(name, 32) for name in ("bits_per_parameter", "bits_of_the_whole_base")
            )
            print(
                f"{base}, {method}: {bits} bits a parameter of the Linears, {whole} in the whole base;",
                end=" ",
            )
            print(f"{speed:,.0f} tokens/s, peak memory {memory:,.0f} MB")
    return found


def cost_on(base: Path, flags: list, options: Options) -> dict[str, dict]:
    """Of each method, on all cores."""

    def dry_run(method: str) -> str:
        return options.train(method, [*METHODS[method], "--dry_run", *flags], base, jobs=1)

    return costs(METHODS, options.cost_rounds, dry_run)


def train(method: str, seed: int, options: Options) -> dict:
    """Held-out loss of one skill before and after."""
    from model.lora.skill_file import read_lora

    options.train(f"{method}-{seed}", ["--seed", seed, *METHODS[method]])
    (path,) = lora_paths(options.out_dir, f"{method}-{seed}")
    held_out = read_lora(path)[1].metrics["domain"]
    return {"base_loss": held_out["first"]["loss"], "loss": held_out["last"]["loss"]}


if __name__ == "__main__":
    run(main)
