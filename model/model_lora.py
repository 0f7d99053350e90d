"""LoRA (Hu et al. 2021): a frozen Linear learns a low-rank update, and the update is a file of its own.

    x ──> Linear (frozen) ──────────────────> + ──> y
    └──> A (in -> rank) ──> B (rank -> out) ──┘     times alpha / rank

``apply_lora`` adds A and B as a child module of each target and patches that Linear's ``forward``, so the base's
state-dict keys stay what they were; ``remove_lora`` undoes it. Skills are files: ``save_lora``, ``load_lora`` into a
model prepared with the same rank and targets, ``attach_lora`` for whatever the file needs.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from os import PathLike
from types import MethodType

import torch
from torch import Tensor, nn

from core.errors import UserError
from core.files import atomic_write
from model.weights import ARITHMETIC, copy_strictly, fingerprint, read_tensors, short

FORMAT = 1
META_KEY = "_meta"  # a uint8 tensor of JSON; MiniMind's own loader passes over it


class LoRA(nn.Module):
    """The update ``alpha / rank * B(A(x))``; A ~ N(0, 0.02) and B = 0, so training starts from the base exactly."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float):
        super().__init__()
        self.rank = rank
        self.scaling = alpha / rank
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=False)
        nn.init.normal_(self.A.weight, std=0.02)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.A(x.to(self.A.weight.dtype)) * self.scaling)


def _forward_with_lora(self: nn.Linear, x: Tensor) -> Tensor:
    y = type(self).forward(self, x)  # the class's own: keeps quantised Linears working
    return y + self.lora(x).to(y.dtype)


def apply_lora(
    model: nn.Module, rank: int = 16, alpha: float | None = None, target_modules: str | Sequence[str] = "square"
) -> list[str]:
    """Freeze ``model`` and give its target Linears a trainable update; returns their names.

    ``target_modules``: "square" (as many inputs as outputs), "all-linear", a regular expression for whole module
    names, or a list of names or name endings. A Linear tied to an embedding is never a target. ``alpha`` None means
    ``rank``, a scale of 1. The new parameters are fp32 on the Linear's device.
    Raises ``UserError`` if LoRA is already applied or nothing matches.
    """
    if any(True for _ in _adapted(model)):
        raise UserError("LoRA is already applied to this model; call remove_lora(model) first")
    if rank < 1 or (alpha is not None and alpha <= 0):
        raise UserError(f"LoRA needs rank >= 1 and alpha > 0, not rank={rank}, alpha={alpha}")
    # A list, because adding children while walking named_modules() would visit them too.
    targets = [(name, linear) for name, linear in _linears(model) if _is_target(name, linear, target_modules)]
    if not targets:
        names = sorted({name.rpartition(".")[2] for name, _ in _linears(model)})
        raise UserError(f"target_modules={target_modules!r} matches no Linear; there are {', '.join(names) or 'none'}")
    smallest, name = min((min(linear.in_features, linear.out_features), name) for name, linear in targets)
    if rank > smallest:
        raise UserError(f"rank={rank} exceeds the {smallest} features of {name}: choose a smaller rank")
    model.requires_grad_(False)  # freeze first: whatever is added below is what trains
    for _, linear in targets:
        lora = LoRA(linear.in_features, linear.out_features, rank, alpha or rank)
        linear.lora = lora.to(linear.weight.device)
        # A bound method, no closure: deepcopy re-binds it, and `del` brings back the class's own.
        linear.forward = MethodType(_forward_with_lora, linear)
    return [name for name, _ in targets]


