"""Which LoRA to add: the keywords of ``apply_lora``, which are also options of the doors.

Standard library only, so that a door can print its help at once.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal, get_args

from core.errors import UserError
from core.options import option, require

SHORTHANDS = ("square", "all-linear")
Init = Literal["minimind", "kaiming", "gaussian", "pissa"]


@dataclass
class LoRAConfig:
    """Names and meanings are PEFT's, the defaults are MiniMind's.

    ``target_modules`` and ``exclude_modules``: a list of names or name endings, or, as a string, a
    regular expression for whole module names; targets also "square" (as many inputs as outputs) or
    "all-linear" (all but the output head). A list of one word with regular-expression signs is one
    too. ``rank_pattern`` and ``alpha_pattern``: a number for each name ending, which may be a
    regular expression; the first match counts; ``key=value`` words become the dict. Raises
    ``UserError`` for values that no LoRA can have.
    """

    rank: int = option(16, "rank of the update")
    alpha: float | None = option(
        None, "the update is scaled by alpha / rank (default: a scale of 1)"
    )
    target_modules: str | tuple[str, ...] = option(
        ("square",),
        "square, all-linear, names or name endings of Linear layers, or one regular expression",
    )
    exclude_modules: str | tuple[str, ...] = option(
        (), "names or name endings to leave out, or one regular expression"
    )
    layers_to_transform: tuple[int, ...] = option(
        (), "numbers of the layers to adapt (default: all)"
    )
    rank_pattern: dict[str, int] = option((), "other ranks for some names: wo=4 'layers.7.*=32'")
    alpha_pattern: dict[str, float] = option((), "other alphas for some names")
    use_rslora: bool = option(False, "scale by alpha / sqrt(rank)")
    use_dora: bool = option(False, "learn each output's magnitude apart from its direction (DoRA)")
    lora_dropout: float = option(
        0.0, "probability that an input of the update is left out in training"
    )
    init_lora_weights: Init = option(
        "minimind",
        "A starts from N(0, 0.02), U(+-1/sqrt(inputs)) or N(0, 1/rank) and B at 0; pissa: from W's SVD",
    )

    def __post_init__(self):
        self.target_modules = _names(self.target_modules or ())
        self.exclude_modules = _names(self.exclude_modules or ())
        require(
            self.exclude_modules not in SHORTHANDS,
            f"exclude_modules={self.exclude_modules} is no name of a module; it is for target_modules",
        )
        layers = self.layers_to_transform
        self.layers_to_transform = (layers,) if isinstance(layers, int) else tuple(layers or ())
        self.rank_pattern = _numbers("rank_pattern", self.rank_pattern, int)
        self.alpha_pattern = _numbers("alpha_pattern", self.alpha_pattern, float)
        for rank in (self.rank, *self.rank_pattern.values()):
            whole = isinstance(rank, int) and not isinstance(rank, bool)
            require(whole and rank >= 1, f"rank={rank} must be at least 1, a whole number")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            positive = isinstance(alpha, int | float) and 0 < alpha < inf
            require(alpha is None or positive, f"alpha={alpha} must be a positive number")
        scaled = self.alpha is not None or bool(self.alpha_pattern)
        require(
            scaled or not self.use_rslora,
            "use_rslora changes what alpha is divided by: give an alpha",
        )
        dropout = self.lora_dropout
        in_range = isinstance(dropout, int | float) and 0 <= dropout < 1
        require(in_range, f"lora_dropout={dropout} must lie in [0, 1)")
        init = self.init_lora_weights
        require(
            init in get_args(Init),
            f"init_lora_weights={init!r} must be one of {', '.join(get_args(Init))}",
        )
        pissa_dora = self.use_dora and self.init_lora_weights == "pissa"
        require(
            not pissa_dora, "use_dora and init_lora_weights=pissa exclude each other: choose one"
        )


def _names(words: str | Sequence[str]) -> str | tuple[str, ...]:
    """A shorthand or a regular expression as a string, names as a tuple."""
    if not isinstance(words, str):
        words = tuple(words)
        require(
            all(isinstance(word, str) for word in words),
            f"{words} are no names of modules: they must be texts",
        )
        if len(words) != 1 or (words[0] not in SHORTHANDS and re.fullmatch(r"[\w.]*", words[0])):
            return words
        (words,) = words
    if words not in SHORTHANDS:
        _check_expression(words)
    return words


def _numbers(
    name: str, words: Mapping[str, float] | Sequence[str], number: type
) -> dict[str, float]:
    """``key=value`` words, or a dict already, as a dict."""
    if isinstance(words, Mapping):
        words = [f"{key}={value}" for key, value in words.items()]
    found = {}
    for word in words:
        key, _, value = word.rpartition("=")
        require(key not in found, f"{name} has {key!r} twice: keep one of them")
        try:
            found[key] = number(value)
        except ValueError:
            key = ""
        require(bool(key), f"{name} {word!r} must be NAME=NUMBER, such as wo=4")
        _check_expression(key)
    return found


def _check_expression(text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise UserError(f"{text!r} is no regular expression: {error}") from error
