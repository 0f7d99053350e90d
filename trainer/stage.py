"""What the training doors share: their base, their data, the run, and the record it leaves."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from torch import nn
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from core.files import sha256_file
from core.paths import STAGES, cache_dir, checkpoints_dir, is_pretrained, lora_paths, metrics_path
from dataset.batches import (
    MICRO_TOKENS,
    Batches,
    KeepingBatches,
    PretrainDataset,
    Samples,
    validation_batches,
)
from dataset.chat import ENCODING, chat_notes
from dataset.files import data_files
from dataset.tokenizer import control_ids, tokenizer_fingerprint, tokenizer_of
from model.LMConfig import check_length
from model.lora.config import LoRAConfig
from model.lora.layer import adapted, output_parameters
from model.lora.skill_file import Skill, SkillMeta, attach_lora, read_lora
from model.lora.targets import table_of
from model.model_lora import apply_lora, save_lora
from model.quantized import quantize
from model.weights import Record, RunRecord, choose_base, load_base, read_record, save_base
from trainer.checkpoints import RunStates
from trainer.loop import LossSum, causal_loss_sum, train
from trainer.metrics import Metrics, Validation, evaluate
from trainer.optimizer import param_groups
from trainer.options import MAY_CHANGE, SkillOptions, TrainOptions
from trainer.run import Run
from trainer.runtime import Runtime

GPU_MICRO_TOKENS = 32768  # about 5 GB for the default model
# The options that a skill's file has decided for every run that goes on with it.
DECIDED = {option.name for option in fields(LoRAConfig)} - {"lora_dropout"}
DATA_OPTIONS = {"data_path", "general_data", "keep_questions"}  # compared by their content
ONCE = ("resume", "dry_run")  # options that say how a run was started, not what it is


@dataclass
class Base:
    """The base that a run starts from; ``record`` is its file's, ``skill`` what goes on with it."""

    path: Path
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    record: RunRecord
    skill: Skill | None = None

    @property
    def held_out_share(self) -> float:
        """The share of rows that the base's own run held out; the default where it is unknown."""
        found = self.record.val_ratio or TrainOptions.val_ratio
        if not isinstance(found, float) or not 0 < found < 1:
            beside = self.path.with_suffix(".json")
            raise UserError(f"{beside} says val_ratio {found!r}, which is no share of rows")
        return found


def open_base(
    options: TrainOptions,
    runtime: Runtime,
    *stages: str,
    own: bool = True,
    prompt_template: str | None = None,
    skill_base: dict | None = None,
) -> Base:
    """The base that is named, or else a skill's own, or else the newest of the last stage there.

    Raises ``UserError`` if ``own`` for a model of other makers, for a template that can write no
    chat, and if options misfit.
    """
    path = choose_base(options.out_dir, options.base, skill_base, stages)
    if own and is_pretrained(path):
        wrong = f"base {path} is no MiniMindLM, and this trains no other"
        raise UserError(f"{wrong}; models of other makers can learn skills")
    model, record = load_base(path, runtime.device)
    model.config.use_cache = False  # training needs no keys and values; decoding asks for them
    print(f"base: {path}")
    tokenizer = tokenizer_of(record, path, options.tokenizer_path, options.out_dir, prompt_template)
    for note in chat_notes(tokenizer):
        print(f"note: {note}")
    check_length(model.config, options.max_seq_len)
    return Base(path, model, tokenizer, record)


def open_skill_base(options: SkillOptions, runtime: Runtime, given: Mapping[str, object]) -> Base:
    """The base that is to learn a skill, in 4 bits if so asked, and what it goes on with, if any.

    If ``options.skill`` names a file, ``options`` get what it says of how the skill is asked.
    Raises ``UserError`` as ``open_base`` does, where ``given``, the options that the user stated,
    contradicts the file, and for another base or tokenizer than the skill was trained with.
    """
    skill = _take_skill(options, given) if options.skill else None
    how = {"prompt_template": options.prompt_template, "skill_base": skill and skill[1].base}
    base = replace(open_base(options, runtime, *STAGES[1:], own=False, **how), skill=skill)
    if skill:
        _check_trained_on(base, options.skill)
    if options.load_in_4bit:
        quantize(base.model, runtime.dtype)
    return base


