"""One dataclass is the only source of a command's flags, defaults, bounds and help."""

import argparse
import dataclasses
import difflib
import functools
import inspect
import typing
from math import inf
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from core.errors import UserError

T = TypeVar("T")

GROUPS = ("most used", "data", "skill", "training", "run", "device")  # the order of --help
BOUNDS = {"at_least": ge, "at_most": le, "above": gt, "below": lt}
# Flags of MiniMind that are gone, and what to use instead.
RETIRED_FLAGS = {
    "--use_moe": "mixture-of-experts models are not supported; leave it out",
    "--ddp": "processes are found from the environment; leave it out",
    "--local_rank": "processes are found from the environment; leave it out",
    "--load": "a base file says itself what it is; use --base FILE",
    "--model_mode": "the base is chosen by file; use --base out/pretrain_512.pth or"
    " --base out/full_sft_512.pth",
}


def option(default: Any, help: str, *, group: str = "", positional=False, **bounds: float) -> Any:
    """A dataclass field that becomes the flag of the same name, or a required value without a flag.

    ``--help`` lists it under the heading ``group``, one of ``GROUPS``. ``bounds`` are any of
    ``at_least``, ``at_most``, ``above`` and ``below``; a number that has one must also be finite. A
    subclass may declare the field again, as ``epochs: int = 20`` or ``option(20, "other help")``:
    it inherits whatever it does not state.
    """
    assert group in ("", *GROUPS) and bounds.keys() <= BOUNDS.keys(), (group, bounds)
    stated = {"help": help, "positional": positional, **({"group": group} if group else {})}
    return dataclasses.field(default=default, metadata={**stated, **bounds})


@dataclasses.dataclass
class CheckedOptions:
    """Base class of options that check themselves, whether a command line or a program makes them.

    Raises ``UserError``, which names the option, for a number outside its bounds and for a value
    that is none of the ``Literal`` choices. A subclass with checks of its own calls
    ``super().__post_init__()`` in its ``__post_init__``.
    """

    def __post_init__(self) -> None:
        for name, declared in _declarations(type(self)).items():
            value = getattr(self, name)
            if value is not None or not declared["optional"]:
                wanted = _broken_rule(value, declared)
                require(not wanted, f"{name}={value!r} must be {wanted}")


def require(condition: bool, message: str) -> None:
    """Raise ``UserError(message)`` unless ``condition`` holds; for checks in ``__post_init__``."""
    if not condition:
        raise UserError(message)


def parse(options: type[T], argv: list[str] | None) -> T:
    """Parse ``argv`` (None: the process's own) into an instance of the dataclass ``options``.

    Supported types: bool (``--flag`` / ``--no-flag``), int, float, str, Path, ``Literal`` choices,
    any of these ``| None``, and tuples of them or a dict (one or more values; of ``str |
    tuple[str, ...]`` the tuple). Raises ``UserError`` for unknown, malformed, retired or
    contradicting flags. ``--help`` prints and exits 0.
    """
    declarations = _declarations(options)
    positional = [name for name, declared in declarations.items() if declared["positional"]]
    parser = _Parser(
        usage=" ".join(["%(prog)s", *positional, "[--flag VALUE ...]"]),
        description=(options.__doc__ or "").strip(),
        allow_abbrev=False,
    )
    for group in ("", *GROUPS):
        names = [name for name, found in declarations.items() if found.get("group", "") == group]
        section = parser.add_argument_group(group) if group and names else parser
        for name in names:
            _add_flag(section, name, declarations[name])
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [f"--{name}" for name in declarations if name not in positional]
        raise UserError(_explain_unknown(unknown[0], flags))
    return options(**vars(parsed))


@functools.cache
def _declarations(options: type) -> dict[str, dict[str, Any]]:
    """What the dataclass states of each option, its default and its type; those that the most
    derived class declares come first.
    """
    hints = typing.get_type_hints(options)
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    found: dict[str, dict[str, Any]] = {}
    for owner in options.__mro__:
        fields = vars(owner).get("__dataclass_fields__", {})
        for name in inspect.get_annotations(owner):
            if name in defaults and name in fields:
                found[name] = {**fields[name].metadata, **found.get(name, {})}
    for name, declared in found.items():
        kinds = typing.get_args(hints[name])
        optional = type(None) in kinds
        hint = kinds[kinds[0] is type(None)] if optional else hints[name]
        declared |= {"type": hint, "optional": optional, "default": defaults[name]}
        bounded = not BOUNDS.keys().isdisjoint(declared)
        assert not bounded or issubclass(options, CheckedOptions), f"nobody checks {name}"
    return found


def _broken_rule(value: Any, declared: dict[str, Any]) -> str:
    """What ``value`` would have to be; "" when it is."""
    if typing.get_origin(declared["type"]) is Literal:
        choices = typing.get_args(declared["type"])
        return "" if value in choices else f"one of {', '.join(map(str, choices))}"
    bounds = {name: bound for name, bound in declared.items() if name in BOUNDS}
    if not bounds:
        return ""
    kinds, noun = ((int,), "whole") if declared["type"] is int else ((int, float), "finite")
    if isinstance(value, bool) or not isinstance(value, kinds) or not -inf < value < inf:
        return f"a {noun} number"
    if all(BOUNDS[name](value, bound) for name, bound in bounds.items()):
        return ""
    return " and ".join(f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see --help")


class _StoreTuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        # Whether to add to the earlier values or to replace them can only be guessed.
        if getattr(namespace, self.dest) is not self.default:
            parser.error(f"{option_string} is given twice: write all its values after one")
        setattr(namespace, self.dest, tuple(values))


def _add_flag(section: argparse._ActionsContainer, name: str, declared: dict[str, Any]) -> None:
    hint, default = declared["type"], declared["default"]
    tuples = [kind for kind in typing.get_args(hint) if typing.get_origin(kind) is tuple]
    hint = tuples[0] if tuples else hint
    several = typing.get_origin(hint) in (tuple, dict)
    hint = typing.get_args(hint)[0] if several else hint
    shown = " ".join(map(str, default)) if several else default
    help_text = declared["help"] + ("" if shown in (None, "") else f" (default: {shown})")
    settings: dict[str, Any] = {"default": default, "help": help_text.replace("%", "%%")}
    if hint is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(hint) is Literal:
        settings["choices"] = typing.get_args(hint)
    else:
        settings["type"] = _int if hint is int else hint
        kind = {int: "N", float: "X", str: "TEXT", Path: "PATH"}[hint]
        settings["metavar"] = name if declared["positional"] else kind
    if several:
        settings |= {"nargs": "+", "action": _StoreTuple}
    section.add_argument(name if declared["positional"] else f"--{name}", **settings)


def _int(text: str) -> int:
    """``1_000`` is a Python habit, ``1e3`` a numerical one; a flag takes plain digits only."""
    if not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _explain_unknown(argument: str, known: list[str]) -> str:
    flag = argument.partition("=")[0]
    if flag in RETIRED_FLAGS:
        return f"{flag} is gone: {RETIRED_FLAGS[flag]}"
    if not flag.startswith("-"):
        return f"unexpected argument {argument!r}: values follow a flag; see --help"
    close = difflib.get_close_matches(flag, known, n=1, cutoff=0.75)
    return f"unknown flag {flag}" + (f"; did you mean {close[0]}?" if close else "; see --help")
