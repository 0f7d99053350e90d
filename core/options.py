"""One dataclass is the only source of a command's flags, defaults, bounds and help."""

import argparse
import dataclasses
import difflib
import functools
import inspect
import re
import types
import typing
from math import inf
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, NoReturn, TypeVar

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
    "--model_mode": "the base is chosen by file; use --base out/full_sft_512.pth, for example",
}


def option(default: Any, help: str, **stated: Any) -> Any:
    """A dataclass field that becomes the flag of the same name, or of the name ``flag``.

    ``group`` is its heading in --help, one of ``GROUPS``; ``positional=True`` makes it a required
    value without a flag. ``at_least``, ``at_most``, ``above`` and ``below`` bound a number, which
    must then be finite. A subclass may declare the field again, as ``epochs: int = 20`` or
    ``option(20, "other help")``: it inherits whatever it does not state.
    """
    assert stated.get("group", GROUPS[0]) in GROUPS, stated
    assert stated.keys() <= {"group", "positional", "flag", *BOUNDS}, stated
    return dataclasses.field(default=default, metadata={"help": help, **stated})


@dataclasses.dataclass
class CheckedOptions:
    """Options that check themselves: ``UserError`` for a value outside its bounds or choices."""

    def __post_init__(self) -> None:
        for name, declared in _declarations(type(self)).items():
            value, choices = getattr(self, name), declared["choices"]
            if value is None and declared["optional"]:
                continue
            said = f"{name}={value!r} must be"
            if choices:
                require(value in choices, f"{said} one of {', '.join(map(str, choices))}")
            bounds = {rule: declared[rule] for rule in BOUNDS if rule in declared}
            if bounds:
                whole = declared["kind"] is int
                is_number = isinstance(value, int if whole else (int, float))
                if isinstance(value, bool) or not is_number or not -inf < value < inf:
                    raise UserError(f"{said} a {'whole' if whole else 'finite'} number")
                met = all(BOUNDS[rule](value, bound) for rule, bound in bounds.items())
                words = [f"{rule.replace('_', ' ')} {bound}" for rule, bound in bounds.items()]
                require(met, f"{said} {' and '.join(words)}")


def require(condition: bool, message: str) -> None:
    """Raise ``UserError(message)`` unless ``condition`` holds; for checks in ``__post_init__``."""
    if not condition:
        raise UserError(message)


def parse(options: type[T], argv: list[str] | None) -> T:
    """Parse ``argv`` (None: the process's own) into an instance of the dataclass ``options``.

    Supported types: bool (``--flag`` / ``--no-flag``), int, float, str, Path, ``Literal`` choices,
    tuples of them or a dict (one or more values), and unions with None. Raises ``UserError`` for
    unknown, malformed, retired or contradicting flags. ``--help`` prints and exits 0.
    """
    return options(**given(options, argv))


def given(options: type, argv: list[str] | None) -> dict[str, Any]:
    """What ``argv`` itself says, by option, without any default; else as ``parse``."""
    parser = _Parser(description=(options.__doc__ or "").strip(), allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    sections = {group: parser.add_argument_group(group) for group in GROUPS}
    positional, declarations = [], _declarations(options)
    for name, declared in declarations.items():
        kind, default = declared["kind"], declared["default"]
        shown = " ".join(map(str, default)) if declared["several"] else default
        said = declared["help"] + ("" if shown in (None, "") else f" (default: {shown})")
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": said.replace("%", "%%")}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif declared["choices"]:
            settings["choices"] = declared["choices"]
        else:
            metavar = {int: "N", float: "X", str: "TEXT", Path: "PATH"}[kind]
            settings |= {"type": {int: _int, Path: _path}.get(kind, kind), "metavar": metavar}
        if declared["several"]:
            settings |= {"nargs": "+", "action": _StoreTuple}
        flag = f"--{declared.get('flag', name)}"
        section = sections.get(declared.get("group"), parser)
        if declared.get("positional"):
            positional.append(name)
            flag, settings["metavar"] = name, name
        else:
            settings["dest"] = name
        section.add_argument(flag, **settings)
    parser.usage = " ".join(["%(prog)s", *positional, "[--flag VALUE ...]"])
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        known = declarations.items()
        flags = [f"--{d.get('flag', name)}" for name, d in known if name not in positional]
        raise UserError(_explain_unknown(unknown[0], flags))
    return vars(parsed)


@functools.cache
def _declarations(options: type) -> dict[str, dict[str, Any]]:
    """What the dataclass states of each option, with its default and what its type says.

    The options that the most derived class declares come first. Of a union the last type that is
    not None counts, of a tuple or a dict the first: ``str | tuple[str, ...]`` is ``several`` str.
    """
    found: dict[str, dict[str, Any]] = {}
    for owner in options.__mro__:
        for name in inspect.get_annotations(owner):
            stated = owner.__dataclass_fields__[name].metadata
            found[name] = {**stated, **found.get(name, {})}
    for field in dataclasses.fields(options):
        is_union = typing.get_origin(field.type) in (types.UnionType, typing.Union)
        members = typing.get_args(field.type) if is_union else (field.type,)
        kind = [member for member in members if member is not type(None)][-1]
        several = typing.get_origin(kind) in (tuple, dict)
        kind = typing.get_args(kind)[0] if several else kind
        choices = typing.get_args(kind)  # of a Literal; the other types have none
        found[field.name] |= {"kind": kind, "several": several, "choices": choices}
        found[field.name] |= {"default": field.default, "optional": type(None) in members}
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see --help")


class _StoreTuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        # Whether to add to the earlier values or to replace them can only be guessed.
        if hasattr(namespace, self.dest):
            parser.error(f"{option_string} is given twice: write all its values after one")
        setattr(namespace, self.dest, tuple(values))


def _int(text: str) -> int:
    """``1_000`` is a Python habit, ``1e3`` a numerical one; a flag takes plain digits only."""
    if not re.fullmatch("-?[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _path(text: str) -> Path:
    """An empty text, as of an unset shell variable, would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty; name a file or folder, such as .")
    return Path(text)


def _explain_unknown(argument: str, known: list[str]) -> str:
    flag = argument.partition("=")[0]
    if flag in RETIRED_FLAGS:
        return f"{flag} is gone: {RETIRED_FLAGS[flag]}"
    if not flag.startswith("-"):
        return f"unexpected argument {argument!r}: values follow a flag; see --help"
    close = difflib.get_close_matches(flag, known, n=1, cutoff=0.75)
    return f"unknown flag {flag}" + (f"; did you mean {close[0]}?" if close else "; see --help")
