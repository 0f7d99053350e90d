"""What holding to the base costs a skill of real data, and what it saves elsewhere.

python benchmarks/domain.py --pretrain zh.jsonl.gz --chats sft_zh.jsonl --domain medical_zh.jsonl.gz

Trains a small base from zero, then plain and held skills of the domain at equal steps.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.result_file import measured_on, write_results
from core.errors import run
from core.options import CheckedOptions, option, parse, require
from core.paths import base_path, lora_path, metrics_path
from scripts.quickstart_stages import flag_words

# A domain, unlike a few new answers, moves what is said in general: it is held less hard, but by
# more rows. Both numbers come from trials with seed 1.
ARMS = {"plain": {"keep": 0, "keep_best": False}, "held": {"keep": 0.85, "keep_rows": 9}}


@dataclass
class Options(CheckedOptions):
    """Train a base, once, and skills with each of the seeds; compare their held-out losses."""

    pretrain: Path | None = option(None, "texts for the base")
    chats: Path | None = option(None, "general chats, for the base, to hold and to judge")
    domain: Path | None = option(None, "chats of the domain")
    out_dir: Path = option(Path("out/domain"), "folder of the base and the skills")
    dim: int = option(192, "of the base", at_least=16)
    n_layers: int = option(4, "of the base", at_least=1)
    pretrain_steps: int = option(1200, "optimizer steps of 8 windows of 256", at_least=1)
    max_steps: int = option(450, "optimizer steps of 8 rows, of a skill", at_least=1)
    target_modules: str = option("all-linear", "of the skills")
    rank: int = option(128, "of the skills", at_least=1)
    seeds: tuple[int, ...] = option((1, 2, 3), "of a skill's training")
    result: Path | None = option(Path("benchmarks/results/domain.json"), "file of the figures")

    def __post_init__(self):
        super().__post_init__()
        for name in ("pretrain", "chats", "domain"):
            require(getattr(self, name) is not None, f"name a file with --{name} FILE")


def main(argv: list[str] | None = None) -> dict:
    options, found = parse(Options, argv), {}
    base = trained_base(options)
    for arm in ARMS:
        runs = [skill_figures(options, base, arm, seed) for seed in options.seeds]
        found[arm] = {name: mean(each[name] for each in runs) for name in runs[0]} | {"runs": runs}
        print(f"== {arm}: { {name: x for name, x in found[arm].items() if name != 'runs'} }")
    plain, held = found["plain"], found["held"]
    figures = {"domain loss, held - plain": held["domain loss"] - plain["domain loss"]}
    figures |= {f"general loss, rise, {arm}": found[arm]["general loss, rise"] for arm in ARMS}
    figures |= {"cost of a step": held["seconds a step"] / plain["seconds a step"]}
    print(figures)
    settings = {name: shown(value) for name, value in vars(options).items() if name != "result"}
    figures |= {"arms": found, "options": ARMS, "settings": settings}
    write_results(options.result, figures | measured_on(("torch",)))
    return figures


def trained_base(options: Options) -> Path:
    """A chat base of the two files; one of an earlier call is taken again."""
    import train_full_sft
    import train_pretrain

    base = base_path(options.out_dir, "full_sft", options.dim)
    if base.is_file():
        return base
    shared = {"out_dir": options.out_dir, "max_seq_len": 256, "batch_size": 8}
    shape = {"dim": options.dim, "n_layers": options.n_layers, "epochs": 1000}
    steps = {"max_steps": options.pretrain_steps, "learning_rate": 3e-3, "save_interval": 10**6}
    train_pretrain.main(flag_words(shared | shape | steps | {"data_path": options.pretrain}))
    chats = {"data_path": options.chats, "epochs": 4, "learning_rate": 1e-3, "val_ratio": 0.1}
    train_full_sft.main([*flag_words(shared | chats), "--keep_best"])
    return base


def skill_figures(options: Options, base: Path, arm: str, seed: int) -> dict[str, float]:
    """The losses after the last step, and its time, of one skill."""
    import train_lora
    from model.lora.skill_file import read_lora

    folder = options.out_dir / f"{arm}-{seed}"
    flags = {"out_dir": folder, "base": base, "data_path": options.domain, "seed": seed}
    flags |= {"general_data": options.chats, "max_seq_len": 256, "batch_size": 8}
    flags |= {"epochs": 1000, "max_steps": options.max_steps, "save_interval": 10**6}
    flags |= {"target_modules": options.target_modules, "rank": options.rank}
    flags |= {"lora_name": "domain", "val_ratio": 0.02}
    train_lora.main(flag_words(flags | ARMS[arm]))
    metrics = read_lora(lora_path(folder, "domain", options.dim))[1].metrics
    figures = {}
    for kind in ("domain", "general"):
        first, last = metrics[kind]["first"]["loss"], metrics[kind]["last"]["loss"]
        figures |= {f"{kind} loss": last, f"{kind} loss, rise": last - first}
    return figures | {"seconds a step": seconds_a_step(folder, f"lora_domain_{options.dim}")}


def seconds_a_step(folder: Path, name: str) -> float:
    """Of a run's metrics file; validations are not counted."""
    lines = metrics_path(folder, name).read_text(encoding="utf-8").splitlines()
    summary = json.loads(lines[-1])["summary"]
    return summary["seconds"] / summary["steps"]


def shown(value: object) -> object:
    return value.name if isinstance(value, Path) else value


if __name__ == "__main__":
    run(main)
