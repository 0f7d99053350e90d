"""What a training run starts from: a base, and perhaps a skill that it goes on with."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from core.paths import is_pretrained
from dataset.chat import chat_notes
from dataset.tokenizer import tokenizer_fingerprint, tokenizer_of
from model.LMConfig import check_length
from model.lora.config import LoRAConfig
from model.lora.layer import adapted
from model.lora.skill_file import Skill, attach_lora, read_lora
from model.quantized import quantize
from model.weights import RunRecord, choose_base, load_base
from trainer.options import TrainOptions
from trainer.runtime import Runtime

# The options that a skill's file has decided for every run that goes on with it.
DECIDED = {option.name for option in fields(LoRAConfig)} - {"lora_dropout"}


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
    stage: str,
    *,
    own: bool = True,
    prompt_template: str | None = None,
    skill_base: dict | None = None,
) -> Base:
    """The base that is named, or else a skill's own, or else the newest one of ``stage``.

    Raises ``UserError`` if ``own`` for a model of other makers, for a template that can write no
    chat, and if options misfit.
    """
    path = choose_base(options.out_dir, options.base, skill_base, stages=(stage,))
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


def open_skill_base(options: TrainOptions, runtime: Runtime, given: Mapping[str, object]) -> Base:
    """The base that is to learn a skill, in 4 bits if so asked, and what it goes on with, if any.

    If ``options.skill`` names a file, ``options`` get what it says of how the skill is asked.
    Raises ``UserError`` as ``open_base`` does, where ``given``, the options that the user stated,
    contradicts the file, and for another base or tokenizer than the skill was trained with.
    """
    skill = _take_skill(options, given) if options.skill else None
    how = {"prompt_template": options.prompt_template, "skill_base": skill and skill[1].base}
    base = replace(open_base(options, runtime, "full_sft", own=False, **how), skill=skill)
    if skill:
        _check_trained_on(base, options.skill)
    if options.load_in_4bit:
        quantize(base.model, runtime.dtype)
    return base


def _take_skill(options: TrainOptions, given: Mapping[str, object]) -> Skill:
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


def attach_skill(model: nn.Module, options: TrainOptions, skill: Skill) -> None:
    """Freeze ``model`` and attach the skill that the run goes on with: its update trains on."""
    attach_lora(model, options.skill, skill)
    for _, linear in adapted(model):
        linear.lora.dropout.p = options.lora_dropout


def check_apart(path: Path, start: Path | None) -> None:
    """Raise ``UserError`` if ``path``, where a run writes, is the file that it starts from."""
    if start and path.exists() and path.samefile(start):
        lost = f"{path} is what this run starts from and would be lost"
        raise UserError(f"{lost}: choose another out_dir, or for a skill another lora_name")
