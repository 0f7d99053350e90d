"""Which rate, batch, schedule, warm-up, betas and optimizer pretraining wants: the measurement
behind its defaults.

    python benchmarks/sweep_recipe.py --data_path my_texts.jsonl --result
    benchmarks/results/sweep_recipe.json

One setting is varied at a time, in the order of ``STAGES``, and its best value is kept for the
next. Every run sees the same number of tokens. Finished runs are read back from the result file, so
the sweep can be stopped and gone on with.
"""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import run
from core.options import option, parse, require
from core.paths import bundled_data

MUON = [
    (1, 1e-3),
    (2, 1e-3),
    (2, 2e-3),
    (4, 1e-3),
    (4, 2e-3),
    (4, 4e-3),
    (8, 2e-3),
    (8, 4e-3),
]  # rows, rate
SCHEDULES = ("cosine to 10 %", "linear to zero", "warm-up, stable, decay")
# What is varied, stage by stage. A rate belongs to a batch, and Muon, whose step costs more, to a
# larger one.
STAGES = {
    "batch and rate": [
        *({"rows": 1, "rate": rate} for rate in (5e-4, 1e-3, 2e-3)),
        *({"rows": 2, "rate": rate} for rate in (5e-4, 1e-3, 2e-3)),
        *({"rows": 4, "rate": rate} for rate in (1e-3, 2e-3)),
        {"rows": 8, "rate": 2e-3},
    ],
    "schedule": [{"schedule": name} for name in SCHEDULES],
    "warm-up": [{"warmup": share} for share in (0.01, 0.03, 0.1)],
    "betas": [{"betas": betas} for betas in ((0.9, 0.95), (0.9, 0.99), (0.9, 0.999), (0.8, 0.95))],
    "optimizer": [
        {"optimizer": "AdamW"},
        *({"optimizer": "Muon", "rows": rows, "rate": rate} for rows, rate in MUON),
    ],
    "schedule of the optimizer": [{"schedule": name} for name in SCHEDULES],
}
START = {"schedule": "cosine to 10 %", "warmup": 0.03, "betas": (0.9, 0.95), "optimizer": "AdamW"}


@dataclass
class Options:
    """Pretrain the same model on the same tokens under many settings and report each one's held-out
    loss.
    """

    data_path: tuple[Path, ...] = option(
        (bundled_data("pretrain_mini.jsonl"),), "pretraining files"
    )
    out_dir: Path = option(Path("out/sweep_recipe"), "folder for the runs and their token cache")
    tokens: int = option(400_000, "tokens that every run trains on")
    dim: int = option(512, "width of the model")
    n_layers: int = option(8, "number of blocks")
    max_seq_len: int = option(512, "tokens of a window")
    val_tokens: int = option(65_536, "held-out tokens that every run is judged by")
    dtype: str = option("auto", "autocast type")
    result: Path = option(
        Path("out/sweep_recipe/result.json"), "JSON file of figures, also read to go on"
    )

    def __post_init__(self):
        most = (
            max(setting.get("rows", 1) for stage in STAGES.values() for setting in stage)
            * self.max_seq_len
        )
        require(
            self.tokens >= most, f"--tokens {self.tokens} must be at least {most}, the largest step"
        )


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    from benchmarks.result_file import measured_on, read_results, write_results

    done, best = read_results(options.result), START
    same = {
        "tokens": options.tokens,
        "data": [path.name for path in options.data_path],
        "dtype": options.dtype,
    }
    for name, value in same.items():
        was = done.get(name, value)
        require(
            was == value,
            f"{options.result} was measured with {name} {was}, not {value}; name another --result",
        )
    rows = done.get("rows", [])
    for stage, changes in STAGES.items():
        tried = []
        for change in changes:
            setting = json.loads(json.dumps({**best, **change}))  # tuples as JSON gives them back
            row = next((row for row in rows if row["setting"] == setting), None)
            if row is None:
                row = {"setting": setting, **train_once(setting, options)}
                rows.append(row)
                write_results(options.result, {**same, "rows": rows, **measured_on(("torch",))})
            tried.append((row["val_loss"], len(tried)))
            print(f"{row['val_loss']:.4f} after {row['seconds']} s  {stage}: {change}", flush=True)
        best = {**best, **changes[min(tried)[1]]}
    print("best: " + ", ".join(f"{name} {value}" for name, value in best.items()))
    return {"best": best, "rows": rows}


def train_once(setting: dict, options: Options) -> dict:
    """The held-out loss after one run of the pretraining door, and the seconds that it took."""
    import train_pretrain
    from core.paths import metrics_path

    rows = setting["rows"]
    steps = options.tokens // (rows * options.max_seq_len)
    flags = {
        "batch_size": rows,
        "learning_rate": setting["rate"],
        "max_steps": steps,
        "epochs": 1000,
    }
    flags |= {
        "warmup_iters": max(1, round(setting["warmup"] * steps)),
        "log_interval": 50,
        "save_interval": 10**9,
    }
    flags["optimizer"] = setting["optimizer"].lower()
    for name in ("dim", "n_layers", "max_seq_len", "val_tokens", "dtype", "out_dir"):
        flags[name] = getattr(options, name)
    argv = ["--data_path", *map(str, options.data_path)]
    with recipe(setting):
        path = train_pretrain.main(
            argv + [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        )
    lines = metrics_path(options.out_dir, path.stem).read_text(encoding="utf-8").splitlines()
    summary = json.loads(lines[-1])["summary"]
    return {"val_loss": round(summary["final"]["loss"], 4), "seconds": round(summary["seconds"], 1)}


@contextmanager
def recipe(setting: dict) -> Iterator[None]:
    """The loop with another schedule and other betas; the product has the winners alone."""
    with (
        patch("trainer.loop.lr_at", lambda *at: rate_at(setting["schedule"], *at)),
        patch("trainer.optimizer.BETAS", tuple(setting["betas"])),
    ):
        yield


def rate_at(schedule: str, step: int, total: int, warmup: int, decay: float, peak: float) -> float:
    """Learning rate of optimizer step ``step`` in [0, total); ``decay`` is the product's own."""
    from trainer.optimizer import lr_at

    if step >= warmup and schedule == "cosine to 10 %":
        left = 1 - (step - warmup) / max(total - warmup, 1)  # from 1 to 0
        return peak * (0.55 - 0.45 * math.cos(math.pi * left))
    return lr_at(step, total, warmup, decay if schedule == "warm-up, stable, decay" else 1.0, peak)


if __name__ == "__main__":
    run(main)