def remove_lora(model: nn.Module) -> None:
    """Undo ``apply_lora``: the base computes bit for bit what it did before. The base stays frozen."""
    for _, linear in list(_adapted(model)):
        del linear.forward, linear.lora


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that ``apply_lora`` added."""
    return [parameter for _, linear in _adapted(model) for parameter in linear.lora.parameters()]


def save_lora(model: nn.Module, path: str | PathLike, meta: dict | None = None) -> None:
    """Write the applied LoRA as one ``.pth`` that explains itself: fp32 tensors under MiniMind's keys, and ``_meta``.

    ``_meta`` holds rank, alpha, targets, the base's fingerprint and what ``meta`` adds (a ``base`` dict is merged).
    """
    adapted = dict(_adapted(model))
    if not adapted:
        raise UserError("there is no LoRA on this model to save; call apply_lora(model) first")
    first = next(iter(adapted.values())).lora
    meta = meta or {}
    record = {
        **meta,
        "format": FORMAT,
        "rank": first.rank,
        "alpha": first.scaling * first.rank,
        "targets": list(adapted),
        "scaling": {name: linear.lora.scaling for name, linear in adapted.items()},
        "base": {**meta.get("base", {}), "fingerprint": base_fingerprint(model)},
    }
    tensors = {name: tensor.float().cpu() for name, tensor in _lora_state(model).items()}
    tensors[META_KEY] = torch.frombuffer(bytearray(json.dumps(record, ensure_ascii=False).encode()), dtype=torch.uint8)
    atomic_write(path, lambda file: torch.save(tensors, file))


def read_lora(path: str | PathLike) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a LoRA file and its ``_meta``, checked against each other.

    A file without ``_meta`` (MiniMind's) gets rank and targets from its tensors, scale 1, and no base.
    Raises ``UserError`` for anything that is no LoRA file.
    """
    tensors = read_tensors(path)
    packed = tensors.pop(META_KEY, None)
    try:
        meta = {} if packed is None else json.loads(bytes(packed.to(torch.uint8).tolist()))
        targets, ranks = set(), set()
        for name, tensor in tensors.items():
            target, matrix = re.fullmatch(r"(.+)\.lora\.([AB])\.weight", name).groups()
            targets.add(target)
            rows, columns = tensor.shape
            ranks.add(rows if matrix == "A" else columns)
        (rank,) = ranks
        meta = {"rank": rank, "alpha": rank, "targets": sorted(targets), **meta}
        consistent = len(tensors) == 2 * len(targets) and set(meta["targets"]) == targets and meta["rank"] == rank >= 1
        meta |= {"rank": rank, "alpha": float(meta["alpha"]), "base": dict(meta.get("base") or {})}
        scaling = dict(meta.get("scaling") or {})
        meta["scaling"] = {target: float(scaling.get(target, meta["alpha"] / rank)) for target in meta["targets"]}
        numbers = [meta["alpha"], *meta["scaling"].values()]
        if not consistent or not all(0 < n < math.inf for n in numbers) or meta.get("format", FORMAT) != FORMAT:
            raise ValueError("its _meta and its tensors disagree")
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path} is no LoRA file: it needs '<module>.lora.A.weight' and '.B.weight' pairs of one rank"
        ) from error
    return tensors, meta


def check_lora(
    model: nn.Module, path: str | PathLike, *, allow_base_mismatch: bool = False
) -> tuple[dict[str, Tensor], dict]:
    """``read_lora``, once it is sure that the file fits ``model``; nothing is changed.

    Raises ``UserError`` if the file was trained on another base (unless ``allow_base_mismatch``), or if the model lacks
    a target or has it in another size; every such target is named.
    """
    tensors, meta = read_lora(path)
    trained_on = meta["base"].get("fingerprint")
    if trained_on is not None and trained_on != (present := base_fingerprint(model)) and not allow_base_mismatch:
        name = meta["base"].get("file", "a base")
        raise UserError(
            f"{path} was trained on {name} ({short(str(trained_on))}), but this model is {short(present)};"
            " use that base or --allow_base_mismatch"
        )
    linears, problems = dict(_linears(model)), []
    for target in meta["targets"]:
        wanted = (tensors[f"{target}.lora.B.weight"].size(0), tensors[f"{target}.lora.A.weight"].size(1))
        linear = linears.get(target)
        if linear is None:
            problems.append(f"{target} is missing")
        elif (linear.out_features, linear.in_features) != wanted:
            problems.append(f"{target} is {(linear.out_features, linear.in_features)}, not {wanted}")
    if problems:
        raise UserError(f"{path} does not fit this model: {'; '.join(problems)}")
    return tensors, meta


