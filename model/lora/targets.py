"""Which Linears of a model get a LoRA."""

import re
from collections import defaultdict
from collections.abc import Iterable
from math import prod

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
    layer matches nothing, for a tied head, and for a rank beyond a Linear's features. Prints what
    "square" and "all-linear" leave out for such a rank, and the matrices that are no Linear's.
    """
    found, wanted, head = linears(model), config.target_modules, output_head(model)
    if wanted in SHORTHANDS:
        names = [name for name, linear in found.items() if linear is not head]
    else:
        every = [base_name(n) for n, module in model.named_modules() if isinstance(module, Linear)]
        tied = [name for name in every if name not in found]
        names = _matching(list(found), wanted, "target_modules", tied)
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
    ranks = {name: config.rank_and_scaling(name)[0] for name in names}
    narrow = [name for name in names if ranks[name] > min(features(found[name]))]
    for name in narrow:
        # A shorthand names no module: unless a pattern does, what is too narrow is left out.
        if wanted not in SHORTHANDS or ranks[name] != config.rank or narrow == names:
            beyond = f"rank={ranks[name]} exceeds the {min(features(found[name]))} features"
            raise UserError(f"{beyond} of {name}: choose a smaller rank")
    if narrow:
        beyond = f"rank={config.rank} exceeds the features of {_kinds(narrow)}"
        print(f"note: {beyond}: left out, unless rank_pattern lowers it")
    targets = {name: found[name] for name in names if name not in narrow}
    if wanted == "all-linear":
        _note_other_matrices(model, found, targets)
    return targets


def _matching(names: list[str], words: str | tuple[str, ...], option: str, tied=()) -> list[str]:
    """The ``names`` that match ``words``. ``UserError`` for a word that matches none of them."""
    whole = isinstance(words, str)
    matches = {word: _hits(names, word, whole) for word in ([words] if whole else words)}
    if idle := [word for word, found in matches.items() if not found]:
        barred = [word for word in idle if _hits(tied, word, whole)]
        head = "names a head that is tied to the embedding, so it is never a target"
        why = head if barred else "matches nothing"
        said = f"{option}={', '.join(map(repr, barred or idle))} {why}"
        raise UserError(f"{said}; there are {endings(names)}")
    return [name for name in names if any(name in found for found in matches.values())]


def _hits(names: list[str], word: str, whole: bool) -> list[str]:
    """The ``names`` that ``word`` matches, as a list's word unless it is for ``whole`` names."""
    full = [name for name in names if re.fullmatch(word, name)]
    if whole:
        return full
    plain = [name for name in names if f".{name}".endswith(f".{word}")]
    return plain or full or [name for name in names if ends_with(name, word)]


def _note_other_matrices(model: nn.Module, found: dict[str, Linear], targets: dict) -> None:
    """Print the matrices that are no Linear's, as a mixture's experts are, if there are any."""
    known = [module for module in model.modules() if isinstance(module, Linear | nn.Embedding)]
    ids = {id(parameter) for module in known for parameter in module.parameters(recurse=False)}
    matrices = {n: p for n, p in model.named_parameters() if p.squeeze().ndim > 1}
    others = {n: p.numel() for n, p in matrices.items() if id(p) not in ids}
    if others:
        covered, every = (sum(prod(features(m)) for m in of.values()) for of in (targets, found))
        share = f"{covered / (every + sum(others.values())):.1%} of the weights in matrices"
        why = f"no Linear holds {_kinds(others)}, so they get no LoRA"
        can = f"target_modules can name {endings(found)}"
        print(f"note: the targets cover {share}, embeddings aside; {why}; {can}")


def _in_layers(names: list[str], wanted: tuple[int, ...]) -> list[str]:
    """Those of ``names`` without a number, or whose first is in ``wanted``; each must be found."""
    numbers = {name: re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names}
    layers = {name: int(number[1]) for name, number in numbers.items() if number}
    if missing := sorted(set(wanted) - set(layers.values())):
        there = ", ".join(map(str, sorted(set(layers.values())))) or "none"
        raise UserError(f"layers_to_transform {missing} match no target; there are layers {there}")
    return [name for name in names if name not in layers or layers[name] in wanted]


def endings(names: Iterable[str]) -> str:
    """The last parts of these module names, for a sentence."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"


def _kinds(names: Iterable[str]) -> str:
    """These names with N for a layer's number, each once."""
    return ", ".join(dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.)", r"\1N", name) for name in names))


def table_of(model: nn.Module) -> str:
    """The adapted modules as text: a line for those of like name, with shape, rank, parameters."""
    sizes = defaultdict(list)
    for name, linear in adapted(model):
        kind = _kinds([name]), features(linear), linear.lora.rank
        sizes[kind].append(sum(parameter.numel() for parameter in linear.lora.parameters()))
    width = max(len(name) for name, _, _ in sizes)
    lines = [
        f"{len(of):6} x  {name:{width}}  {outputs:5} x {inputs:<5}  rank {rank:<4} {sum(of):>12,}"
        for (name, (outputs, inputs), rank), of in sizes.items()
    ]
    count, total = sum(map(len, sizes.values())), sum(map(sum, sizes.values()))
    lines.append(f"{count:6} modules{total:>{width + 26},} parameters")
    return "\n".join(lines)
