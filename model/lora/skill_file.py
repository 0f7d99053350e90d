"""A skill on disk: one self-contained ``.pth``."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from os import PathLike

import torch
from torch import Tensor, nn

from core.errors import UserError
from core.files import atomic_write
from model.lora.layer import LoRA, adapted, attach, features, lora_parameters, remove_lora
from model.lora.targets import apply_call, check_receptive, linears, output_head
from model.lora.variants import lora_of
from model.weights import arithmetic, copy_strictly, fingerprint, read_tensors, short

FORMAT = 1
KEYS = ("A.weight", "B.weight", "magnitude")  # of a target, after ".lora."
META_KEY = "_meta"  # a uint8 tensor of JSON; MiniMind's own loader passes over it
HEAD = "_head."  # before the names of tensors that a classifier's skill replaces whole


def save_lora(
    model: nn.Module,
    path: str | PathLike,
    meta: dict | None = None,
    head: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the applied LoRA as one ``.pth`` that explains itself: fp32 tensors under MiniMind's
    keys, and ``_meta``.

    ``_meta`` holds rank, alpha, targets, the base's fingerprint and what ``meta`` adds (a ``base``
    dict is merged). ``head``: tensors that were trained beside the LoRA, which ``read_lora`` gives
    back as ``_meta``'s ``head``. Prints which updates are still zero: such a Linear's ``forward``
    never ran in training (some modules, PyTorch's MultiheadAttention for one, use its weight
    alone).
    """
    check_receptive(model)
    loras = {name: linear.lora for name, linear in adapted(model)}
    if not loras:
        raise UserError("there is no LoRA on this model to save; call apply_lora(model) first")
    if idle := [name for name, lora in loras.items() if lora.is_zero()]:
        print(
            f"note: {len(idle)} of {len(loras)} updates are zero, nothing was learned there: {', '.join(idle[:5])}"
        )
    tensors = {
        f"{name}.lora.{key}": tensor.detach().float().cpu()
        for name, lora in loras.items()
        for key, tensor in lora.exported().items()
    }
    tensors |= {HEAD + name: tensor.detach().float().cpu() for name, tensor in (head or {}).items()}
    write_lora(
        path,
        tensors,
        {name: lora.scaling for name, lora in loras.items()},
        base_fingerprint(model),
        meta or {},
    )


def write_lora(
    path: str | PathLike,
    tensors: dict[str, Tensor],
    scaling: dict[str, float],
    base: str | None,
    meta: dict,
) -> None:
    """Write the skill file of these tensors; ``scaling`` gives each target's. Rank and alpha are
    the most usual.
    """
    ranks = {name: tensors[f"{name}.lora.A.weight"].size(0) for name in scaling}
    (rank, alpha), _ = Counter(
        (rank, scaling[name] * rank) for name, rank in ranks.items()
    ).most_common(1)[0]
    record = {
        **{key: value for key, value in meta.items() if key != "head"},
        "format": FORMAT,
        "rank": rank,
        "alpha": alpha,
        "targets": list(scaling),
        "scaling": scaling,
        "base": {**meta.get("base", {}), "fingerprint": base},
    }
    packed = json.dumps(record, ensure_ascii=False).encode()
    content = {**tensors, META_KEY: torch.frombuffer(bytearray(packed), dtype=torch.uint8)}
    atomic_write(path, lambda file: torch.save(content, file))


