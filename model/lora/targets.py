"""Which Linears of a model get a LoRA, and with which rank and scale."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from core.errors import UserError
from model.lora.config import SHORTHANDS, LoRAConfig
from model.lora.layer import Linear, adapted, features, merged


@dataclass(frozen=True)
class Target:
    name: str
    linear: Linear
    rank: int
    scaling: float


def check_receptive(model: nn.Module) -> None:
    """Raise ``UserError`` for a model that no LoRA can be put on or saved from: a wrapper of one,
    whose modules have other names than the model's own (``torch.compile``'s,
    DistributedDataParallel), and while one is merged into it.
    """
    children = [name for name, _ in model.named_children()]
    if children in (["_orig_mod"], ["module"]):
        raise UserError(
            f"{type(model).__name__} wraps the model that has the names; pass that one, its .{children[0]}"
        )
    if any(True for _ in merged(model)):
        raise UserError("a LoRA is merged into this model; call unmerge_lora(model) first")


def linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Every Linear of the base whose weight is its own: a tied head would drag the embedding
    along.
    """
    others = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    others |= {
        id(parameter) for _, linear in adapted(model) for parameter in linear.lora.parameters()
    }
    return (
        (name, module)
        for name, module in model.named_modules()
        if name and isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in others
    )


def choose_targets(model: nn.Module, config: LoRAConfig) -> list[Target]:
    """What ``config`` chooses of ``model``'s Linears, in their order.

    Raises ``UserError`` if nothing is left, for a name, pattern or layer number that matches
    nothing, and for a rank beyond a Linear's features. It lists what could match.
    """
    found, head = dict(linears(model)), output_head(model)
    endings = ", ".join(sorted({name.rpartition(".")[2] for name in found})) or "none"
    names = [
        name
        for name, linear in found.items()
        if _is_target(name, linear, head, config.target_modules)
    ]
    if (idle := _idle(found, config.target_modules)) or not names:
        raise UserError(
            f"target_modules={idle or repr(config.target_modules)} matches no Linear; there are {endings}"
        )
    if idle := _idle(names, config.exclude_modules):
        raise UserError(f"exclude_modules={idle} matches no target; there are {_endings(names)}")
    names = [name for name in names if not _is_named(name, config.exclude_modules)]
    if not names:
        raise UserError(f"exclude_modules={config.exclude_modules!r} leaves no target")
    if config.layers_to_transform:
        numbers = {_layer(name) for name in names} - {None}
        if missing := sorted(set(config.layers_to_transform) - numbers):
            there = ", ".join(map(str, sorted(numbers))) or "none"
            raise UserError(
                f"layers_to_transform {missing} match no target; there are layers {there}"
            )
        names = [name for name in names if _layer(name) in config.layers_to_transform]
    for kind, pattern in (
        ("rank_pattern", config.rank_pattern),
        ("alpha_pattern", config.alpha_pattern),
    ):
        for key in pattern:
            if not any(_matches(key, name) for name in names):
                raise UserError(f"{kind} {key!r} matches no target; there are {_endings(names)}")
    return [_target(name, found[name], config) for name in names]


def table_of(model: nn.Module) -> str:
    """The adapted modules, those of like name in one line: how many, their (outputs, inputs), rank
    and parameters.
    """
    modules, parameters = Counter(), Counter()
    for name, linear in adapted(model):
        outputs, inputs = features(linear)
        kind = (
            re.sub(r"(^|\.)\d+(?=\.)", r"\1N", name),
            f"{outputs} x {inputs}",
            f"rank {linear.lora.rank}",
        )
        modules[kind] += 1
        parameters[kind] += sum(parameter.numel() for parameter in linear.lora.parameters())
    rows = [(f"{modules[kind]} x", *kind, f"{parameters[kind]:,}") for kind in modules]
    rows.append((f"{modules.total()}", "modules", "", "", f"{parameters.total():,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        [row[0].rjust(widths[0]), row[1].ljust(widths[1]), *map(str.rjust, row[2:], widths[2:])]
        for row in rows
    )
    return "\n".join("  " + "  ".join(line) for line in lines) + " parameters"


def _target(name: str, linear: Linear, config: LoRAConfig) -> Target:
    rank = next(
        (rank for key, rank in config.rank_pattern.items() if _matches(key, name)), config.rank
    )
    alpha = next(
        (alpha for key, alpha in config.alpha_pattern.items() if _matches(key, name)), config.alpha
    )
    if rank > (smallest := min(features(linear))):
        raise UserError(
            f"rank={rank} exceeds the {smallest} features of {name}: choose a smaller rank"
        )
    return Target(name, linear, rank, config.scaling(rank, alpha))


def output_head(model: nn.Module) -> nn.Module | None:
    """A language model's own, tied or not."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _is_target(
    name: str, linear: Linear, head: nn.Module | None, wanted: str | tuple[str, ...]
) -> bool:
    if wanted == "square":
        return linear is not head and len(set(features(linear))) == 1
    if wanted == "all-linear":
        return linear is not head
    return _is_named(name, wanted)


def _is_named(name: str, wanted: str | tuple[str, ...]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == word or name.endswith(f".{word}") for word in wanted)


def _idle(names: Iterable[str], wanted: str | tuple[str, ...]) -> str:
    """Those of the wanted words, or the regular expression, that none of ``names`` answers to;
    empty for none.
    """
    if wanted in SHORTHANDS:
        return ""
    words = [wanted] if isinstance(wanted, str) else [(word,) for word in wanted]
    idle = [word for word in words if not any(_is_named(name, word) for name in names)]
    return ", ".join(repr(word if isinstance(word, str) else word[0]) for word in idle)


def _matches(key: str, name: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({key})", name) is not None


def _layer(name: str) -> int | None:
    """The first number in a module's name."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


def _endings(names: list[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def apply_call(model: nn.Module, meta: dict) -> str:
    """The ``apply_lora`` call that prepares a bare ``model`` for a file with this ``_meta``, as
    short as it can be.

    Empty where there is none: sums of skills may have a rank beyond what can be trained.
    """
    arguments = f"rank={meta['rank']}"
    if meta["alpha"] != meta["rank"]:
        arguments += f", alpha={meta['alpha']:g}"
    wanted = set(meta["targets"])
    endings = tuple(sorted({name.rpartition(".")[2] for name in wanted}))
    found, head = dict(linears(model)), output_head(model)
    if any(rank > min(features(found[name])) for name, rank in meta["ranks"].items()):
        return ""
    choices = ("square", "all-linear", endings)
    fitting = [
        t
        for t in choices
        if {name for name in found if _is_target(name, found[name], head, t)} == wanted
    ]
    targets = fitting[0] if fitting else "|".join(map(re.escape, sorted(wanted)))
    if targets != "square":
        arguments += f", target_modules={list(targets) if targets == endings else targets!r}"
    others = {re.escape(name): rank for name, rank in meta["ranks"].items() if rank != meta["rank"]}
    arguments += f", rank_pattern={others!r}" if others else ""
    return f"apply_lora(model, {arguments}{', use_dora=True' if meta['use_dora'] else ''})"
