"""What holds a skill to its base, and what that costs: python benchmarks/keeping.py

Trains the quick start's skills as it does, but for the options of each of ``ARMS``, on the base
that scripts/quickstart.py made, with several seeds. Base, skills and their sums then sit the exam
of scripts/report.py.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.domain import seconds_a_step
from benchmarks.result_file import measured_on, read_results, write_results
from core.errors import run
from core.options import CheckedOptions, option, parse, require
from core.paths import base_path, lora_path
from scripts.quickstart_stages import DIM, SKILLS, flag_words, plan

# Options that differ from the quick start's, which holds on the other skills' questions, too.
# "replay": the general chats' answers are learned by cross-entropy, without strange texts.
ALONE = {"keep_questions": ()}
ARMS = {
    "plain": {"keep": 0, "keep_best": False} | ALONE,
    "replay": {"keep": 1} | ALONE,
    "quick start": {},
}
PAIR, ALL = " ".join(SKILLS[:2]), " ".join(SKILLS)


@dataclass
class Options(CheckedOptions):
    """Train, examine and compare; one arm after another, but for those in the result file."""

    out_dir: Path = option(Path("out/quickstart"), "folder of the quick start")
    dim: int = option(DIM, "of its base", at_least=1)
    arms: tuple[str, ...] = option(tuple(ARMS), "which of ARMS")
    seeds: tuple[int, ...] = option((1, 2, 3), "of a skill's training")
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
    settings = {"most": options.most, "seeds": list(options.seeds), "quick start": recipes()}
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
    for arm in found:
        print(table_row(arm, found))
    return found


def recipes() -> dict[str, dict]:
    """How the quick start trains each skill, without what is the same for all or hangs on paths."""
    stages = {stage.name: stage.flags for stage in plan()}
    names = ("batch_size", "max_steps", "learning_rate", "loraplus_lr_ratio", "keep")
    return {skill: {name: stages[skill][name] for name in names} for skill in SKILLS}


def figures_of(options: Options, arm: str, seed: int) -> dict[str, float]:
    """Train the skills of an arm and let them sit the exam."""
    import train_lora
    from scripts import report

    folder = options.out_dir / "keeping" / f"{arm.replace(',', '').replace(' ', '_')}-{seed}"
    base = base_path(options.out_dir, "full_sft", options.dim)
    stages, figures = {stage.name: stage.flags for stage in plan()}, {}
    changed = {"out_dir": folder, "base": base, "seed": seed, **ARMS[arm]}
    changed |= {"log_interval": 100, "save_interval": 10**6}
    with learned_again() if arm == "replay" else nullcontext():
        for name in SKILLS:
            flags = {flag: x for flag, x in (stages[name] | changed).items() if x != ()}
            train_lora.main(flag_words(flags))
            figures |= {f"{name}: {what}": x for what, x in training_figures(options, folder, name)}
    asked = {"skills": (*SKILLS, PAIR, ALL), "most": options.most, "seeds": seed}
    exam = report.main(flag_words({"out_dir": folder, "base": base, **asked}))
    return figures | exam_figures(exam)


def training_figures(options: Options, folder: Path, name: str) -> Iterator[tuple[str, float]]:
    """Losses of the saved skill, their rise, and the time of a step."""
    from model.lora.skill_file import read_lora

    metrics = read_lora(lora_path(folder, name, options.dim))[1].metrics
    for kind in ("domain", "general"):
        result = metrics[kind]
        saved = result.get("best", result["last"])
        for unit in ("loss", "bits_per_byte"):
            yield f"{kind} {unit}", saved[unit]
            yield f"{kind} {unit}, rise", saved[unit] - result["first"][unit]
    yield "seconds a step", seconds_a_step(folder, f"lora_{name}_{options.dim}")


@contextmanager
def learned_again():
    """Inside, training learns the general chats' answers instead of holding to the base."""
    from trainer import keeping
    from trainer.loop import causal_loss_sum

    usual = (keeping.read_general, keeping.skill_loss_sum)
    keeping.read_general = partial(real_chats_alone, keeping.read_general)
    keeping.skill_loss_sum = lambda model, batch, **_: causal_loss_sum(model, batch)
    try:
        yield
    finally:
        keeping.read_general, keeping.skill_loss_sum = usual


def real_chats_alone(read_general, *run):
    """``read_general`` without strange texts."""
    from trainer import keeping

    general = read_general(*run)
    strange = keeping.digests(keeping.chats_in((keeping.STRANGE,)))
    return replace(general, holding=general.holding.without(strange))


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


def table_row(arm: str, found: dict[str, dict]) -> str:
    """The arm's row of the table in docs/keeping.md: means over the skills."""
    figures, plain = found[arm], found.get("plain")

    def over(text: str, who=SKILLS, of=figures) -> float:
        return mean(of[text.format(name)] for name in who)

    lost = figures["base: general"] - over("{}: general")
    cells = [f"{over('{0}: {0} near'):.0%} / {over('{0}: {0} far'):.0%}", f"{40 * lost:.1f}"]
    cells += [f"{over('{}: leaks'):.1%}", f"{over('{}: general bits_per_byte, rise'):+.3f}"]
    for mix, who in ((PAIR, SKILLS[:2]), (ALL, SKILLS)):
        shares = [figures[f"{mix}: {name} near"] / figures[f"{name}: {name} near"] for name in who]
        shares.append(figures[f"{mix}: general"] / figures["base: general"])
        cells.append(", ".join(f"{share:.0%}" for share in shares))
    if plain:
        seconds = "{}: seconds a step"
        cells.append(f"{over(seconds) / over(seconds, of=plain):.2f}")
    return f"| {' | '.join([arm, *cells])} |"


if __name__ == "__main__":
    run(main)
