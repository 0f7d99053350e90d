"""What the training doors share: their data, validation, the run itself, and the record it leaves
in its file.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from core.files import sha256_file
from core.paths import cache_dir, checkpoints_dir, metrics_path
from dataset.batches import (
    MICRO_TOKENS,
    Batch,
    Batches,
    PretrainDataset,
    Samples,
    validation_batches,
)
from dataset.tokenizer import control_ids, tokenizer_fingerprint, tokenizer_of
from model.bases import choose_base, open_base
from model.LMConfig import check_length
from model.loss import loss_sum, nats_of
from trainer.evaluation import Metrics, evaluate
from trainer.loop import train
from trainer.optimizer import param_groups
from trainer.options import MAY_CHANGE, TrainOptions
from trainer.run_state import RunStates
from trainer.runtime import Runtime

GPU_MICRO_TOKENS = 32768  # about 5 GB for the default model


@dataclass
class Base:
    """The base that a run starts from; ``record`` is its file's."""

    path: Path
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    record: dict

    @property
    def origin(self) -> dict:
        """What the file of the run says of it."""
        return {"file": self.path.name, "fingerprint": self.record["fingerprint"]}

    @property
    def held_out_share(self) -> float:
        """``val_ratio`` of the run that made the base, as its record says; the default where it
        says nothing.
        """
        found = self.record.get("options", {}).get("val_ratio") or TrainOptions.val_ratio
        if not isinstance(found, float) or not 0 < found < 1:
            beside = self.path.with_suffix(".json")
            raise UserError(
                f"{beside} says val_ratio {found!r}, no share of rows; correct it or retrain the base"
            )
        return found


def opened_base(
    options: TrainOptions,
    runtime: Runtime,
    stages: tuple[str, ...],
    prompt_template: str | None = None,
) -> Base:
    """``--base``, or the newest of ``stages``, with its tokenizer. Raises ``UserError`` where
    options do not fit.
    """
    path = choose_base(options.out_dir, options.base, stages=stages)
    model, record = open_base(path, runtime.device)
    model.config.use_cache = (
        False  # of keys and values: training has no use for it, and decoding asks for it
    )
    print(f"base: {path}")
    tokenizer = tokenizer_of(
        path,
        options.tokenizer_path,
        options.out_dir,
        fingerprint=record.get("tokenizer"),
        vocab_size=record["config"]["vocab_size"],
        is_foreign="stage" in record and record.get("tokenizer") is None,
        prompt_template=prompt_template,
    )
    check_length(model.config, options.max_seq_len)
    return Base(path, model, tokenizer, record)


def read_data(
    kind: type[PretrainDataset],
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerBase,
    runtime: Runtime,
) -> PretrainDataset:
    """The data of ``--data_path``, described in print. The first process fills the cache, the
    others read it.
    """
    with runtime.first_alone():
        data = kind(
            options.data_path,
            tokenizer,
            options.max_seq_len,
            cache=cache_dir(options.out_dir),
            val_ratio=options.val_ratio,
            bad_rows=options.bad_rows,
        )
    print(f"{', '.join(path.name for path in options.data_path)}: {data.train.describe()}")
    print(f"  held out: {data.val.describe()}")
    return data


