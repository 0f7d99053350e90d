"""Which Linears of a model get a LoRA."""

import re
from collections import defaultdict
from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from core.errors import UserError
from model.lora.config import SHORTHANDS, LoRAConfig, ends_with
from model.lora.layer import Linear, adapted, base_name, features, lora_parameters


def check_receptive(model: nn.Module) -> None:
    """Raise ``UserError`` for a wrapper (``torch.compile``'s, DDP's), or if a LoRA is merged."""
    children = [name for name, _ in model.named_children()]
    if children in (["_orig_mod"], ["module"]):
        wrapper = f"{type(model).__name__} wraps the model that has the names"
        raise UserError(f"{wrapper}; pass that one, its .{children[0]}")
    if any("unmerged" in vars(module) for module in model.modules()):
        raise UserError("a LoRA is merged into this model; call unmerge_lora(model) first")


def linears(model: nn.Module) -> dict[str, Linear]:
    """Every Linear of the base, by name; none tied to an embedding, which it would drag along."""
    others = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    others |= {id(parameter) for parameter in lora_parameters(model)}
    return {
        base_name(name): module
        for name, module in model.named_modules()
        if name and isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in others
    }


def output_head(model: nn.Module) -> nn.Module | None:
    """The output head of a language model, tied or not; None for another model."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def choose_targets(model: nn.Module, config: LoRAConfig) -> dict[str, Linear]:
    """The Linears of ``model`` that ``config`` chooses, by name, in their order.

    Raises ``UserError``, which lists what could match, if nothing is left or a name, pattern or
    layer matches nothing, and for a rank beyond a Linear's features.
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
    if config.exclude_modules:
        excluded = _matching(names, config.exclude_modules, "exclude_modules")
        names = [name for name in names if name not in excluded]
    if config.layers_to_transform:
        names = _in_layers(names, config.layers_to_transform)
    if not names:
        raise UserError(f"exclude_modules={config.exclude_modules!r} leaves no target")
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, option):
            if not any(ends_with(name, key) for name in names):
                raise UserError(f"{option} {key!r} matches nothing; there are {endings(names)}")
    for name in names:
        rank, smallest = config.rank_and_scaling(name)[0], min(features(found[name]))
        if rank > smallest:
            beyond = f"rank={rank} exceeds the {smallest} features of {name}"
            raise UserError(f"{beyond}: choose a smaller rank")
    return {name: found[name] for name in names}


def _matching(names: Iterable[str], wanted: str | tuple[str, ...], option: str) -> list[str]:
    """The ``names`` that match ``wanted``. ``UserError`` for a word of it that matches nothing."""
    if isinstance(wanted, str):
        matches = {wanted: [name for name in names if re.fullmatch(wanted, name)]}
    else:
        matches = {w: [name for name in names if ends_with(name, re.escape(w))] for w in wanted}
    if idle := [repr(word) for word, found in matches.items() if not found]:
        raise UserError(f"{option}={', '.join(idle)} matches nothing; there are {endings(names)}")
    return [name for name in names if any(name in found for found in matches.values())]


def _in_layers(names: list[str], wanted: tuple[int, ...]) -> list[str]:
    """Those of ``names`` whose first number is in ``wanted``; each number must be found."""
    numbers = {name: re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names}
    layers = {name: int(number[1]) for name, number in numbers.items() if number}
    if missing := sorted(set(wanted) - set(layers.values())):
        there = ", ".join(map(str, sorted(set(layers.values())))) or "none"
        raise UserError(f"layers_to_transform {missing} match no target; there are layers {there}")
    return [name for name in names if layers.get(name) in wanted]


def endings(names: Iterable[str]) -> str:
    """The last parts of these module names, for a sentence."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"


def table_of(model: nn.Module) -> str:
    """The adapted modules as text: a line for those of like name, with shape, rank, parameters."""
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
