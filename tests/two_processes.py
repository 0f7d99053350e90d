"""What tests/test_processes.py lets two processes do: torchrun ... tests/two_processes.py FOLDER

Each scenario returns what this rank saw; FOLDER/rank-N.json gets all of it.
"""

import atexit
import contextlib
import json
import math
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import divergence_sum, flags, ragged_batch, rows_of, strengthen
from test_resume import SHAPE, SHORT

import train_lora
import train_pretrain
import trainer.loop
from core.errors import Stopped, UserError
from dataset.batches import KEEP, OWN, Batch, masked
from model.LMConfig import LMConfig
from model.lora.layer import lora_parameters
from model.model import MiniMindLM
from model.model_lora import apply_lora
from trainer.keeping import skill_loss_sum
from trainer.loop import accumulate_gradients, causal_loss_sum
from trainer.preferences import pair_loss_sum
from trainer.runtime import Runtime

RAGGED = ragged_batch(8, seed=0)
EMPTY = masked(RAGGED)
SHARES = {
    "equal": ([(0, 2), (2, 4)], [(4, 6), (6, 8)]),
    "rank 1 has fewer": ([(0, 2), (2, 4), (4, 7)], [(7, 8)]),
    "rank 1 has nothing": ([(0, 4), (4, 8)], []),
}
GENERAL, WEIGHT = ragged_batch(6, seed=1), 0.3
# The own rows of rank 0 and of rank 1, and their general rows.
KEPT_SHARES = {
    "both have both": ([[(0, 2), (2, 3)], [(3, 8)]], [[(0, 1)], [(1, 3), (3, 6)]]),
    "rank 1 has general rows only": ([[(0, 4), (4, 8)], []], [[(0, 1)], [(1, 3), (3, 6)]]),
    "rank 0 has own rows only": ([[(0, 4)], [(4, 8)]], [[], [(0, 5), (5, 6)]]),
}
PRETRAIN = SHAPE | SHORT | {"batch_size": 2, "epochs": 1}


def double_model() -> MiniMindLM:
    torch.manual_seed(0)
    config = LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=320, max_seq_len=128)
    return MiniMindLM(config).double()


def share(name: str, rank: int) -> list:
    return [rows_of(RAGGED, *rows) for rows in SHARES[name][rank]] or [EMPTY]


def gradients(runtime: Runtime) -> dict:
    """The largest difference, relative, from the gradient of one process with one batch."""
    expected = double_model()
    causal_loss_sum(expected, RAGGED).div(RAGGED.n_targets).backward()
    found = {}
    for name in SHARES:
        model = double_model()
        replica = runtime.replicate(model, has_idle=False)
        batches = share(name, runtime.rank)
        _, n_targets = accumulate_gradients(
            replica, batches, runtime.scaler(), runtime, causal_loss_sum
        )
        assert n_targets == {OWN: RAGGED.n_targets, KEEP: 0}
        found[name] = difference(model.parameters(), expected.parameters())
    return found


