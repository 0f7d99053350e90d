"""What the training doors share: their base, their data, the run, and the record it leaves."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from core.files import sha256_file
from core.paths import base_path, cache_dir, checkpoints_dir, metrics_path
from dataset.batches import MICRO_TOKENS, Batches, PretrainDataset, Samples, validation_batches
from dataset.tokenizer import control_ids, tokenizer_fingerprint, tokenizer_of
from model.LMConfig import check_length
from model.weights import Record, RunRecord, choose_base, load_base
from trainer.checkpoints import RunStates
from trainer.loop import LossSum, causal_loss_sum, train
from trainer.metrics import Validation, evaluate
from trainer.optimizer import param_groups
from trainer.options import MAY_CHANGE, TrainOptions
from trainer.run import Run
from trainer.runtime import Runtime

GPU_MICRO_TOKENS = 32768  # about 5 GB for the default model
ONCE = ("resume", "dry_run")  # options that say how a run was started, not what it is


@dataclass
class Base:
    """The base that a run starts from; ``record`` is its file's."""

    path: Path
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    record: RunRecord

    @property
    def held_out_share(self) -> float:
        """The share of rows that the base's own run held out; the default where it is unknown."""
        found = self.record.val_ratio or TrainOptions.val_ratio
        if not isinstance(found, float) or not 0 < found < 1:
            beside = self.path.with_suffix(".json")
            raise UserError(f"{beside} says val_ratio {found!r}, which is no share of rows")
        return found


def open_stage_base(
    options: TrainOptions, runtime: Runtime, stage: str, prompt_template: str | None = None
) -> Base:
    """The base that is named, or the newest one of ``stage``; ``UserError`` if options misfit."""
    path = choose_base(options.out_dir, options.base, stages=(stage,))
    model, record = load_base(path, runtime.device)
    model.config.use_cache = False  # training needs no keys and values; decoding asks for them
    print(f"base: {path}")
    tokenizer = tokenizer_of(record, path, options.tokenizer_path, options.out_dir, prompt_template)
    check_length(model.config, options.max_seq_len)
    return Base(path, model, tokenizer, record)


def read_data(
    kind: type[PretrainDataset],
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerBase,
    runtime: Runtime,
) -> PretrainDataset:
    """The data of ``data_path``, described in print. Rank 0 fills the cache, the others read it."""
    settings = {"cache": cache_dir(options.out_dir)}
    settings |= {"val_ratio": options.val_ratio, "bad_rows": options.bad_rows}
    with runtime.first_alone():
        data = kind(options.data_path, tokenizer, options.max_seq_len, **settings)
    names = ", ".join(path.name for path in options.data_path)
    print(f"{names}: {data.train.describe()}\n  held out: {data.val.describe()}")
    return data


def validation_of(
    model: nn.Module,
    held_out: dict[str, Samples],
    tokenizer: PreTrainedTokenizerBase,
    options: TrainOptions,
    runtime: Runtime,
) -> Validation:
    """The loss of ``model`` on about ``val_tokens`` tokens of each kind, always the same ones."""
    control, measures = control_ids(tokenizer), {}
    for kind, samples in held_out.items():
        batches = validation_batches(samples, options.batch_size, options.val_tokens)
        measures[kind] = partial(evaluate, model, batches, runtime, control)
    return Validation(measures)


def result_path(options: TrainOptions, stage: str, base: Base) -> Path:
    """The base file that ``stage`` makes of ``base``. Raises ``UserError`` where it is ``base``."""
    path = base_path(options.out_dir, stage, base.model.config.dim)
    if path.exists() and path.samefile(base.path):
        raise UserError(f"{path} is the base itself and would be lost: choose another out_dir")
    return path


def run_stage(
    model: nn.Module,
    samples: Samples,
    options: TrainOptions,
    runtime: Runtime,
    *,
    path: Path,
    record: Record,
    validation: Validation,
    write: Callable[[Record], None],
    loss_sum: LossSum = causal_loss_sum,
    lora_plus: tuple[Iterable[nn.Parameter], float] = ((), 1.0),
) -> Path:
    """Train what is trainable in ``model`` into ``path``, a file or folder, which is returned.

    ``write(record)`` writes it, with the metrics of the step in the record. ``lora_plus`` holds
    parameters and how many times the others' rate they learn at (Hayou et al. 2024).
    """
    name, folder = path.name.removesuffix(".pth"), options.out_dir
    resume = options.resume and not options.dry_run
    states = RunStates(checkpoints_dir(folder, name), identity(record), resume=resume)
    if path.exists() and not (states.found or options.dry_run):
        print(f"starting clean: {path} of an earlier run will be replaced")
    run = Run(
        options,
        runtime,
        states,
        validation,
        write_files=lambda metrics: write(replace(record, metrics=metrics)),
        log_to=metrics_path(folder, name),
    )
    rows = options.batch_size * options.accumulation_steps * runtime.world_size
    pass_tokens = MICRO_TOKENS if runtime.device.type == "cpu" else GPU_MICRO_TOKENS
    share = {"rank": runtime.rank, "world_size": runtime.world_size}
    share["rows_per_step"] = states.remembered("rows_per_step", rows)
    share["micro_tokens"] = options.micro_tokens or pass_tokens
    sizes = options.batch_size, options.accumulation_steps
    source = Batches(samples, *sizes, options.seed, options.num_workers, **share)
    groups = param_groups(model, options.weight_decay, options.optimizer, *lora_plus)
    train(model, source, groups, run, loss_sum)
    if not options.dry_run:
        print(f"saved {path}\n{validation}")
    return path


def identity(record: Record) -> dict:
    """What must be the same when a run is resumed: options, and files by their content."""
    may_change = MAY_CHANGE | {entry["option"] for entry in record.data}
    same = {name: value for name, value in record.options.items() if name not in may_change}
    numbers = Counter()
    for entry in record.data:
        numbers[entry["option"]] += 1
        name = f"file {numbers[entry['option']]} of {entry['option']}"
        same[f"the content of {name}"] = entry["sha256"]
    same["the content of the tokenizer"] = record.tokenizer
    same["the content of the base"] = (record.base or {}).get("fingerprint")
    return same


def run_facts(
    stage: str, options: TrainOptions, tokenizer: PreTrainedTokenizerBase, base: Base | None = None
) -> dict:
    """What any record says of the run that makes the file; paths are cut to file names.

    Its ``data`` lists the files of every option that takes several, by their content.
    """
    # A resumed run leaves the same file as one that was never interrupted.
    said = {name: value for name, value in vars(options).items() if name not in ONCE}
    data = []
    for name, values in said.items():
        for path in values if isinstance(values, tuple) else ():
            if isinstance(path, Path):
                digest = sha256_file(path, cache_dir(options.out_dir))
                data.append({"option": name, "file": shown(path), "sha256": digest})
    facts = {"stage": stage, "tokenizer": tokenizer_fingerprint(tokenizer), "data": data}
    facts["options"] = {name: shown(value) for name, value in said.items()}
    if base:
        facts["base"] = {"file": base.path.name, "fingerprint": base.record.fingerprint}
    return facts


def shown(value: object) -> object:
    """An option as plain JSON: paths are cut to their names, so no folder of a machine gets out."""
    if isinstance(value, tuple):
        return [shown(item) for item in value]
    # Linux has file names that are no UTF-8.
    is_path = isinstance(value, Path)
    return os.fsencode(value.name).decode(errors="backslashreplace") if is_path else value
