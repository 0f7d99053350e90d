"""Run states on disk: folders ``step-N`` that are whole or absent, and whose every bit is checked
when they are read.

The order of a save: files written and fsynced in a folder of another name, that folder renamed, its
parent fsynced, older states renamed away and deleted. A kill at any point leaves the states of
before or the new one; only those of a run that another one replaces go a moment earlier.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from core.errors import UserError
from core.files import fsync_folder, set_ordinary_mode, sha256_file

TENSORS, MANIFEST, METRICS = FILES = "state.safetensors", "manifest.json", "metrics.jsonl"
SUMS = "SHA256SUMS"  # `sha256sum --check SHA256SUMS` checks a state by hand
KEPT = 2


@dataclass(frozen=True)
class State:
    """What one ``step-N`` folder holds; ``metrics`` are the lines of the metrics file up to that
    step.
    """

    path: Path
    manifest: dict
    tensors: dict[str, Tensor]
    metrics: str


class _Damaged(Exception):
    pass


def saved_states(folder: Path) -> list[tuple[int, Path]]:
    """``(step, path)`` of the states in ``folder``, whole or damaged, the newest first."""
    found = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*")]
    return sorted(
        ((int(match[1]), path) for match, path in found if match and path.is_dir()), reverse=True
    )


def newest_state(folder: Path) -> State | None:
    """The newest state that is whole, with a printed line for each damaged one; None when there are
    no states.

    Raises ``UserError`` when all are damaged, or when one is there but may not be read.
    """
    states = saved_states(folder)
    for _, path in states:
        try:
            return _read(path)
        except _Damaged as damage:
            print(f"warning: state {path} is damaged ({damage}) and is passed over")
    if states:
        raise UserError(
            f"no state in {folder} can be used: all are damaged; start again without --resume"
        )
    return None


def planned_steps(path: Path) -> int | None:
    """How many optimizer steps the run of a state was to have; None if the state does not say."""
    try:
        return json.loads((path / MANIFEST).read_text(encoding="utf-8"))["total_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_state(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    manifest: dict,
    metrics: str,
    *,
    starts_over: bool,
) -> None:
    """Write ``folder``/step-N, then delete all but the newest two.

    ``starts_over``: the states in ``folder`` are another run's; they go just before the new one
    takes its name, and a kill in between leaves none. So do states of later steps, which a resume
    has passed over as damaged. Raises ``UserError`` when the disk refuses; while the new state is
    being written, those of before stay as they were.
    """
    unfinished = folder / f".new-step-{step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".*-step-*"):  # of a run that was killed
            shutil.rmtree(stale, ignore_errors=True)
        unfinished.mkdir()
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            unfinished / TENSORS,
        )
        set_ordinary_mode(unfinished / TENSORS)
        _write(
            unfinished / MANIFEST,
            json.dumps(strict(manifest, _float_as_dict), indent=1, allow_nan=False) + "\n",
        )
        _write(unfinished / METRICS, metrics)
        _write(
            unfinished / SUMS,
            "".join(f"{sha256_file(unfinished / name)}  {name}\n" for name in FILES),
        )
        for name in (*FILES, SUMS):
            _fsync(unfinished / name)
        fsync_folder(unfinished)
        for other, path in saved_states(folder):
            if starts_over or other >= step:
                _discard(path)
        os.rename(unfinished, folder / f"step-{step}")
        fsync_folder(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot save the run's state in {folder}: {getattr(error, 'strerror', None) or error}; make room there or"
            " choose another --out_dir, then go on with --resume"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for _, path in saved_states(folder)[KEPT:]:
        with contextlib.suppress(
            OSError
        ):  # a file that someone reads cannot go on Windows; the next save tries again
            _discard(path)


def _read(path: Path) -> State:
    try:
        contents = {name: (path / name).read_bytes() for name in FILES}
        sums = {
            name: f"{hashlib.sha256(content).hexdigest()}  {name}\n"
            for name, content in contents.items()
        }
        written = (path / SUMS).read_bytes()
    except PermissionError as error:  # nothing is wrong with it
        raise UserError(
            f"{error.filename}: {error.strerror}; allow reading it, then --resume again"
        ) from error
    except OSError as error:
        raise _Damaged(f"{Path(error.filename or path).name}: {error.strerror}") from error
    for name, line in sums.items():
        if line.encode() not in written:
            raise _Damaged(f"checksum of {name}")
    if written != "".join(sums.values()).encode():
        raise _Damaged(f"{SUMS} holds more than checksums")
    manifest = json.loads(contents[MANIFEST], object_hook=_float)
    return State(path, manifest, load(contents[TENSORS]), contents[METRICS].decode())


def strict(value: object, instead: Callable[[float], object]) -> object:
    """Plain JSON, which has no NaN and no infinity: ``instead(number)`` stands in their place."""
    if isinstance(value, dict):
        return {key: strict(item, instead) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item, instead) for item in value]
    return instead(value) if isinstance(value, float) and not math.isfinite(value) else value


def _float_as_dict(number: float) -> dict:
    """What a manifest, which gives every number back, says for one that JSON lacks; null is an
    unset flag.
    """
    return {"float": str(number)}


def _float(found: dict) -> dict | float:
    return float(found["float"]) if found.keys() == {"float"} else found


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _fsync(path: Path) -> None:
    with path.open("r+b") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())


def _discard(path: Path) -> None:
    """Delete a state: out of sight first, so that a kill leaves no half of it."""
    gone = path.with_name(f".old-{path.name}")
    os.rename(path, gone)
    shutil.rmtree(gone)