def difference(found, expected) -> float:
    """The largest difference between gradients, relative."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.grad - b.grad).abs().max() / b.grad.abs().max()) for a, b in pairs)


def skilled_model() -> MiniMindLM:
    model = double_model()
    apply_lora(model, 4)
    strengthen(model.double(), 1)
    return model


def kept_gradients(runtime: Runtime) -> dict:
    """As ``gradients``, of a skill that general rows hold to its base."""
    expected = skilled_model()
    loss = causal_loss_sum(expected, RAGGED) / RAGGED.n_targets
    (loss + WEIGHT * divergence_sum(expected, GENERAL) / GENERAL.n_targets).backward()
    found = {}
    for name, (own, general) in KEPT_SHARES.items():
        model = skilled_model()
        batches = [rows_of(RAGGED, *rows) for rows in own[runtime.rank]] or [EMPTY]
        kept = [rows_of(GENERAL, *rows) for rows in general[runtime.rank]] or [masked(GENERAL)]
        batches += [replace(batch, kind=KEEP, weight=WEIGHT) for batch in kept]
        replica = runtime.replicate(model, has_idle=False)
        loss_sum = partial(skill_loss_sum, base=model)
        parts, n_targets = accumulate_gradients(
            replica, batches, runtime.scaler(), runtime, loss_sum
        )
        assert n_targets == {OWN: RAGGED.n_targets, KEEP: GENERAL.n_targets}
        assert abs(runtime.sum(parts[OWN])[0] - loss.item()) <= 1e-10
        found[name] = difference(lora_parameters(model), lora_parameters(expected))
    return found


def paired(rows: tuple[int, int]) -> Batch:
    """These pairs of RAGGED, whose first half is preferred to the second."""
    half = len(RAGGED.labels) // 2
    chosen = [*range(*rows), *(n + half for n in range(*rows))]
    ids, labels = RAGGED.inputs["input_ids"][chosen], RAGGED.labels[chosen]
    batch = replace(RAGGED, inputs={"input_ids": ids}, labels=labels, n_targets=len(chosen) // 2)
    return replace(batch, reference=-torch.arange(40.0, 48.0, dtype=torch.float64)[chosen])


def pair_gradients(runtime: Runtime) -> dict:
    """As ``gradients``, of the loss of pairs."""
    expected, whole, loss_sum = double_model(), paired((0, 4)), partial(pair_loss_sum, beta=0.3)
    loss_sum(expected, whole).div(4).backward()
    found = {}
    for name, shares in {"pairs": ([(0, 2), (2, 3)], [(3, 4)]), "no pair": ([(0, 4)], [])}.items():
        model = double_model()
        batches = [paired(rows) for rows in shares[runtime.rank]] or [masked(whole)]
        replica = runtime.replicate(model, has_idle=False)
        accumulate_gradients(replica, batches, runtime.scaler(), runtime, loss_sum)
        found[name] = difference(model.parameters(), expected.parameters())
    return found


def bypassed(runtime: Runtime) -> list[str]:
    """The parameters without a gradient after two steps of a model that has such."""
    model = double_model()
    model.bypassed = torch.nn.Linear(2, 2)
    replica = runtime.replicate(model, has_idle=True)
    for _ in range(2):
        accumulate_gradients(
            replica, share("equal", runtime.rank), runtime.scaler(), runtime, causal_loss_sum
        )
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


def limit_file_size(size: int) -> None:
    """Let no file of this process grow beyond ``size`` bytes, where the system can do that."""
    with contextlib.suppress(ModuleNotFoundError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def run_door(door, out: Path, *words: str, crash_at: int = 0, poison_at: int = 0, **values) -> dict:
    """Run a door; return how it ended, and the rows of each step that this rank learned from.

    In step ``crash_at`` of this process every rank raises; in step ``poison_at`` rank 1's loss is
    NaN.
    """
    steps = []

    def poisoned(model, batch):
        return causal_loss_sum(model, batch) * math.nan

    def watched(replica, batches, scaler, runtime, loss):
        learned = [batch.inputs["input_ids"].tolist() for batch in batches if batch.n_targets]
        steps.append(list(chain.from_iterable(learned)))
        if len(steps) == crash_at:
            raise RuntimeError("crash")
        loss = poisoned if len(steps) == poison_at and runtime.rank == 1 else loss
        return accumulate_gradients(replica, batches, scaler, runtime, loss)

    trainer.loop.accumulate_gradients = watched
    end = "finished"
    try:
        door.main([*flags(out_dir=out, **values), *words])
    except (RuntimeError, UserError, Stopped, SystemExit) as error:
        end = f"{type(error).__name__}: {error}"
    return {"end": end, "steps": steps}


def scenarios(folder: Path, texts: Path, chats: Path, general: Path, base: Path):
    runtime = Runtime.start("cpu", seed=3)
    yield "seed", torch.initial_seed()
    yield "gradients", gradients(runtime) | kept_gradients(runtime) | pair_gradients(runtime)
    yield "bypassed", bypassed(runtime)
    pretrain = PRETRAIN | {"data_path": texts}
    yield "whole", run_door(train_pretrain, folder / "whole" / "out", **pretrain)
    cut, two = folder / "cut" / "out", folder / "two" / "out"
    yield "poisoned", run_door(train_pretrain, cut, poison_at=7, **pretrain)
    if runtime.rank == 0:
        shutil.copytree(cut, folder / "poisoned" / "out")  # the next run goes on in the other
    yield "resumed", run_door(train_pretrain, cut, "--resume", **pretrain)
    yield "resumed from one", run_door(train_pretrain, two, "--resume", **pretrain)
    apart = cut if runtime.rank == 0 else folder / "apart" / "out"
    yield "not shared", run_door(train_pretrain, apart, "--resume", **pretrain)
    if runtime.rank == 0:
        limit_file_size(1_000_000)
    yield "full disk", run_door(train_pretrain, folder / "full" / "out", **pretrain)
    if runtime.rank == 0:
        limit_file_size(-1)  # as much as it likes
    (barred := folder / "barred" / "out").mkdir(parents=True, exist_ok=True)
    (barred / "metrics").touch()  # where a folder should be
    yield "no metrics", run_door(train_pretrain, barred, **pretrain)
    lora = SHORT | {"data_path": chats, "general_data": general, "base": base, "lora_name": "x"}
    # So fast that it soon finds no better weights.
    lora |= {"batch_size": 2, "patience": 1, "val_interval": 1, "learning_rate": 0.5}
    yield "lora", run_door(train_lora, folder / "lora" / "out", **lora)


def main() -> None:
    folder, *files = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    left = folder / f"left-{rank}"  # the first to be registered is the last to be called
    atexit.register(lambda: left.write_text(str(not dist.is_initialized()), encoding="utf-8"))
    results = dict(scenarios(folder, *files))
    (folder / f"rank-{rank}.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
