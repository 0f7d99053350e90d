"""What rank and which Linears a skill needs: held-out loss against parameters, each at its best
learning rate.

python benchmarks/rank_study.py --base FILE --data medical_zh.jsonl.gz   (an hour or more, run by
run)
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.result_file import write_results
from benchmarks.studies import Runs, SkillStudy, at_once
from core.errors import run
from core.options import option, parse
from core.paths import lora_paths

RANKS = (1, 2, 4, 8, 16, 32, 64)
TARGETS = {
    "square": ("square",),
    "attention": ("wq", "wk", "wv", "wo"),
    "all-linear": ("all-linear",),
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST_RATE = 2  # of RATES: train_lora.py's default


@dataclass
class Options(SkillStudy):
    """Train one skill with every rank and target, at the rates around the best one; what is in
    --result is kept.
    """

    out_dir: Path = option(Path("out/rank_study"), "folder of the runs")
    result: Path = option(
        Path("benchmarks/results/rank_study.json"),
        "file of the figures; the picture lies beside it",
    )


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    runs = Runs(options.result, options.settings(), ("torch", "transformers"))
    best = {}

    def study(targets: str) -> None:
        rate = FIRST_RATE
        for rank in RANKS:

            def at(place: int, rank=rank) -> dict:
                return runs.get(
                    f"{targets} {rank} {RATES[place]}",
                    lambda: train(targets, rank, RATES[place], options),
                )

            rate = best_rate(lambda place, at=at: at(place)["loss"], rate)
            best[targets, rank] = {"learning_rate": RATES[rate], **at(rate)}

    at_once(options.jobs, study, TARGETS)
    runs.found["best"] = {
        f"{targets} {rank}": best[targets, rank] for targets in TARGETS for rank in RANKS
    }
    write_results(options.result, runs.found)
    picture(runs.found["best"], options.result.with_suffix(".png"))
    show(runs.found["best"])
    return runs.found


def best_rate(loss, start: int) -> int:
    """The place in ``RATES`` of the lowest loss, going downhill from ``start`` until both
    neighbours are worse.
    """
    place = start
    while True:
        around = [n for n in (place - 1, place, place + 1) if 0 <= n < len(RATES)]
        best = min(around, key=loss)
        if best == place:
            return place
        place = best


def train(targets: str, rank: int, rate: float, options: Options) -> dict:
    """The held-out loss of one skill, and its parameters."""
    from model.lora.skill_file import read_lora

    name = f"{targets}-{rank}-{rate}"
    options.train(
        name, ["--rank", rank, "--target_modules", *TARGETS[targets], "--learning_rate", rate]
    )
    (path,) = lora_paths(options.out_dir, name)
    tensors, meta = read_lora(path)
    path.unlink()
    held_out = meta.metrics["domain"]
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return {
        "parameters": parameters,
        "base_loss": held_out["first"]["loss"],
        "loss": held_out["last"]["loss"],
    }


def picture(best: dict[str, dict], path: Path) -> None:
    """Held-out loss against trainable parameters, a line for each choice of targets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for targets, marker in zip(TARGETS, "os^", strict=False):
        points = [best[f"{targets} {rank}"] for rank in RANKS]
        xs, ys = [point["parameters"] for point in points], [point["loss"] for point in points]
        axes.plot(xs, ys, marker=marker, label=targets)
        for rank, x, y in zip(RANKS, xs, ys, strict=True):
            axes.annotate(str(rank), (x, y), textcoords="offset points", xytext=(4, 5), fontsize=8)
    axes.set(
        xscale="log",
        xlabel="trainable parameters (numbers: rank)",
        ylabel="held-out loss, nats a token",
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def show(best: dict[str, dict]) -> None:
    print(
        "| rank | "
        + " | ".join(f"{targets}: parameters | rate | loss" for targets in TARGETS)
        + " |"
    )
    print("|---" * (1 + 3 * len(TARGETS)) + "|")
    for rank in RANKS:
        cells = [best[f"{targets} {rank}"] for targets in TARGETS]
        words = [
            f"{cell['parameters']:,} | {cell['learning_rate']:g} | {cell['loss']:.4f}"
            for cell in cells
        ]
        print(f"| {rank} | " + " | ".join(words) + " |")


if __name__ == "__main__":
    run(main)
