"""One dataclass is the only source of a command's flags, defaults and help."""

import argparse
import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from core.errors import UserError

T = TypeVar("T")

# Flags of MiniMind that are gone, and what to use instead.
RETIRED_FLAGS = {
    "--use_moe": "mixture-of-experts models are not supported; leave it out",
    "--ddp": "processes are found from the environment; leave it out",
    "--local_rank": "processes are found from the environment; leave it out",
    "--load": "a base file says itself what it is; use --base FILE",
    "--model_mode": "the base is chosen by file; use --base out/pretrain_512.pth or --base out/full_sft_512.pth",
}


def option(default: Any, help: str, positional: bool = False) -> Any:
    """A dataclass field that becomes the flag of the same name, or a required value without a
    flag.
    """
    return dataclasses.field(default=default, metadata={"help": help, "positional": positional})


def parse(options: type[T], argv: list[str] | None) -> T:
    """Parse ``argv`` (None: the process's own) into an instance of the dataclass ``options``.

    Supported types: bool (``--flag`` / ``--no-flag``), int, float, str, Path, ``Literal`` choices,
    any of these ``| None``, and ``tuple[Path, ...]`` or ``dict`` (one or more words). Of
    ``str | tuple[str, ...]`` a command line gives the tuple. Raises ``UserError`` for
    unknown, malformed, retired or contradicting flags; the class's ``__post_init__`` does the
    cross-checks. ``--help`` prints and exits 0.
    """
    hints = typing.get_type_hints(options)
    parser = _Parser(
        description=(options.__doc__ or "").strip(),
        allow_abbrev=False,
        formatter_class=argparse.HelpFormatter,
    )
    for field in dataclasses.fields(options):
        _add_flag(parser, field, hints[field.name])
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [
            f"--{field.name}" for field in dataclasses.fields(options) if not _is_positional(field)
        ]
        raise UserError(_explain_unknown(unknown[0], flags))
    return options(**vars(parsed))


def require(condition: bool, message: str) -> None:
    """Raise ``UserError(message)`` unless ``condition`` holds; for the cross-checks in
    ``__post_init__``.
    """
    if not condition:
        raise UserError(message)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see --help")


class _StoreTuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        if (
            getattr(namespace, self.dest) is not self.default
        ):  # whether to add or to replace can only be guessed
            parser.error(f"{option_string} is given twice: write all its values after one")
        setattr(namespace, self.dest, tuple(values))


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any) -> None:
    hint, optional = _strip_none(hint)
    several = typing.get_origin(hint) in (tuple, dict)
    hint = typing.get_args(hint)[0] if several else hint
    default = " ".join(map(str, field.default)) if several else field.default
    shown = "" if default in (None, "") else f" (default: {default})"
    settings: dict[str, Any] = {
        "default": field.default,
        "help": (field.metadata["help"] + shown).replace("%", "%%"),
    }
    if hint is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(hint) is Literal:
        settings["choices"] = typing.get_args(hint)
    else:
        settings["type"] = _int if hint is int else hint
        kind = {int: "N", float: "X", str: "TEXT", Path: "PATH"}[hint]
        settings["metavar"] = field.name if _is_positional(field) else kind
    if several:
        settings |= {"nargs": "+", "action": _StoreTuple}
    assert optional or field.default is not None, (
        f"--{field.name} defaults to None without saying so"
    )
    parser.add_argument(field.name if _is_positional(field) else f"--{field.name}", **settings)


def _is_positional(field: dataclasses.Field) -> bool:
    return field.metadata.get("positional", False)


def _int(text: str) -> int:
    """``1_000`` is a Python habit, ``1e3`` a numerical one; a flag takes plain digits only."""
    if not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _strip_none(hint: Any) -> tuple[Any, bool]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kept = [part for part in typing.get_args(hint) if part is not type(None)]
        several = [part for part in kept if typing.get_origin(part) is tuple]
        assert len(several or kept) == 1, hint
        return (several or kept)[0], type(None) in typing.get_args(hint)
    return hint, False


def _explain_unknown(argument: str, known: list[str]) -> str:
    flag = argument.partition("=")[0]
    if flag in RETIRED_FLAGS:
        return f"{flag} is gone: {RETIRED_FLAGS[flag]}"
    if not flag.startswith("-"):
        return f"unexpected argument {argument!r}: values follow a flag; see --help"
    close = difflib.get_close_matches(flag, known, n=1, cutoff=0.75)
    return f"unknown flag {flag}" + (f"; did you mean {close[0]}?" if close else "; see --help")
