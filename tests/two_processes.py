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
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import flags, ragged_batch, rows_of
from test_resume import SHAPE, SHORT

import train_lora
import train_pretrain
import trainer.loop
from core.errors import Stopped, UserError
from dataset.batches import masked
from model.LMConfig import LMConfig
from model.model import MiniMindLM
from trainer.loop import accumulate_gradients, causal_loss_sum
from trainer.runtime import Runtime

RAGGED = ragged_batch(8, seed=0)
EMPTY = masked(RAGGED)
SHARES = {
    "equal": ([(0, 2), (2, 4)], [(4, 6), (6, 8)]),
    "rank 1 has fewer": ([(0, 2), (2, 4), (4, 7)], [(7, 8)]),
    "rank 1 has nothing": ([(0, 4), (4, 8)], []),
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
        assert n_targets == RAGGED.n_targets
        pairs = zip(model.parameters(), expected.parameters(), strict=True)
        found[name] = max(
            float((a.grad - b.grad).abs().max() / b.grad.abs().max()) for a, b in pairs
        )
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


def scenarios(folder: Path, texts: Path, chats: Path, base: Path):
    runtime = Runtime.start("cpu", seed=3)
    yield "seed", torch.initial_seed()
    yield "gradients", gradients(runtime)
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
    lora = SHORT | {"data_path": chats, "general_data": chats, "base": base, "lora_name": "x"}
    lora |= {"max_steps": 2, "batch_size": 2}
    yield "lora", run_door(train_lora, folder / "lora" / "out", **lora)


def main() -> None:
    folder, texts, chats, base = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    left = folder / f"left-{rank}"  # the first to be registered is the last to be called
    atexit.register(lambda: left.write_text(str(not dist.is_initialized()), encoding="utf-8"))
    results = dict(scenarios(folder, texts, chats, base))
    (folder / f"rank-{rank}.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