class Validation:
    """Loss and bits per byte of ``model`` on about ``val_tokens`` tokens of each kind of held-out
    samples.

    They are the same ones at each call, whose result is the first kind's. ``memory`` keeps the
    first and the last result of each kind, also over a resume.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: dict[str, Samples],
        tokenizer: PreTrainedTokenizerBase,
        options: TrainOptions,
        runtime: Runtime,
        memory: dict,
    ):
        self.model, self.runtime, self.memory = model, runtime, memory
        self.batches = {
            name: validation_batches(held_out, options.batch_size, options.val_tokens)
            for name, held_out in samples.items()
        }
        self.nats = nats_of(control_ids(tokenizer))

    def __call__(self) -> Metrics:
        found = {
            name: evaluate(self.model, batches, self.runtime, loss_sum=self.nats)
            for name, batches in self.batches.items()
        }
        for name, metrics in found.items():
            result = asdict(metrics)
            self.memory[name] = {
                "first": self.memory.get(name, {}).get("first", result),
                "last": result,
            }
        return next(iter(found.values()))

    def record(self) -> dict:
        """The first and the last result of each kind, empty where nothing was held out."""
        return {
            name: self.memory.get(name, {}) if batches else {}
            for name, batches in self.batches.items()
        }

    def __str__(self) -> str:
        lines = []
        for name in self.batches:
            results = self.memory.get(name)
            first, last = (
                (Metrics(**results[when]) for when in ("first", "last"))
                if results
                else (None, None)
            )
            lines.append(
                f"{name}: " + (f"before {first}; after {last}" if results else "not measured")
            )
        return "\n".join(lines)


def train_and_save(
    model: nn.Module,
    samples: Samples,
    options: TrainOptions,
    runtime: Runtime,
    path: Path,
    record: dict,
    *,
    on_save: Callable[[int], None],
    validate: Callable[[], Metrics],
    memory: dict,
    loss_sum: Callable[[nn.Module, Batch], Tensor] = loss_sum,
    faster: tuple[Iterable[nn.Parameter], float] = ((), 1.0),
) -> None:
    """Train what is trainable in ``model`` into the file or folder ``path``, from a saved state
    with ``--resume``.

    ``memory`` is that of the validations. ``faster``: parameters, and their rate over
    ``--learning_rate``.
    """
    name = path.name.removesuffix(".pth")
    folder = checkpoints_dir(options.out_dir, name)
    states = RunStates(folder, identity(options, record), memory, resume=options.resume)
    if path.exists() and not (states.found or options.dry_run):
        print(f"starting clean: {path} of an earlier run will be replaced")
    rows_per_step = states.rows_per_step(
        options.batch_size * options.accumulation_steps * runtime.world_size
    )
    source = batches_of(samples, options, runtime, rows_per_step)
    groups = param_groups(model, options.weight_decay, options.optimizer, *faster)
    log_to = metrics_path(options.out_dir, name)
    callbacks = {"loss_sum": loss_sum, "on_save": on_save, "validate": validate}
    train(model, source, groups, options, runtime, log_to=log_to, states=states, **callbacks)
    runtime.stop()
    if not options.dry_run:
        print(f"saved {path}")


def batches_of(
    samples: Samples, options: TrainOptions, runtime: Runtime, rows_per_step: int | None = None
) -> Batches:
    """This process' share of the optimizer steps that the options describe."""
    return Batches(
        samples,
        options.batch_size,
        options.accumulation_steps,
        options.seed,
        options.num_workers,
        micro_tokens=pass_size(options, runtime),
        rank=runtime.rank,
        world_size=runtime.world_size,
        rows_per_step=rows_per_step,
    )


def pass_size(options: TrainOptions, runtime: Runtime) -> int:
    """Tokens that are computed at once: ``--micro_tokens``, or what keeps the device busy."""
    return options.micro_tokens or (
        MICRO_TOKENS if runtime.device.type == "cpu" else GPU_MICRO_TOKENS
    )


def identity(options: TrainOptions, record: dict) -> dict:
    """What must be the same when a run is resumed: flags, files by their content, and the base."""
    flags = {
        f"--{name}": value for name, value in record["options"].items() if name not in MAY_CHANGE
    }
    files = {}
    for kind in ("data", "general data", "val data"):
        found = record.get(kind.replace(" ", "_"), [])
        files |= {f"{kind} file {n}": entry["sha256"] for n, entry in enumerate(found, 1)}
    base = (record["base"] or {}).get("fingerprint")
    return flags | files | {"the tokenizer": record["tokenizer"], "the base": base}


def run_record(
    stage: str, options: TrainOptions, tokenizer: PreTrainedTokenizerBase, base: dict | None = None
) -> dict:
    """What a file says of the run that made it; paths are cut to file names. ``base``: what the run
    started from.
    """

    def file_name(path: Path) -> str:
        return os.fsencode(path.name).decode(
            errors="backslashreplace"
        )  # Linux has names that are no UTF-8

    def cut(value: object) -> object:
        if isinstance(value, Path):
            return file_name(value)
        return [cut(item) for item in value] if isinstance(value, tuple) else value

    def described(paths: tuple[Path, ...]) -> list[dict]:
        return [
            {"file": file_name(path), "sha256": sha256_file(path, cache_dir(options.out_dir))}
            for path in paths
        ]

    names = [field.name for field in fields(options)]
    return {
        "stage": stage,
        "base": base,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": described(options.data_path),
        "general_data": described(getattr(options, "general_data", ())),
        "val_data": described(getattr(options, "val_path", ())),
        # A resumed run leaves the same file as one that was never interrupted.
        "options": {
            name: cut(getattr(options, name)) for name in names if name not in ("resume", "dry_run")
        },
    }
