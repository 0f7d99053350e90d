"""Which base is used, and how it is opened: a file of ours, or a causal language model of Hugging
Face.
"""

import contextlib
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging as library_logging

from core.errors import UserError, reason_of
from core.paths import STAGES, pretrained_name
from model.weights import fingerprint, load_base, read_record

PRETRAINED = "pretrained elsewhere"  # the stage in the record of a Hugging Face base


def choose_base(
    out_dir: str | Path,
    named: Path | None = None,
    skill_base: dict | None = None,
    stages: Iterable[str] = STAGES,
) -> Path:
    """The base to use: the one ``named``; else the file that is ``skill_base``, a skill's
    ``_meta["base"]``; else the newest file.

    The newest of the latest of ``stages`` that there is in ``out_dir``. Raises ``UserError`` when
    there is none.
    """
    if named is not None:
        if not named.is_file() and not is_pretrained(named):
            wrong = "is a folder without config.json" if named.is_dir() else "does not exist"
            raise UserError(
                f"--base {named} {wrong}; name a base file, a Hugging Face folder or owner/model"
            )
        return named
    folder, wanted = Path(out_dir), (skill_base or {}).get("fingerprint")
    if wanted is not None:
        for path in sorted(folder.glob("*.pth")):
            with contextlib.suppress(
                UserError
            ):  # a broken record of another base is no reason to stop
                if read_record(path).get("fingerprint") == wanted:
                    return path
    for stage in reversed(list(stages)):
        files = (
            path for path in folder.glob(f"{stage}_*.pth") if path.is_file()
        )  # a link may lead nowhere
        found = sorted(files, key=lambda path: path.stat().st_mtime_ns)
        if found:
            return found[-1]
    there = f"no base model {' or '.join(f'{s}_*.pth' for s in stages)} in {folder}"
    if file := (skill_base or {}).get("file"):
        raise UserError(
            f"there is {there}; the skill was trained on {file}: name that one with --base"
        )
    raise UserError(f"{there}; train one or pass --base")


def is_pretrained(base: Path) -> bool:
    """Whether this names a Hugging Face model: a folder with a config.json, or ``owner/model`` on
    the hub.
    """
    if base.exists() or (base.parent.exists() and base.parent != Path()):
        return (base / "config.json").is_file()
    return re.fullmatch(r"[\w.-]+/[\w.-]+", base.as_posix()) is not None and base.suffix != ".pth"


def open_base(base: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """The model in eval mode on ``device``, and its record: ``load_base``'s for a file of ours.

    A Hugging Face model is fp32; its record holds ``stage``, ``config`` (vocab_size) and
    ``fingerprint``. Raises ``UserError`` for what cannot be loaded.
    """
    if not is_pretrained(base):
        return load_base(base, device)
    model, missing = load_pretrained(AutoModelForCausalLM, base, "causal language model")
    if missing:
        raise UserError(
            f"--base {base} lacks {', '.join(missing[:3])}: it is no causal language model"
        )
    if _looks_ahead(model.eval()):
        raise UserError(
            f"--base {base} sees the tokens that it would have to predict: it is no causal language model"
        )
    weights = fingerprint(model.named_parameters(), model.config)
    record = {
        "stage": PRETRAINED,
        "config": {"vocab_size": model.config.vocab_size},
        "fingerprint": weights,
    }
    return model.to(device), record


@torch.no_grad()
def _looks_ahead(model: nn.Module) -> bool:
    """Whether a later token moves earlier logits, beyond rounding: so it is in masked language
    models.
    """
    # Apart, so that both are computed by the same sums in the same order.
    one, other = (
        model(input_ids=torch.tensor([[0, 0, 0, n]]), use_cache=False).logits[:, :-1]
        for n in (0, 1)
    )
    return bool((one - other).abs().max() > 1e-4 * one.abs().max())


def load_pretrained(
    kind: Any, base: Path, called: str, **settings: Any
) -> tuple[nn.Module, list[str]]:
    """The fp32 model of a Hugging Face auto class, and which of its parameters are drawn: the files
    lack them.

    Raises ``UserError`` if it cannot be loaded as what is ``called`` so.
    """
    try:
        with quiet_library():  # what is missing is the caller's to say
            settings |= {"dtype": torch.float32, "output_loading_info": True}
            model, report = kind.from_pretrained(pretrained_name(base), **settings)
    except Exception as error:  # a file, the network or the library's own checks: many kinds
        raise UserError(
            f"--base {base} is no {called} that can be loaded ({reason_of(error)})"
        ) from error
    return model, sorted(
        {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    )


def save_folder(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a Hugging Face folder, in place of one that may be there, which stays until the new one
    is whole.

    Raises ``UserError`` when the disk refuses.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # of one that was killed
        unfinished.mkdir(parents=True)
        with quiet_library():
            model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except Exception as error:  # the disk's refusals, some in the library's own kind
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise UserError(
            f"cannot write {folder}: {reason}; make room there or choose another folder"
        ) from error


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """Neither tables nor progress bars of transformers."""
    verbosity, has_bars = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        library_logging.set_verbosity(verbosity)
        if has_bars:
            library_logging.enable_progress_bar()