def _take_skill(options: SkillOptions, given: Mapping[str, object]) -> Skill:
    """What the file ``options.skill`` holds, from which ``options`` get how the skill is asked.

    Raises ``UserError`` where ``given``, the options that the user stated, contradicts it.
    """
    file, skill = options.skill, read_lora(options.skill)
    if stated := sorted(DECIDED & given.keys()):
        raise UserError(f"{file} has its rank and targets: leave out {', '.join(stated)}")
    for name in ("prompt_template", "load_in_4bit"):
        trained = getattr(skill[1], name)
        if given.get(name, trained) != trained:
            differ = f"{file} was trained with {name} {trained!r}, not {given[name]!r}"
            raise UserError(f"{differ}: leave it out")
        setattr(options, name, trained)
    return skill


def _check_trained_on(base: Base, file: Path) -> None:
    meta = base.skill[1]
    if meta.base.get("fingerprint") not in (None, base.record.fingerprint):
        trained_on = meta.base.get("file", "another base")
        raise UserError(f"{file} was trained on {trained_on}, not on {base.path}; name that base")
    if meta.tokenizer not in (None, tokenizer_fingerprint(base.tokenizer)):
        way_out = "name that one as tokenizer_path"
        raise UserError(f"{file} was trained with another tokenizer or chat template; {way_out}")


def add_lora(base: Base, options: SkillOptions) -> None:
    """Freeze the base's model; add a new LoRA, or the skill's that the run goes on with."""
    if base.skill:
        attach_lora(base.model, options.skill, base.skill)
        for _, linear in adapted(base.model):
            linear.lora.dropout.p = options.lora_dropout
    else:
        apply_lora(base.model, config=options)
    print(table_of(base.model))


def skill_result(path: Path, options: SkillOptions, base: Base) -> dict:
    """What ``run_stage`` needs to write the LoRA on the base's model to ``path``."""
    facts = run_facts("lora", options, base.tokenizer, base)
    facts |= {"prompt_template": options.prompt_template, "load_in_4bit": options.load_in_4bit}
    fast = output_parameters(base.model), options.loraplus_lr_ratio
    write = partial(save_lora, base.model, path)
    return {"path": path, "record": SkillMeta(**facts), "write": write, "lora_plus": fast}


def base_result(
    stage: str,
    path: Path,
    model: nn.Module,
    options: TrainOptions,
    base: Base,
    val_ratio: float | None,
) -> dict:
    """What ``run_stage`` needs to write ``model``, trained from ``base``, to ``path``."""
    record = RunRecord(**run_facts(stage, options, base.tokenizer, base), val_ratio=val_ratio)
    return {"path": path, "record": record, "write": partial(save_base, path, model)}


def check_apart(path: Path, start: Path | None) -> None:
    """Raise ``UserError`` if ``path``, where a run writes, is the file that it starts from."""
    if start and path.exists() and path.samefile(start):
        lost = f"{path} is what this run starts from and would be lost"
        raise UserError(f"{lost}: choose another out_dir or another name")


def read_data(
    kind: type[PretrainDataset],
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerBase,
    runtime: Runtime,
) -> PretrainDataset:
    """The data of ``data_path``, described in print. Rank 0 fills the cache, the others read it."""
    settings = {"cache": cache_dir(options.out_dir)}
    settings |= {"val_ratio": options.val_ratio, "bad_rows": options.bad_rows}
    settings["control_text"] = options.control_text
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
    measures: Mapping[str, Callable[..., Metrics]] = MappingProxyType({}),
) -> Validation:
    """What is measured of ``model`` on about ``val_tokens`` tokens of each kind, the same always.

    ``measures`` has what does it, where it is not ``evaluate``.
    """
    control, found = control_ids(tokenizer), {}
    for kind, samples in held_out.items():
        batches = validation_batches(samples, options.batch_size, options.val_tokens)
        measure = measures.get(kind, evaluate)
        found[kind] = partial(measure, model, batches, runtime, control)
    return Validation(found)


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
    holding: Samples | None = None,
    verdict: Callable[[], dict] | None = None,
) -> Path:
    """Train what is trainable in ``model`` into ``path``, a file or folder, which is returned.

    ``write(record)`` writes it, with the metrics of the step in the record. ``lora_plus`` holds
    parameters and how many times the others' rate they learn at (Hayou et al. 2024). Each step also
    draws ``keep_rows`` of the samples ``holding``, which count ``keep`` times; ``loss_sum`` tells
    the kinds apart. ``verdict()`` adds to the metrics of the file's last version.
    """
    name, folder = path.name.removesuffix(".pth"), options.out_dir
    resume = options.resume and not options.dry_run
    states = RunStates(checkpoints_dir(folder, name), identity(record), resume=resume)
    if path.exists() and not (states.found or options.dry_run):
        print(f"starting clean: {path} of an earlier run will be replaced")
        if skills := skills_on(path, folder):
            print(f"note: it is the only base of {', '.join(skills)}; copy it first to keep them")
    run = Run(
        options,
        runtime,
        states,
        validation,
        write_files=lambda metrics: write(replace(record, metrics=metrics)),
        log_to=metrics_path(folder, name),
        verdict=verdict,
    )
    source = batches_of(samples, holding, options, runtime, states)
    groups = param_groups(model, options.weight_decay, options.optimizer, *lora_plus)
    train(model, source, groups, run, loss_sum)
    if not options.dry_run:
        print(f"saved {path}\n{validation}")
    return path


