"""Which LoRA to add. Standard library only, so that a door can print its help at once."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import Literal

from core.errors import UserError
from core.options import CheckedOptions, option, require

SHORTHANDS = ("square", "all-linear")
Init = Literal["minimind", "kaiming", "gaussian", "pissa"]
TARGETS_HELP = "square, all-linear, or names, name endings or regular expressions of Linears"
EXCLUDE_HELP = "names, name endings or regular expressions to leave out"
ALPHA_HELP = "the update is scaled by alpha / rank (default: a scale of 1)"
DROPOUT_HELP = "probability of dropping an input of the update"
INIT_HELP = "A ~ N(0, 0.02), U(+-1/sqrt(inputs)), N(0, 1/rank), or A and B from W's SVD"


@dataclass
class LoRAConfig(CheckedOptions):
    """Names and meanings are PEFT's, the defaults are MiniMind's.

    ``target_modules`` and ``exclude_modules``: a string is a regular expression for whole module
    names; in a list, a word that is no name or name ending of a module is an expression for whole
    names, or else for name endings. Targets may also be "square" (as many inputs as outputs) or
    "all-linear" (all but the output head). ``layers_to_transform`` keeps modules outside layers.
    ``rank_pattern`` and ``alpha_pattern``: a dict, or ``key=value`` words, with a number for each
    name ending, which may be a regular expression; the first match counts. Raises ``UserError`` for
    values that no LoRA can have.
    """

    rank: int = option(16, "rank of the update", group="most used", at_least=1)
    alpha: float | None = option(None, ALPHA_HELP, above=0, group="skill")
    target_modules: str | tuple[str, ...] = option(("square",), TARGETS_HELP, group="skill")
    exclude_modules: str | tuple[str, ...] = option((), EXCLUDE_HELP, group="skill")
    layers_to_transform: tuple[int, ...] = option((), "which layers (default: all)", group="skill")
    rank_pattern: dict[str, int] = option((), "ranks by name: wo=4 'layers.7.*=32'", group="skill")
    alpha_pattern: dict[str, float] = option((), "alphas by name", group="skill")
    use_rslora: bool = option(False, "scale by alpha / sqrt(rank)", group="skill")
    use_dora: bool = option(False, "learn magnitudes apart from directions (DoRA)", group="skill")
    lora_dropout: float = option(0.0, DROPOUT_HELP, at_least=0, below=1, group="skill")
    init_lora_weights: Init = option("minimind", INIT_HELP, group="skill")

    def __post_init__(self):
        super().__post_init__()
        self.target_modules = _names(self.target_modules or ())
        self.exclude_modules = _names(self.exclude_modules or ())
        if self.exclude_modules in SHORTHANDS:
            wrong = f"exclude_modules={self.exclude_modules} is no name of a module"
            raise UserError(f"{wrong}; it is a choice of target_modules")
        layers = self.layers_to_transform
        self.layers_to_transform = (layers,) if isinstance(layers, int) else tuple(layers or ())
        self.rank_pattern = _numbers("rank_pattern", self.rank_pattern, int)
        self.alpha_pattern = _numbers("alpha_pattern", self.alpha_pattern, float)
        if self.use_rslora and self.alpha is None and not self.alpha_pattern:
            raise UserError("use_rslora changes what alpha is divided by: give an alpha")
        if self.use_dora and self.init_lora_weights == "pissa":
            raise UserError("use_dora and init_lora_weights=pissa exclude each other: choose one")

    def rank_and_scaling(self, name: str) -> tuple[int, float]:
        """Rank and scale for module ``name``; alpha / sqrt(rank) is Kalajdzievski's (2023)."""
        ranks = [rank for key, rank in self.rank_pattern.items() if ends_with(name, key)]
        alphas = [alpha for key, alpha in self.alpha_pattern.items() if ends_with(name, key)]
        rank, alpha = [*ranks, self.rank][0], [*alphas, self.alpha][0]
        divisor = sqrt(rank) if self.use_rslora else rank
        return rank, 1.0 if alpha is None else alpha / divisor


def ends_with(name: str, key: str) -> bool:
    """Whether a module's ``name`` is, or ends in, what the regular expression ``key`` matches."""
    pattern = re.compile(key)  # unwrapped, so that its flags and group numbers stay valid
    return any(pattern.fullmatch(name, dot.end()) for dot in re.finditer(r"^|\.", name))


def _names(words: str | Sequence[str]) -> str | tuple[str, ...]:
    """A shorthand, in any case, or a regular expression as a string; a list as a tuple."""
    several = (words,) if isinstance(words, str) else tuple(words)
    if len(several) == 1 and several[0].lower() in SHORTHANDS:
        return several[0].lower()
    for word in several:
        _check_expression(word)
    return words if isinstance(words, str) else several


def _numbers(name: str, words: Mapping | Sequence[str], number: type) -> dict[str, float]:
    """One or more ``key=value`` words, or a dict already, as a dict of positive numbers."""
    if isinstance(words, Mapping):
        words = [f"{key}={value}" for key, value in words.items()]
    found = {}
    for word in [words] if isinstance(words, str) else words:
        key, _, value = word.rpartition("=")
        require(key not in found, f"{name} has {key!r} twice: keep one of them")
        try:
            found[key] = number(value)
        except ValueError:
            found[key] = 0
        positive = bool(key) and 0 < found[key] < inf
        require(positive, f"{name} {word!r} must be NAME=NUMBER above 0, such as wo=4")
        _check_expression(key)
    return found


def _check_expression(text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise UserError(f"{text!r} is no regular expression: {error}") from error
