"""Models of other makers: opening them as transformers does, and writing a folder of theirs."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging as library_logging

from core.errors import UserError, reason_of
from core.options import require


def open_causal(base: Path) -> nn.Module:
    """The fp32 causal language model of a folder or hub name, in eval mode, or ``UserError``."""
    model, missing = load_pretrained(AutoModelForCausalLM, base, "causal language model")
    fault = f"lacks {', '.join(missing[:3])}" if missing else ""
    if not fault and _looks_ahead(model.eval()):
        fault = "sees the tokens that it would have to predict"
    require(not fault, f"base {base} {fault}: it is no causal language model")
    return model


@torch.no_grad()
def _looks_ahead(model: nn.Module) -> bool:
    """Whether a later token moves earlier logits beyond rounding, as in masked language models."""
    # One sequence at a time, so that both are computed by the same sums in the same order.
    sequences = [torch.tensor([[0, 0, 0, last]]) for last in (0, 1)]
    one, other = (model(input_ids=ids, use_cache=False).logits[:, :-1] for ids in sequences)
    return bool((one - other).abs().max() > 1e-4 * one.abs().max())


def load_pretrained(kind: Any, base: Path, called: str, **settings) -> tuple[nn.Module, list[str]]:
    """The fp32 model of a Hugging Face auto class, and the names of parameters its files lack.

    ``UserError`` says that ``base`` is no such ``called``.
    """
    try:
        with quiet_library():  # the caller reports what is missing
            settings |= {"dtype": torch.float32, "output_loading_info": True}
            model, report = kind.from_pretrained(base.as_posix(), **settings)
    except Exception as error:  # a file, the network or the library's own checks: many kinds
        reason = reason_of(error)
        raise UserError(f"base {base} is no {called} that can be loaded ({reason})") from error
    mismatched = {name for name, *_ in report["mismatched_keys"]}
    return model, sorted({*report["missing_keys"], *mismatched})


def save_folder(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder as transformers does. Raises ``UserError`` as ``write_folder`` does."""

    def write(folder: Path) -> None:
        with quiet_library():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    write_folder(folder, write)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a folder; an old one stays until it is whole. ``UserError`` if refused."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
        unfinished.mkdir(parents=True)
        write(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except Exception as error:  # the disk's refusals, some in the library's own kind
        reason = getattr(error, "strerror", None) or reason_of(error)
        way_out = "make room there or choose another folder"
        raise UserError(f"cannot write {folder}: {reason}; {way_out}") from error


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """Inside, transformers prints neither tables nor progress bars."""
    verbosity, has_bars = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        library_logging.set_verbosity(verbosity)
        if has_bars:
            library_logging.enable_progress_bar()
