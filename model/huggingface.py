"""Models of other makers: opening them as transformers does, and writing a folder of theirs."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging as library_logging

from core.errors import UserError, reason_of
from core.files import unfinished
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
    """Write a folder as transformers does; an old one stays until the new one is whole.

    Raises ``UserError`` when the disk refuses.
    """
    with unfinished(folder) as written:
        with quiet_library():
            model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        shutil.rmtree(folder, ignore_errors=True)
        written.rename(folder)


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
