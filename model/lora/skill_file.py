"""A skill on disk: one self-contained ``.pth``, whose ``_meta`` explains the tensors beside it."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike

import torch
from torch import Tensor, nn

from core.errors import UserError
from core.files import atomic_write
from model.lora.layer import LoRA, adapted, base_name, exchange, features, lora_parameters
from model.lora.targets import check_receptive, endings, linears
from model.lora.variants import lora_of
from model.weights import FORMAT, Record, arithmetic, fingerprint, read_tensors

KEYS = ("A.weight", "B.weight", "magnitude")  # of a target, after ".lora."
META_KEY = "_meta"  # a uint8 tensor of JSON; MiniMind's own loader skips it


@dataclass(kw_only=True)
class SkillMeta(Record):
    """What a skill file says of itself; ``save_lora`` fills in everything down to ``base``."""

    rank: int = 0  # rank and alpha: the most usual pair
    alpha: int | float = 0.0
    targets: list = field(default_factory=list)
    scaling: dict = field(default_factory=dict)  # of each target, as are the ranks
    ranks: dict = field(default_factory=dict)
    base: dict = field(default_factory=dict)
    prompt_template: str | None = None  # how the skill was asked in training
    load_in_4bit: bool = False
    max_seq_len: int | None = None
    labels: list | None = None  # a classifier's, as is ``pairs``
    pairs: bool | None = None

    ONCE_OPTIONS = ("prompt_template", "load_in_4bit", "max_seq_len")


Skill = tuple[dict[str, Tensor], SkillMeta]  # what a file holds


def save_lora(
    model: nn.Module,
    path: str | PathLike,
    meta: SkillMeta | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the applied LoRA as one ``.pth``: fp32 tensors under MiniMind's keys, and ``meta``.

    ``extra``: tensors that were trained beside the LoRA; their names begin with "_". Prints which
    updates are still zero, as before training or where a Linear's ``forward`` never ran: PyTorch's
    MultiheadAttention, for one, uses its weight alone.
    """
    check_receptive(model)
    loras = {name: linear.lora for name, linear in adapted(model)}
    if not loras:
        raise UserError("there is no LoRA on this model to save; call apply_lora(model) first")
    if idle := [name for name, lora in loras.items() if lora.is_zero()]:
        where = f"{len(idle)} of {len(loras)} updates are zero, nothing was learned there"
        print(f"note: {where}: {', '.join(idle[:5])}")
    tensors, ranks = dict(extra or {}), {}
    for name, lora in loras.items():
        exported = lora.exported()
        ranks[name] = exported["A.weight"].size(0)
        tensors |= {f"{name}.lora.{key}": tensor for key, tensor in exported.items()}
    tensors = {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}
    scaling = {name: lora.scaling for name, lora in loras.items()}
    usual = Counter((rank, scaling[name] * rank) for name, rank in ranks.items())  # rank, alpha
    rank, alpha = usual.most_common(1)[0][0]
    meta = replace(meta or SkillMeta(), rank=rank, alpha=alpha, ranks=ranks, scaling=scaling)
    meta.targets = list(loras)
    meta.base = {**meta.base, "fingerprint": base_fingerprint(model)}
    packed = json.dumps(meta.to_json(), ensure_ascii=False).encode()
    tensors[META_KEY] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    atomic_write(path, lambda file: torch.save(tensors, file))


def read_lora(path: str | PathLike) -> Skill:
    """The tensors of a skill file, ``extra`` ones included, and its meta, checked against them.

    A file without ``_meta`` (MiniMind's) gets rank and targets from its tensors, scale 1 and no
    base, as is printed. Raises ``UserError`` for anything that is no LoRA file.
    """
    # Files of earlier versions may hold the parts of names that torch.compile and such add.
    tensors = {base_name(name): tensor for name, tensor in read_tensors(path).items()}
    packed = tensors.pop(META_KEY, None)
    ranks = _ranks(tensors, path)
    rank = Counter(ranks.values()).most_common(1)[0][0]
    implied = {"rank": rank, "alpha": rank, "targets": sorted(ranks)}  # alpha = rank: scale 1
    try:
        content = {} if packed is None else json.loads(bytes(packed.to(torch.uint8).tolist()))
        meta = SkillMeta.from_json(implied | content)
        usual = meta.alpha / meta.rank
        scaling = {base_name(n): float(meta.scaling.get(n, usual)) for n in meta.targets}
        consistent = set(scaling) == set(ranks) and meta.rank in ranks.values()
        positive = all(0 < number < math.inf for number in (meta.alpha, *scaling.values()))
        if not consistent or not positive or meta.format != FORMAT:
            raise ValueError
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
        wrong = f"its {META_KEY} does not describe its tensors"
        raise UserError(f"{path} is no LoRA file: {wrong}; train it again") from error
    if meta.base.get("fingerprint") is None:
        print(f"note: {path} does not say which base it was trained on, so that cannot be checked")
    return tensors, replace(meta, targets=list(scaling), scaling=scaling, ranks=ranks)


