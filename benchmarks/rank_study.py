"""What rank and which Linears a skill needs: held-out loss against parameters, each at its best learning rate.

python benchmarks/rank_study.py --base FILE --data medical_zh.jsonl.gz   (an hour or more, run by run)
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import run
from core.options import option, parse, require

RANKS = (1, 2, 4, 8, 16, 32, 64)
TARGETS = {"square": ("square",), "attention": ("wq", "wk", "wv", "wo"), "all-linear": ("all-linear",)}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST_RATE = 2  # of RATES: train_lora.py's default


@dataclass
class Options:
    """Train one skill with every rank and target, at the rates around the best one; what is in --result is kept."""

    base: Path | None = option(None, "chat base of our own kind")
    data: Path | None = option(None, "chats of the skill")
    max_steps: int = option(40, "optimizer steps of a run")
    batch_size: int = option(8, "rows of a step")
    out_dir: Path = option(Path("out/rank_study"), "folder of the runs")
    result: Path = option(Path("benchmarks/results/rank_study.json"), "file of the figures; the picture lies beside it")

    def __post_init__(self):
        require(self.base is not None, "name a chat base with --base")
        require(self.data is not None, "name the skill's chats with --data")
        require(min(self.max_steps, self.batch_size) >= 1, "--max_steps and --batch_size begin at 1")


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    from benchmarks.result_file import measured_on, results_so_far, write_results
    from core.files import sha256_file
    from model.weights import read_record

    settings = {"base": read_record(options.base)["fingerprint"], "data": sha256_file(options.data)}
    settings |= {"max_steps": options.max_steps, "batch_size": options.batch_size}
    found = results_so_far(options.result, settings)
    runs = found.setdefault("runs", {})
    found |= measured_on(("torch", "transformers"))

    def loss(targets: str, rank: int, rate: int) -> float:
        key = f"{targets} {rank} {RATES[rate]}"
        if key not in runs:
            runs[key] = train(targets, rank, RATES[rate], options)
            write_results(options.result, found)
            print(f"{key}: {runs[key]['loss']:.4f}", flush=True)
        return runs[key]["loss"]

    found["best"] = {}
    for targets in TARGETS:
        rate = FIRST_RATE
        for rank in RANKS:
            rate = best_rate(lambda n, targets=targets, rank=rank: loss(targets, rank, n), rate)
            found["best"][f"{targets} {rank}"] = {
                "learning_rate": RATES[rate],
                **runs[f"{targets} {rank} {RATES[rate]}"],
            }
    write_results(options.result, found)
    picture(found["best"], options.result.with_suffix(".png"))
    show(found["best"])
    return found


def best_rate(loss, start: int) -> int:
    """The place in ``RATES`` of the lowest loss, going downhill from ``start`` until both neighbours are worse."""
    place = start
    while True:
        around = [n for n in (place - 1, place, place + 1) if 0 <= n < len(RATES)]
        best = min(around, key=loss)
        if best == place:
            return place
        place = best


def train(targets: str, rank: int, rate: float, options: Options) -> dict:
    """The held-out loss of one skill, and its parameters."""
    import train_lora
    from model.model_lora import read_lora

    argv = ["--base", options.base, "--data_path", options.data, "--out_dir", options.out_dir, "--lora_name", "study"]
    argv += ["--rank", rank, "--target_modules", *TARGETS[targets], "--learning_rate", rate, "--device", "cpu"]
    argv += ["--max_steps", options.max_steps, "--batch_size", options.batch_size, "--val_tokens", 16384]
    options.out_dir.mkdir(parents=True, exist_ok=True)
    with (options.out_dir / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        tensors, meta = read_lora(train_lora.main(list(map(str, argv))))
    held_out = meta["metrics"]["domain"]
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return {"parameters": parameters, "base_loss": held_out["first"]["loss"], "loss": held_out["last"]["loss"]}


def picture(best: dict[str, dict], path: Path) -> None:
    """Held-out loss against trainable parameters, a line for each choice of targets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for targets, marker in zip(TARGETS, "os^", strict=True):
        points = [best[f"{targets} {rank}"] for rank in RANKS]
        xs, ys = [point["parameters"] for point in points], [point["loss"] for point in points]
        axes.plot(xs, ys, marker=marker, label=targets)
        for rank, x, y in zip(RANKS, xs, ys, strict=True):
            axes.annotate(str(rank), (x, y), textcoords="offset points", xytext=(4, 5), fontsize=8)
    axes.set(xscale="log", xlabel="trainable parameters (numbers: rank)", ylabel="held-out loss, nats a token")
    axes.legend()
    figure.savefig(path, dpi=120)


def show(best: dict[str, dict]) -> None:
    print("| rank | " + " | ".join(f"{targets}: parameters | rate | loss" for targets in TARGETS) + " |")
    print("|---" * (1 + 3 * len(TARGETS)) + "|")
    for rank in RANKS:
        cells = [best[f"{targets} {rank}"] for targets in TARGETS]
        words = [f"{cell['parameters']:,} | {cell['learning_rate']:g} | {cell['loss']:.4f}" for cell in cells]
        print(f"| {rank} | " + " | ".join(words) + " |")


if __name__ == "__main__":
    run(main)