def batches_of(
    samples: Samples,
    holding: Samples | None,
    options: TrainOptions,
    runtime: Runtime,
    states: RunStates,
) -> Batches | KeepingBatches:
    """This rank's batches of the run, with so many rows a step as its found state had."""
    rows = options.batch_size * options.accumulation_steps * runtime.world_size
    pass_tokens = MICRO_TOKENS if runtime.device.type == "cpu" else GPU_MICRO_TOKENS
    share = {"rank": runtime.rank, "world_size": runtime.world_size}
    share["micro_tokens"] = options.micro_tokens or pass_tokens
    sizes = options.batch_size, options.accumulation_steps, options.seed
    rows = states.remembered("rows_per_step", rows)
    source = Batches(samples, *sizes, options.num_workers, rows_per_step=rows, **share)
    if holding is None:
        return source
    general = Batches(holding, *sizes, rows_per_step=options.keep_rows, **share)
    return KeepingBatches(source, general, options.keep)


def skills_on(base: Path, out_dir: Path) -> list[str]:
    """The names of the skill files in ``out_dir`` that were trained on this base file."""
    found, wanted = [], None
    with contextlib.suppress(UserError):  # its record is broken
        wanted = read_record(base).fingerprint
    for path in lora_paths(out_dir) if wanted else ():
        with contextlib.suppress(UserError):  # it is no skill
            if read_lora(path)[1].base.get("fingerprint") == wanted:
                found.append(path.name)
    return found


def identity(record: Record) -> dict:
    """What must be the same when a run is resumed: options, and files by their content."""
    may_change = MAY_CHANGE | DATA_OPTIONS | {entry["option"] for entry in record.data}
    same = {name: value for name, value in record.options.items() if name not in may_change}
    numbers = Counter()
    for entry in record.data:
        numbers[entry["option"]] += 1
        name = f"file {numbers[entry['option']]} of {entry['option']}"
        same[f"the content of {name}"] = entry["sha256"]
    same["the content of the tokenizer"] = record.tokenizer
    same["the content of the base"] = (record.base or {}).get("fingerprint")
    if record.stage == "lora" and not record.base["file"].endswith(".pth"):
        same["the content of chats in other makers' templates"] = ENCODING
    return same


def run_facts(
    stage: str, options: TrainOptions, tokenizer: PreTrainedTokenizerBase, base: Base | None = None
) -> dict:
    """What any record says of the run that makes the file; paths are cut to file names.

    Its ``data`` lists, by their content, the files of every option that takes several, and the
    skill that the run goes on with; the ``options`` that this skill's file decided are the file's.
    """
    # A resumed run leaves the same file as one that was never interrupted.
    said = {name: value for name, value in vars(options).items() if name not in ONCE}
    data = []
    for name, values in said.items():
        paths = values if isinstance(values, tuple) else ()
        for path in data_files(path for path in paths if isinstance(path, Path)):
            digest = sha256_file(path, cache_dir(options.out_dir))
            data.append({"option": name, "file": shown(path), "sha256": digest})
    facts = {"stage": stage, "tokenizer": tokenizer_fingerprint(tokenizer), "data": data}
    facts["options"] = {name: shown(value) for name, value in said.items()}
    if base:
        facts["base"] = {"file": base.path.name, "fingerprint": base.record.fingerprint}
    if base and base.skill:
        digest = sha256_file(options.skill, cache_dir(options.out_dir))
        data.append({"option": "skill", "file": shown(options.skill), "sha256": digest})
        facts["options"] |= {name: base.skill[1].options.get(name) for name in DECIDED}
    return facts


def shown(value: object) -> object:
    """An option as plain JSON: paths are cut to their names, so no folder of a machine gets out."""
    if isinstance(value, tuple):
        return [shown(item) for item in value]
    # Linux has file names that are no UTF-8.
    is_path = isinstance(value, Path)
    return os.fsencode(value.name).decode(errors="backslashreplace") if is_path else value
