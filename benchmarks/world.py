"""The quick start with several seeds: python benchmarks/world.py

Each seed trains a base and its skills from nothing, as scripts/quickstart.py does, in a folder of
its own; then they sit its exam, with more questions. Finished stages are reused.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.result_file import measured_on, write_results
from core.errors import run
from core.files import read_object
from core.options import CheckedOptions, option, parse
from core.paths import REPOSITORY
from scripts.quickstart_stages import Stage, failure, is_done, plan, run_stage
from trainer.options import TrainOptions

REFUSALS = "do not know", "don't know", "不知道"


@dataclass
class Options(CheckedOptions):
    """Run all stages for each seed; the figures are means over the seeds."""

    out_dir: Path = option(Path("out/world"), "folder of the runs")
    seeds: tuple[int, ...] = option((TrainOptions.seed, 1, 2), "of training and of the answers")
    most: int = option(40, "most questions of a column", at_least=1)
    result: Path = option(REPOSITORY / "benchmarks/results/world.json", "file of the figures")


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    result = options.result.resolve()
    exams = {seed: exam_of(seed, options) for seed in options.seeds}
    figures = {"settings": {"seeds": list(options.seeds), "most": options.most}}
    figures["mean"] = {who: means(rows) for who, rows in rows_of(exams).items()}
    figures["refused though known"] = mean(map(refused_though_known, exams.values()))
    figures["missed marks"] = {str(seed): failure(exam) for seed, exam in exams.items()}
    figures["rows"] = {str(seed): rows_by_name(exam) for seed, exam in exams.items()}
    write_results(result, figures | measured_on(("torch",)))
    for who, shares in figures["mean"].items():
        print(who, {name: round(share, 3) for name, share in shares.items()})
    print("refused though known", round(figures["refused though known"], 3))
    return figures


def exam_of(seed: int, options: Options) -> dict:
    """What the report of this seed's run says, as JSON."""
    here = Path.cwd()
    folder = options.out_dir / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # the quick start works below the current folder
    try:
        for stage in (seeded(stage, seed, options.most) for stage in plan()):
            if not is_done(stage):
                print(f"seed {seed}: {stage.name}", flush=True)
                run_stage(stage, lambda line: None)
        return read_object(stage.outputs[1])
    finally:
        os.chdir(here)


def seeded(stage: Stage, seed: int, most: int) -> Stage:
    """The stage with this seed; where that is the default, training is that of the quick start."""
    if stage.name == "exam":
        return replace(stage, flags=stage.flags | {"seeds": seed, "most": most})
    if stage.name == "tokenizer" or seed == TrainOptions.seed:
        return stage
    return replace(stage, flags=stage.flags | {"seed": seed})


def rows_by_name(exam: dict) -> dict[str, dict[str, float]]:
    """Everyone's share of right answers in each column, and of leaks."""
    names = [column["name"] for column in exam["columns"]]
    found = {}
    for row in exam["rows"]:
        found[row["who"]] = dict(zip(names, row["shares"], strict=True))
        found[row["who"]]["leaks"] = row["leaks"] / row["outside"]
    return found


def rows_of(exams: dict[int, dict]) -> dict[str, list[dict[str, float]]]:
    found = [rows_by_name(exam) for exam in exams.values()]
    return {who: [each[who] for each in found] for who in found[0]}


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: mean(row[name] for row in rows) for name in rows[0]}


def refused_though_known(exam: dict) -> float:
    """The share of the base's answers that say it does not know, of what it was taught."""
    known = {each["name"] for each in exam["columns"]} - {"unknown"}
    known -= {each["name"] for each in exam["columns"] if each["skill"]}
    said = [each["answer"] for each in exam["answers"] if each["who"] == "base"]
    columns = [each["column"] for each in exam["answers"] if each["who"] == "base"]
    taught = [text for text, column in zip(said, columns, strict=True) if column in known]
    return sum(any(words in text for words in REFUSALS) for text in taught) / len(taught)


if __name__ == "__main__":
    run(main)
