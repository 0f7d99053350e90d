"""What holds a skill to its base, and what that costs: python benchmarks/keeping.py

Trains the quick start's skills in each of ``ARMS`` on the base that scripts/quickstart.py made,
with several seeds, and lets base, skills and their sum sit the exam of scripts/report.py.
"""

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.domain import seconds_a_step
from benchmarks.result_file import measured_on, read_results, write_results
from core.errors import run
from core.options import CheckedOptions, option, parse, require
from core.paths import base_path, bundled_data, lora_path
from scripts.quickstart_stages import DIM, LORA, SKILLS, flag_words

# Options of each arm. "replay": the general chats' answers are learned by cross-entropy, without
# strange texts; "others": the other skills' questions hold.
ARMS = {
    "plain": {"keep": 0, "keep_best": False},
    "replay": {"keep": 1},
    "keep 1, others": {"keep": 1},
    "keep 3, others": {"keep": 3},
    "keep 5, others": {"keep": 5},
    "keep 3, others, 4 rows": {"keep": 3, "keep_rows": 4},
}
FIXED = ("batch_size", "max_seq_len", "val_interval", "loraplus_lr_ratio", "target_modules")
PAIR, ALL = " ".join(SKILLS[:2]), " ".join(SKILLS)


@dataclass
class Options(CheckedOptions):
    """Train, examine and compare; one arm after another, but for those in the result file."""

    out_dir: Path = option(Path("out/quickstart"), "folder of the quick start")
    dim: int = option(DIM, "of its base", at_least=1)
    arms: tuple[str, ...] = option(tuple(ARMS), "which of ARMS")
    seeds: tuple[int, ...] = option((1, 2, 3), "of a skill's training")
    max_steps: int = option(LORA["max_steps"], "optimizer steps of a skill", at_least=1)
    learning_rate: float = option(LORA["learning_rate"], "peak learning rate", above=0)
    most: int = option(40, "most questions of a column", at_least=1)
    result: Path | None = option(Path("benchmarks/results/keeping.json"), "file of the figures")

    def __post_init__(self):
        super().__post_init__()
        unknown = set(self.arms) - ARMS.keys()
        require(not unknown, f"there is no arm {', '.join(unknown)}; there are {', '.join(ARMS)}")
        base = base_path(self.out_dir, "full_sft", self.dim)
        require(base.is_file(), f"there is no {base}: run scripts/quickstart.py first")


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    settings = {name: getattr(options, name) for name in ("max_steps", "learning_rate", "most")}
    settings |= {name: LORA[name] for name in FIXED} | {"seeds": list(options.seeds)}
    before = read_results(options.result)
    found = before.get("found", {}) if before.get("settings") == settings else {}
    for arm in (arm for arm in options.arms if arm not in found):
        runs = [figures_of(options, arm, seed) for seed in options.seeds]
        found[arm] = {name: mean(each[name] for each in runs) for name in runs[0]}
        found[arm]["runs"] = runs
        shown = {name: round(x, 4) for name, x in found[arm].items() if name != "runs"}
        print(f"== {arm}: {json.dumps(shown)}", flush=True)
        figures = {"settings": settings, "arms": {name: ARMS[name] for name in found}}
        write_results(options.result, figures | {"found": found} | measured_on(("torch",)))
    return found


def figures_of(options: Options, arm: str, seed: int) -> dict[str, float]:
    """Train the skills of an arm and let them sit the exam."""
    import train_lora
    from model.lora.skill_file import read_lora
    from scripts import report
    from trainer import keeping
    from trainer.loop import causal_loss_sum

    folder = options.out_dir / "keeping" / f"{arm.replace(', ', '-').replace(' ', '_')}-{seed}"
    base = base_path(options.out_dir, "full_sft", options.dim)
    shared = {"out_dir": folder, "base": base, "seed": seed, "epochs": 1000, **ARMS[arm]}
    shared |= {"max_steps": options.max_steps, "learning_rate": options.learning_rate}
    shared |= {"log_interval": 100, "save_interval": 10**6} | {name: LORA[name] for name in FIXED}
    figures, usual = {}, (keeping.read_general, keeping.skill_loss_sum)
    if arm == "replay":
        keeping.read_general = partial(real_chats_alone, keeping.read_general)
        keeping.skill_loss_sum = lambda model, batch, **_: causal_loss_sum(model, batch)
    try:
        for name in SKILLS:
            flags = {"data_path": skill_data(name), "lora_name": name}
            if "others" in arm:
                others = (skill_data(other) for other in SKILLS if other != name)
                flags["keep_questions"] = tuple(others)
            train_lora.main(flag_words(shared | flags))
    finally:
        keeping.read_general, keeping.skill_loss_sum = usual
    for name in SKILLS:
        metrics = read_lora(lora_path(folder, name, options.dim))[1].metrics
        for kind in ("domain", "general"):
            result = metrics[kind]
            last = result.get("best", result["last"])
            for unit in ("loss", "bits_per_byte"):
                figures[f"{name}: {kind} {unit}"] = last[unit]
                figures[f"{name}: {kind} {unit}, rise"] = last[unit] - result["first"][unit]
        seconds = seconds_a_step(folder, f"lora_{name}_{options.dim}")
        figures[f"{name}: seconds a step"] = seconds
    asked = {"skills": (*SKILLS, PAIR, ALL), "most": options.most, "seeds": seed}
    exam = report.main(flag_words({"out_dir": folder, "base": base, **asked}))
    return figures | exam_figures(exam)


def real_chats_alone(read_general, *run):
    """``read_general`` without strange texts."""
    from trainer import keeping

    general = read_general(*run)
    strange = keeping.digests(keeping.chats_in((keeping.STRANGE,)))
    return replace(general, holding=general.holding.without(strange))


def skill_data(name: str) -> Path:
    return bundled_data(f"lora_{name}.jsonl")


def exam_figures(exam) -> dict[str, float]:
    """The shares of each column, for everyone, and of leaks, for each skill."""
    figures = {}
    for who in exam.answers:
        name = who or "base"
        for column in exam.columns:
            figures[f"{name}: {column.name}"] = exam.share(who, column)
        if who:
            figures[f"{name}: leaks"] = len(exam.leaks(who)) / max(len(exam.outside(who)), 1)
    return figures


if __name__ == "__main__":
    run(main)
