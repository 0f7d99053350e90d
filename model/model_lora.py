"""LoRA (Hu et al. 2021): a frozen Linear learns a low-rank update, and the update is a file of its
own.

    x ──> Linear (frozen) ──────────────────> + ──> y
    └──> A (in -> rank) ──> B (rank -> out) ──┘     times alpha / rank

``apply_lora`` adds A and B as a child module of each target and patches that Linear's ``forward``,
so the base's state-dict keys stay what they were; ``remove_lora`` undoes it. Skills are files:
``save_lora``, ``load_lora`` into a model prepared with the same rank and targets, ``attach_lora``
for whatever the file needs. What an update computes stands in lora_layers.py, which Linears get one
in lora_targets.py, and all options in lora_config.py.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from types import MethodType

import torch
from torch import Tensor, nn

from core.errors import UserError
from core.files import atomic_write
from model.lora_config import LoRAConfig
from model.lora_layers import DoRA, LoRA, PiSSA, features, lora_of
from model.lora_targets import (
    adapted,
    apply_call,
    check_receptive,
    choose_targets,
    linears,
    output_head,
)
from model.weights import arithmetic, copy_strictly, fingerprint, read_tensors, short

FORMAT = 1
KEYS = ("A.weight", "B.weight", "magnitude")  # of a target, after ".lora."
META_KEY = "_meta"  # a uint8 tensor of JSON; MiniMind's own loader passes over it
HEAD = "_head."  # before the names of tensors that a classifier's skill replaces whole


def apply_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float | None = None,
    target_modules: str | Sequence[str] = "square",
    **options,
) -> list[str]:
    """Freeze ``model`` and give its target Linears a trainable update; returns their names.

    ``target_modules``: "square" (as many inputs as outputs), "all-linear", a regular expression for
    whole module names, or a list of names or name endings. A Linear tied to an embedding is never a
    target. ``alpha`` None means a scale of 1. ``options``: the others of ``LoRAConfig``. The new
    parameters are fp32 on the Linear's device. Raises ``UserError`` if LoRA is already applied, for
    impossible options, where nothing matches, and as ``check_receptive`` does.
    """
    if any(True for _ in adapted(model)):
        raise UserError("LoRA is already applied to this model; call remove_lora(model) first")
    check_receptive(model)
    config = LoRAConfig(rank, alpha, target_modules, **options)
    adapters = {}
    for target in choose_targets(model, config):
        settings = (target.linear, target.rank, target.scaling, config.lora_dropout)
        if config.init_lora_weights == "pissa":
            adapters[target.name] = PiSSA(*settings)
        else:
            kind = DoRA if config.use_dora else LoRA
            adapters[target.name] = kind(*settings, config.init_lora_weights)
    model.requires_grad_(False)  # freeze first: whatever is added below is what trains
    attach(model, adapters)
    return list(adapters)


def attach(model: nn.Module, adapters: Mapping[str, LoRA]) -> None:
    """Put each adapter on the Linear of that name, which carries none, on its device and in its
    mode.
    """
    for name, lora in adapters.items():
        linear = model.get_submodule(name)
        if (lora.A.weight.device, lora.training) != (
            linear.weight.device,
            linear.training,
        ):  # rare, and slow to ask
            lora.to(linear.weight.device).train(linear.training)
        linear.lora = lora
        # A bound method, no closure: deepcopy re-binds it, and `del` brings back the class's own.
        linear.forward = MethodType(lora.forward_of_linear, linear)


def remove_lora(model: nn.Module) -> dict[str, LoRA]:
    """Undo ``apply_lora`` and return what ``attach`` takes: the base is bit for bit as before, and
    stays frozen.
    """
    removed = {}
    for name, linear in list(adapted(model)):
        removed[name] = linear.lora
        del linear.forward, linear.lora
    return removed


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that ``apply_lora`` added."""
    return [parameter for _, linear in adapted(model) for parameter in linear.lora.parameters()]


def output_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of ``lora_parameters`` on the side of the outputs, B and magnitude, which LoRA+ trains
    faster.
    """
    return [
        parameter for _, linear in adapted(model) for parameter in linear.lora.output_parameters()
    ]


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