def load_lora(model: nn.Module, path: str | PathLike, *, allow_base_mismatch: bool = False) -> dict:
    """Copy a LoRA file into the LoRA applied to ``model``; returns its ``_meta``.

    Device and dtype of the model stay. Raises ``UserError``, before anything changes, for what ``check_lora`` refuses
    and if rank or targets differ from what is applied: it prints the right ``apply_lora`` call.
    """
    tensors, meta = check_lora(model, path, allow_base_mismatch=allow_base_mismatch)
    adapted = dict(_adapted(model))
    if set(adapted) != set(meta["targets"]) or {linear.lora.rank for linear in adapted.values()} != {meta["rank"]}:
        raise UserError(f"{path} does not fit the LoRA on this model; prepare it with {_apply_call(model, meta)}")
    _fill(model, tensors, meta, path)
    return meta


def attach_lora(model: nn.Module, path: str | PathLike, *, allow_base_mismatch: bool = False) -> dict:
    """Put a skill file on ``model`` whatever its rank and targets, in place of an active one; returns its ``_meta``.

    When ``check_lora`` refuses the file the active skill stays.
    """
    tensors, meta = check_lora(model, path, allow_base_mismatch=allow_base_mismatch)
    remove_lora(model)
    apply_lora(model, meta["rank"], meta["alpha"], _exactly(meta["targets"]))
    _fill(model, tensors, meta, path)
    return meta


def _fill(model: nn.Module, tensors: dict[str, Tensor], meta: dict, path: str | PathLike) -> None:
    """Copy checked tensors and scales into the LoRA applied to ``model``."""
    if meta["base"].get("fingerprint") is None:
        print(f"note: {path} does not say which base it was trained on, so that cannot be checked")
    copy_strictly(_lora_state(model), tensors, path)
    for name, linear in _adapted(model):
        linear.lora.scaling = meta["scaling"][name]


def base_fingerprint(model: nn.Module) -> str:
    """``fingerprint`` of the model without its LoRA; recomputed only after a weight changed.

    A write through ``parameter.data`` is the one change that cannot be seen.
    """
    added = {id(parameter) for parameter in lora_parameters(model)}
    base = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in added]
    config = getattr(model, "config", None)
    version = [(parameter.data_ptr(), parameter._version) for _, parameter in base]
    version += [getattr(config, name, None) for name in ARITHMETIC]
    known_version, known = getattr(model, "_base_fingerprint", (None, ""))
    if version != known_version:
        known = fingerprint(base, config)
        model._base_fingerprint = (version, known)
    return known


def _adapted(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The Linears that carry a LoRA, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(getattr(module, "lora", None), LoRA))


def _lora_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.lora.{key}": tensor
        for name, linear in _adapted(model)
        for key, tensor in linear.lora.state_dict().items()
    }


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every Linear of the base whose weight is its own: a tied head would drag the embedding along."""
    excluded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    excluded |= {id(parameter) for parameter in lora_parameters(model)}
    return (
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in excluded
    )


def _is_target(name: str, linear: nn.Linear, target_modules: str | Sequence[str]) -> bool:
    if target_modules == "square":
        return linear.in_features == linear.out_features
    if target_modules == "all-linear":
        return True
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def _apply_call(model: nn.Module, meta: dict) -> str:
    """The ``apply_lora`` call that prepares a bare ``model`` for a file with this ``_meta``, as short as it can be."""
    arguments = f"rank={meta['rank']}"
    if meta["alpha"] != meta["rank"]:
        arguments += f", alpha={meta['alpha']:g}"
    wanted = set(meta["targets"])
    endings = sorted({name.rpartition(".")[2] for name in wanted})
    for targets in ("square", "all-linear", endings):
        if {name for name, linear in _linears(model) if _is_target(name, linear, targets)} == wanted:
            return f"apply_lora(model, {arguments}" + (")" if targets == "square" else f", target_modules={targets!r})")
    return f"apply_lora(model, {arguments}, target_modules={_exactly(sorted(wanted))!r})"


def _exactly(names: Sequence[str]) -> str:
    """``target_modules`` for these Linears alone: a list would take longer names that end like them too."""
    return "|".join(map(re.escape, names))