def read_lora(path: str | PathLike) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a LoRA file and its ``_meta``, checked against each other; ``ranks`` gives
    each target's.

    A file without ``_meta`` (MiniMind's) gets rank and targets from its tensors, scale 1, and no
    base. Raises ``UserError`` for anything that is no LoRA file.
    """
    tensors = read_tensors(path)
    packed = tensors.pop(META_KEY, None)
    head = {
        name.removeprefix(HEAD): tensors.pop(name)
        for name in list(tensors)
        if name.startswith(HEAD)
    }
    ranks = _ranks(tensors, path)
    try:
        meta = {} if packed is None else json.loads(bytes(packed.to(torch.uint8).tolist()))
        rank = Counter(ranks.values()).most_common(1)[0][0]
        meta = {"rank": rank, "alpha": rank, "targets": sorted(ranks), **meta, "head": head}
        consistent = set(meta["targets"]) == set(ranks) and meta["rank"] in ranks.values()
        meta |= {
            "alpha": float(meta["alpha"]),
            "base": dict(meta.get("base") or {}),
            "ranks": ranks,
        }
        meta["options"] = dict(meta.get("options") or {})
        meta["use_dora"] = any(name.endswith(".lora.magnitude") for name in tensors)
        scaling = dict(meta.get("scaling") or {})
        meta["scaling"] = {
            name: float(scaling.get(name, meta["alpha"] / meta["rank"])) for name in meta["targets"]
        }
        numbers = [meta["alpha"], *meta["scaling"].values()]
        if (
            not consistent
            or not all(0 < n < math.inf for n in numbers)
            or meta.get("format", FORMAT) != FORMAT
        ):
            raise ValueError
    except (
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        OverflowError,
        RecursionError,
    ) as error:
        raise UserError(
            f"{path} is no LoRA file: its {META_KEY} does not describe its tensors; train it again"
        ) from error
    return tensors, meta


def _ranks(tensors: dict[str, Tensor], path: str | PathLike) -> dict[str, int]:
    """The rank of each target. Raises ``UserError`` that names the keys which make ``tensors`` no
    LoRA.
    """
    problems, parts = [], {}
    for name, tensor in tensors.items():
        if not (found := re.fullmatch(rf"(.+)\.lora\.({'|'.join(map(re.escape, KEYS))})", name)):
            problems.append(f"unexpected {name}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} is {tensor.dtype}, not floating point")
        else:
            parts.setdefault(found[1], {})[found[2]] = tuple(tensor.shape)
    ranks = {}
    for target, shapes in parts.items():
        problems += [
            f"missing {target}.lora.{key}" for key in ("A.weight", "B.weight") if key not in shapes
        ]
        match shapes:
            case {"A.weight": (rank, _), "B.weight": (outputs, columns), **others} if (
                rank == columns >= 1
            ):
                ranks[target] = rank
                if others not in ({}, {"magnitude": (outputs,)}):
                    problems.append(
                        f"{target}.lora.magnitude is {others['magnitude']}, not {(outputs,)}"
                    )
            case {"A.weight": first, "B.weight": second}:
                problems.append(f"{target} has A {first} and B {second}, of no common rank")
    if problems or not ranks:
        few = "; ".join(problems[:5]) + (
            f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        )
        raise UserError(f"{path} is no LoRA file: {few or 'it holds no tensors'}")
    return ranks


def check_lora(
    model: nn.Module, path: str | PathLike, *, allow_base_mismatch: bool = False
) -> tuple[dict[str, Tensor], dict]:
    """``read_lora``, once it is sure that the file fits ``model``; nothing is changed.

    Raises ``UserError`` if the file was trained on another base (unless ``allow_base_mismatch``),
    if the model lacks a target or has it in another size, every one of which is named, and as
    ``check_receptive`` does.
    """
    check_receptive(model)
    tensors, meta = read_lora(path)
    if meta["head"] and output_head(model) is not None:
        raise UserError(
            f"{path} is a text classifier's; ask it with scripts/train_lora_classifier.py --predict"
        )
    trained_on = meta["base"].get("fingerprint")
    if (
        trained_on is not None
        and trained_on != (present := base_fingerprint(model))
        and not allow_base_mismatch
    ):
        name = meta["base"].get("file", "a base")
        raise UserError(
            f"{path} was trained on {name} ({short(str(trained_on))}), but this model is {short(present)};"
            " use that base" + ("" if meta["head"] else " or --allow_base_mismatch")
        )
    found, problems = dict(linears(model)), []
    for target in meta["targets"]:
        wanted = (
            tensors[f"{target}.lora.B.weight"].size(0),
            tensors[f"{target}.lora.A.weight"].size(1),
        )
        if target not in found:
            problems.append(f"{target} is missing")
        elif features(found[target]) != wanted:
            problems.append(f"{target} is {features(found[target])}, not {wanted}")
    if problems:
        raise UserError(f"{path} does not fit this model: {'; '.join(problems)}")
    return tensors, meta


def load_lora(model: nn.Module, path: str | PathLike, *, allow_base_mismatch: bool = False) -> dict:
    """Copy a LoRA file into the LoRA applied to ``model``; returns its ``_meta``.

    Device and dtype of the model stay. Raises ``UserError``, before anything changes, for what
    ``check_lora`` refuses and if ranks, targets or kind differ from what is applied: it prints the
    right ``apply_lora`` call.
    """
    tensors, meta = check_lora(model, path, allow_base_mismatch=allow_base_mismatch)
    loras = {name: linear.lora for name, linear in adapted(model)}
    own = {
        f"{name}.lora.{key}": tensor
        for name, lora in loras.items()
        for key, tensor in lora.state_dict().items()
    }
    if (
        own.keys() != tensors.keys()
        or {name: lora.rank for name, lora in loras.items()} != meta["ranks"]
    ):
        prepared = f", or prepare it with {call}" if (call := apply_call(model, meta)) else ""
        raise UserError(f"{path} does not fit the LoRA on this model; use attach_lora{prepared}")
    copy_strictly(own, tensors, path)
    _note_unknown_base(meta, path)
    for name, lora in loras.items():
        lora.scaling = meta["scaling"][name]
    return meta


def adapters_in(
    model: nn.Module, path: str | PathLike, *, allow_base_mismatch: bool = False
) -> tuple[dict[str, LoRA], dict]:
    """The updates in a skill file that fits ``model``, by target, ready for ``attach``; and the
    file's ``_meta``.

    Raises ``UserError`` as ``check_lora`` does; ``model`` stays as it is.
    """
    tensors, meta = check_lora(model, path, allow_base_mismatch=allow_base_mismatch)
    loras = {}
    for name in meta["targets"]:
        parts = {
            key: tensors[f"{name}.lora.{key}"] for key in KEYS if f"{name}.lora.{key}" in tensors
        }
        loras[name] = lora_of(model.get_submodule(name), parts, meta["scaling"][name])
    _note_unknown_base(meta, path)
    return loras, meta


def _note_unknown_base(meta: dict, path: str | PathLike) -> None:
    if meta["base"].get("fingerprint") is None:
        print(f"note: {path} does not say which base it was trained on, so that cannot be checked")


def attach_lora(
    model: nn.Module, path: str | PathLike, *, allow_base_mismatch: bool = False
) -> dict:
    """Put a skill file on ``model`` whatever its rank and targets, in place of an active one;
    returns its ``_meta``.

    When ``check_lora`` refuses the file the active skill stays.
    """
    loras, meta = adapters_in(model, path, allow_base_mismatch=allow_base_mismatch)
    remove_lora(model)
    model.requires_grad_(False)
    attach(model, loras)
    return meta


def base_fingerprint(model: nn.Module) -> str:
    """``fingerprint`` of the model without its LoRA; recomputed only after a weight changed.

    What it is ``known_as``, where that was set: before it was quantised, or without what a
    classifier has to learn. Writes through ``parameter.data`` and by fused optimizers cannot be
    seen.
    """
    if hasattr(model, "known_as"):
        return model.known_as
    added = {id(parameter) for parameter in lora_parameters(model)}
    base = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if id(parameter) not in added
    ]
    config = getattr(model, "config", None)
    version = [(parameter.data_ptr(), parameter._version) for _, parameter in base]
    version.append(arithmetic(config))
    known_version, known = getattr(model, "_base_fingerprint", (None, ""))
    if version != known_version:
        known = fingerprint(base, config)
        model._base_fingerprint = (version, known)
    return known