def _ranks(tensors: dict[str, Tensor], path: str | PathLike) -> dict[str, int]:
    """The rank of each target. Raises ``UserError``, with the keys, for what is no LoRA."""
    ranks, shapes, problems = {}, defaultdict(dict), []
    for name, tensor in tensors.items():
        target, _, key = name.rpartition(".lora.")
        if name.startswith("_"):  # one of ``extra``
            continue
        if target and key in KEYS and tensor.is_floating_point():
            shapes[target][key] = tuple(tensor.shape)
        else:
            problems.append(f"unexpected {name} ({tensor.dtype})")
    for target, found in shapes.items():
        A, B = found.get("A.weight", ()), found.get("B.weight", ())
        pair = len(A) == len(B) == 2 and A[0] == B[1] >= 1
        if pair and found.get("magnitude") in (None, B[:1]):
            ranks[target] = A[0]
        else:
            problems.append(f"{target} has the shapes {found}, which make no update")
    if problems or not ranks:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        few = "; ".join(problems[:5]) or "it holds no tensors"
        raise UserError(f"{path} is no LoRA file: {few}{more}")
    return ranks


def adapters_in(
    model: nn.Module,
    path: str | PathLike,
    skill: Skill | None = None,
    *,
    allow_base_mismatch: bool = False,
    with_extra: bool = False,
) -> tuple[dict[str, LoRA], SkillMeta]:
    """The updates in a skill file by target, ready for ``attach`` to ``model``; and its meta.

    ``skill``: what ``read_lora`` gave for ``path``, where it was read already. Raises ``UserError``
    for a file with ``extra`` tensors (unless ``with_extra``), for one of another base (unless
    ``allow_base_mismatch``), listing every target that does not fit, and as ``check_receptive``.
    """
    check_receptive(model)
    tensors, meta = skill or read_lora(path)
    extra = [name for name in tensors if name.startswith("_")]
    if extra and not with_extra:
        way_out = f"use it with the program that trained it as a {meta.stage}"
        raise UserError(f"{path} is more than a LoRA: {extra[0]} belongs to it; {way_out}")
    trained_on, present = meta.base.get("fingerprint"), base_fingerprint(model)
    if trained_on not in (None, present) and not allow_base_mismatch:
        base = f"{meta.base.get('file', 'a base')} ({str(trained_on)[:12]})"
        way_out = "use that base" if extra else "use that base or allow_base_mismatch"
        wrong = f"{path} was trained on {base}, but this model is {present[:12]}"
        raise UserError(f"{wrong}; {way_out}")
    found, loras, problems = linears(model), {}, []
    for name in meta.targets:
        prefix = f"{name}.lora."
        parts = {key: tensors[prefix + key] for key in KEYS if prefix + key in tensors}
        size = parts["B.weight"].size(0), parts["A.weight"].size(1)
        if name not in found:
            problems.append(f"{name} is missing")
        elif features(found[name]) != size:
            problems.append(f"{name} is {features(found[name])}, not {size}")
        else:
            loras[name] = lora_of(found[name], parts, meta.scaling[name])
    if problems:
        raise UserError(f"{path} does not fit this model: {'; '.join(problems)}")
    return loras, meta


def load_lora(model: nn.Module, path: str | PathLike, **allowed: bool) -> SkillMeta:
    """Copy a skill file into the LoRA applied to ``model``; returns its meta.

    Raises ``UserError`` as ``adapters_in`` does, and if ranks, targets or kind differ.
    """
    loras, meta = adapters_in(model, path, **allowed)
    own = {name: linear.lora for name, linear in adapted(model)}
    kinds = [{name: (type(lora), lora.rank) for name, lora in of.items()} for of in (own, loras)]
    if kinds[0] != kinds[1]:
        differ = f"{path} has {_described(loras)}, the model {_described(own)}"
        raise UserError(f"{differ}; use attach_lora, which prepares the model for the file")
    for name, lora in loras.items():
        own[name].load_state_dict(lora.state_dict())
        own[name].scaling = lora.scaling
    return meta


def _described(loras: Mapping[str, LoRA]) -> str:
    """Kinds, ranks and targets of ``loras``, for a sentence."""
    kinds = ", ".join(sorted({type(lora).__name__ for lora in loras.values()}))
    ranks = ", ".join(map(str, sorted({lora.rank for lora in loras.values()})))
    found = f"{kinds} of rank {ranks} on {len(loras)} Linears ({endings(loras)})"
    return found if loras else "no LoRA"


def attach_lora(
    model: nn.Module, path: str | PathLike, skill: Skill | None = None, **allowed: bool
) -> SkillMeta:
    """Replace what ``model`` carries by a skill file, unless ``adapters_in`` refuses; its meta."""
    loras, meta = adapters_in(model, path, skill, **allowed)
    model.requires_grad_(False)
    exchange(model, loras)
    return meta


def base_fingerprint(model: nn.Module) -> str:
    """A quantised model's ``known_as``, else the base's ``fingerprint``, kept until that changes.

    Writes through ``parameter.data`` and by fused optimizers cannot be seen.
    """
    if hasattr(model, "known_as"):
        return model.known_as
    added, config = {id(p) for p in lora_parameters(model)}, getattr(model, "config", None)
    base = [(base_name(name), p) for name, p in model.named_parameters() if id(p) not in added]
    version = [(p.data_ptr(), p._version) for _, p in base], arithmetic(config)
    known_version, known = getattr(model, "_base_fingerprint", (None, ""))
    if version != known_version:
        known = fingerprint(base, config)
        model._base_fingerprint = (version, known)
    return known
