"""What a skill costs beside its base: parameters, swaps, and the rounding of a merge.

python benchmarks/lora_life.py
"""

import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import run
from core.options import option, parse, require

SIZES, RANKS, ROWS = (4096, 768, 512), (4, 8, 16, 32, 64), 32
MIX = {"a": 0.7, "b": -0.2}


@dataclass
class Options:
    """Parameters of LoRA on square Linears, exactness of merging, and time and exactness of swaps
    on our model.
    """

    rounds: int = option(200, "swaps of each kind that are timed")
    result: Path | None = option(Path("benchmarks/results/lora_life.json"), "file of the figures")

    def __post_init__(self):
        require(self.rounds >= 2, f"--rounds {self.rounds} must be at least 2")


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    from benchmarks.result_file import measured_on, write_results

    figures: dict = {"rounds": options.rounds}
    figures["one_linear"] = [one_linear(size, rank) for size in SIZES for rank in RANKS]
    show(figures["one_linear"])
    figures["model"] = [
        on_the_model(targets, options.rounds) for targets in ("square", "all-linear")
    ]
    show(figures["model"])
    figures["thousand_swaps"] = random_swaps(1000)
    show([figures["thousand_swaps"]])
    figures |= measured_on(("torch", "transformers"))
    write_results(options.result, figures)
    return figures


def one_linear(size: int, rank: int) -> dict:
    """A Linear of ``size`` x ``size``: the parameters of its update, and how far the merged one
    lies from the attached one on random inputs.
    """
    import torch
    from torch import nn

    from benchmarks.seeded_model import add_seeded_lora, fill
    from model.lora.layer import lora_parameters
    from model.lora.library import merge_lora, unmerge_lora

    row = {"size": size, "rank": rank}
    x = torch.randn(ROWS, size, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(size, size, bias=False))
        fill(model.named_parameters())
        before = model[0].weight.to(dtype)
        model.to(dtype)
        add_seeded_lora(model, rank)
        with torch.no_grad():
            attached = model(x.to(dtype)).float()
            merge_lora(model)
            error = (model(x.to(dtype)).float() - attached).abs().max() / attached.abs().max()
        unmerge_lora(model)
        name = str(dtype).removeprefix("torch.")
        row |= {
            f"merged_error_{name}": float(error),
            f"undone_{name}": torch.equal(model[0].weight, before),
        }
    trained = sum(parameter.numel() for parameter in lora_parameters(model))
    return {**row, "full": size * size, "trained": trained, "percent": 100 * trained / size**2}


def on_the_model(targets: str, rounds: int) -> dict:
    """The 25.83 M model with two skills of rank 16: milliseconds of swaps, and how far merging
    moves the logits.
    """
    import torch

    from benchmarks.seeded_model import fill, seeded_model
    from model.lora.layer import lora_parameters
    from model.lora.library import SkillLibrary
    from model.model_lora import apply_lora, remove_lora, save_lora

    model, ids = seeded_model({})
    library = SkillLibrary(model)
    with tempfile.TemporaryDirectory() as folder:
        for name in MIX:
            torch.manual_seed(ord(name))
            apply_lora(model, 16, target_modules=targets)
            trainable = {key: p for key, p in model.named_parameters() if p.requires_grad}
            fill((f"{name} {key}", parameter) for key, parameter in trainable.items())
            trained = sum(parameter.numel() for parameter in lora_parameters(model))
            path = Path(folder) / f"lora_{name}.pth"
            save_lora(model, path)
            remove_lora(model)
            library.add(name, path)
    row = {"targets": targets, "modules": len(library.factors({"a": 1.0})), "trained": trained}
    row["swap_ms"] = milliseconds(library, rounds, "a", "b")
    row["on_and_off_ms"] = milliseconds(library, rounds, "a", None)
    row["mix_ms"] = milliseconds(library, rounds, MIX)
    for dtype in (torch.float32, torch.bfloat16):
        library.use(None)
        model.to(dtype)
        row[f"merge_{str(dtype).removeprefix('torch.')}"] = moved_by_merging(model, ids, library)
    return row


def milliseconds(library, rounds: int, *states) -> dict:
    """How long the library takes to go to each of the states in turn."""
    times = []
    for turn in range(rounds):
        began = time.perf_counter()
        library.use(states[turn % len(states)])
        times.append(1000 * (time.perf_counter() - began))
    return {"median": statistics.median(times), "most": max(times)}


def moved_by_merging(model, ids, library) -> dict:
    """From no skill on: how far merging a skill moves the logits that it gives while attached."""
    import torch

    from model.lora.library import merge_lora, unmerge_lora

    with torch.no_grad():
        base = model(ids).logits.float()
        library.use("a")
        attached = model(ids).logits.float()
        merge_lora(model)
        drift = (model(ids).logits.float() - attached).abs()
    unmerge_lora(model)
    share = drift.mean() / (attached - base).abs().mean()
    return {"largest": float(drift.max()), "mean_share_of_skill": float(share)}


def random_swaps(count: int) -> dict:
    """Whether random swaps between nothing, two skills and mixes of them leave a trace in the
    base.
    """
    import torch

    from benchmarks.seeded_model import add_seeded_lora, seeded_model
    from model.lora.library import SkillLibrary
    from model.model_lora import remove_lora, save_lora
    from model.weights import fingerprint

    model, ids = seeded_model({})
    with torch.no_grad():
        before = model(ids).logits
    weights, forward = exact_hash(model), fingerprint(model.named_parameters(), model.config)
    library = SkillLibrary(model)
    with tempfile.TemporaryDirectory() as folder:
        for name, rank in (("a", 16), ("b", 8)):
            add_seeded_lora(model, rank)
            save_lora(model, Path(folder) / f"lora_{name}.pth")
            remove_lora(model)
            library.add(name, Path(folder) / f"lora_{name}.pth")
    draw = random.Random(0)
    for _ in range(count):
        mix = {"a": draw.uniform(-1, 1), "b": draw.uniform(-1, 1)}
        library.use(draw.choice([None, "a", "b", mix]))
    library.use(None)
    with torch.no_grad():
        equal = torch.equal(model(ids).logits, before)
    same = exact_hash(model) == weights
    same &= fingerprint(model.named_parameters(), model.config) == forward
    return {"swaps": count, "sha256_unchanged": same, "logits_bit_equal": equal}


def exact_hash(model) -> str:
    """SHA-256 over the bytes of all weights."""
    import hashlib

    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def show(rows: list[dict]) -> None:
    """Print the rows as a table."""
    print("\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(cell, row.values())) + " |")


def cell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number:.3g}" for key, number in value.items())
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if type(value) is int else str(value)


if __name__ == "__main__":
    run(main)
