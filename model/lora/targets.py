"""Which Linears of a model get a LoRA, and with which rank and scale."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt

from torch import nn
from transformers.pytorch_utils import Conv1D

from core.errors import UserError
from model.lora.config import SHORTHANDS, LoRAConfig
from model.lora.layer import Linear, adapted, base_name, features, lora_parameters


@dataclass(frozen=True)
class Target:
    name: str
    linear: Linear
    rank: int
    scaling: float


def check_receptive(model: nn.Module) -> None:
    """Raise ``UserError`` for a model that no LoRA can be put on or saved from: a wrapper of the
    whole model (``torch.compile``'s, DistributedDataParallel), and while a LoRA is merged into it.
    """
    children = [name for name, _ in model.named_children()]
    if children in (["_orig_mod"], ["module"]):
        raise UserError(
            f"{type(model).__name__} wraps the model that has the names;"
            f" pass that one, its .{children[0]}"
        )
    if any("unmerged" in vars(module) for module in model.modules()):
        raise UserError("a LoRA is merged into this model; call unmerge_lora(model) first")


def linears(model: nn.Module) -> dict[str, Linear]:
    """Every Linear of the base whose weight is its own, by name: a tied head would drag the
    embedding along.
    """
    others = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    others |= {id(parameter) for parameter in lora_parameters(model)}
    return {
        base_name(name): module
        for name, module in model.named_modules()
        if name and isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in others
    }


def output_head(model: nn.Module) -> nn.Module | None:
    """A language model's own, tied or not."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def choose_targets(model: nn.Module, config: LoRAConfig) -> list[Target]:
    """What ``config`` chooses of ``model``'s Linears, in their order.

    Raises ``UserError`` if nothing is left, for a name, pattern or layer number that matches
    nothing, and for a rank beyond a Linear's features. It lists what could match.
    """
    found, wanted, head = linears(model), config.target_modules, output_head(model)
    if wanted in SHORTHANDS:
        names = [name for name, linear in found.items() if linear is not head]
    else:
        names = _matching(found, wanted, "target_modules")
    if wanted == "square":
        names = [name for name in names if len(set(features(found[name]))) == 1]
    if not names:
        raise UserError(f"target_modules={wanted!r} matches nothing; there are {endings(found)}")
    excluded = _matching(names, config.exclude_modules, "exclude_modules")
    if not (names := [name for name in names if name not in excluded]):
        raise UserError(f"exclude_modules={config.exclude_modules!r} leaves no target")
    if config.layers_to_transform:
        names = _in_layers(names, config.layers_to_transform)
    patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    for option, pattern in patterns.items():
        for key in pattern:
            if not any(_ends_with(key, name) for name in names):
                raise UserError(f"{option} {key!r} matches nothing; there are {endings(names)}")
    return [_target(name, found[name], config) for name in names]


def _matching(names: Iterable[str], wanted: str | tuple[str, ...], option: str) -> list[str]:
    """Those of ``names`` that the regular expression ``wanted`` matches whole, or that are or end
    in one of the words ``wanted``. Raises ``UserError`` for what matches nothing.
    """
    chosen, idle = set(), []
    for word in (wanted,) if isinstance(wanted, str) else wanted:
        expression = word if isinstance(wanted, str) else rf"(.*\.)?{re.escape(word)}"
        matches = {name for name in names if re.fullmatch(expression, name)}
        chosen |= matches
        if not matches:
            idle.append(repr(word))
    if idle:
        raise UserError(f"{option}={', '.join(idle)} matches nothing; there are {endings(names)}")
    return [name for name in names if name in chosen]


def _in_layers(names: list[str], wanted: tuple[int, ...]) -> list[str]:
    """Those of ``names`` whose first number is one of ``wanted``, of which each must be there."""
    numbers = {name: re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names}
    layers = {name: int(number[1]) for name, number in numbers.items() if number}
    if missing := sorted(set(wanted) - set(layers.values())):
        there = ", ".join(map(str, sorted(set(layers.values())))) or "none"
        raise UserError(f"layers_to_transform {missing} match no target; there are layers {there}")
    return [name for name in names if layers.get(name) in wanted]


def _ends_with(key: str, name: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({key})", name) is not None


def _target(name: str, linear: Linear, config: LoRAConfig) -> Target:
    """Scaled by alpha / rank, or alpha / sqrt(rank) (Kalajdzievski 2023); by 1 without an alpha."""
    ranks = [rank for key, rank in config.rank_pattern.items() if _ends_with(key, name)]
    alphas = [alpha for key, alpha in config.alpha_pattern.items() if _ends_with(key, name)]
    rank, alpha = [*ranks, config.rank][0], [*alphas, config.alpha][0]
    if rank > (smallest := min(features(linear))):
        raise UserError(
            f"rank={rank} exceeds the {smallest} features of {name}: choose a smaller rank"
        )
    if alpha is None:
        return Target(name, linear, rank, 1.0)
    return Target(name, linear, rank, alpha / (sqrt(rank) if config.use_rslora else rank))


def endings(names: Iterable[str]) -> str:
    """The last parts of these module names, for a sentence."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"


def table_of(model: nn.Module) -> str:
    """The adapted modules, those of like name in one line: how many, their (outputs, inputs), rank
    and parameters.
    """
    sizes = defaultdict(list)
    for name, linear in adapted(model):
        kind = re.sub(r"(^|\.)\d+(?=\.)", r"\1N", name), features(linear), linear.lora.rank
        sizes[kind].append(sum(parameter.numel() for parameter in linear.lora.parameters()))
    width = max(len(name) for name, _, _ in sizes)
    lines = [
        f"{len(of):6} x  {name:{width}}  {outputs:5} x {inputs:<5}  rank {rank:<4} {sum(of):>12,}"
        for (name, (outputs, inputs), rank), of in sizes.items()
    ]
    count, total = sum(map(len, sizes.values())), sum(map(sum, sizes.values()))
    lines.append(f"{count:6} modules{total:>{width + 26},} parameters")
    return "\n".join(lines)
