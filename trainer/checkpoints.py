"""Exact resume: the states of a run on disk, from which going on equals not having stopped.

"Equals" means bit for bit, on the same machine, torch, thread count and number of processes. A
state is a folder ``step-N`` that is whole or absent, and every bit is checked when it is read. A
save writes and fsyncs files in a folder of another name, renames it, fsyncs its parent, and then
renames older states away and deletes them. A kill at any point leaves the earlier states or the
new one. Only a run that starts over deletes the old run's states first, just before the rename.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from core.errors import UserError
from core.files import fsync_folder, sha256_file, try_lock
from dataset.batches import KINDS
from trainer.runtime import Runtime

FORMAT = 3
FILES = ("state.safetensors", "manifest.json", "metrics.jsonl")
TENSORS, MANIFEST, METRICS = FILES
SUMS = "SHA256SUMS"  # `sha256sum --check SHA256SUMS` checks a state by hand
LOCK = "run.lock"
KEPT = 2


@dataclass
class Trained:
    """What a state covers besides random numbers; of the model, only the trainable weights.

    ``best`` are those weights as the best validation found them, by name; empty before the first.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    best: dict[str, Tensor] = field(default_factory=dict)

    def weights(self) -> dict[str, nn.Parameter]:
        """The trainable weights, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the trainable weights."""
        return {name: p.detach().clone() for name, p in self.weights().items()}

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Write ``weights``, by name, into the model; those that are not named stay."""
        own = self.weights()
        for name, weight in weights.items():
            own[name].copy_(weight)


@dataclass
class Progress:
    """How far a run is: plain numbers that a state keeps.

    The place in the data is not among them: ``step`` alone tells which comes next, because the
    order of an epoch's steps follows from the data, ``rows_per_step``, seed and epoch. ``nats`` and
    ``targets``, of each of ``KINDS``, count since the last log line, over all ranks. ``overflows``
    are fp16 steps skipped in a row. ``tokens`` and ``seconds`` count since the run began, without
    what a kill undid. The best validation had ``best_score`` at ``best_step``, and ``waited`` more
    have come since; ``finished``: no step is left, if only for want of a better one.
    """

    step: int = 0
    nats: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    targets: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    overflows: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_score: float | None = None
    waited: int = 0
    finished: bool = False


@dataclass(frozen=True)
class State:
    """What one ``step-N`` folder holds; ``metrics`` are the metrics lines up to that step."""

    path: Path
    manifest: dict
    tensors: dict[str, Tensor]
    metrics: str


class _Damaged(Exception):
    pass


class RunStates:
    """The saved states of one run in ``folder``; ``found`` is the one that a resume starts from.

    ``identity`` is what must be equal in a resumed run: the options that change its result, and
    checksums of data, tokenizer and base. Raises ``UserError`` when the state to resume from has
    another identity or format, or when all are damaged.
    """

    def __init__(self, folder: Path, identity: dict, *, resume: bool):
        self.folder, self.identity = folder, identity
        self._seen = saved_states(folder)
        self.found = newest_state(folder) if resume else None
        self._starts_over = self.found is None  # then the first save deletes what is there
        if self.found:
            _check_identity(self.found, identity)
        elif resume:
            print(f"resume: there is no state in {folder}, so the run starts from the beginning")

    def remembered(self, name: str, default: object) -> object:
        """What the found state's manifest holds under ``name``; without a state, ``default``."""
        return self.found.manifest[name] if self.found else default

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder's lock: two runs of one name would delete each other's states.

        Raises ``UserError`` when another process is inside, or the folder cannot be written.
        """
        folder = self.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK).open("a")
        except OSError as error:
            said = f"cannot write in {folder}: {error.strerror}"
            raise UserError(f"{said}; choose another out_dir") from error
        with file:
            if not try_lock(file):
                way_out = "let it end or choose another out_dir"
                raise UserError(f"another run is at work in {folder}: {way_out}")
            if saved_states(folder) != self._seen:
                raise UserError(f"another run has just saved in {folder}: start again from there")
            if self._seen and not self.found:  # which unfinished run will this one replace?
                step, newest = self._seen[0]
                total = None
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged
                    text = (newest / MANIFEST).read_text(encoding="utf-8")
                    total = json.loads(text)["total_steps"]
                if step != total:
                    print(f"note: {folder} holds a run that got to step {step} of {total}: resume")
                    print("  continues it; this run starts over and deletes it at its first save")
            yield

    def save(
        self,
        trained: Trained,
        runtime: Runtime,
        rng: list[dict[str, Tensor]],
        progress: Progress,
        metrics: str,
        **facts: object,
    ) -> None:
        """Write the state after ``progress.step``.

        ``rng`` holds each rank's ``Runtime.rng_states``, ``metrics`` the lines of the metrics file.
        A resumed run gets ``facts``, plain JSON, from ``remembered``.
        """
        tensors = {f"model.{name}": p for name, p in trained.weights().items()}
        tensors |= {f"best.{name}": weight for name, weight in trained.best.items()}
        for rank, states in enumerate(rng):
            tensors |= {f"rng.{rank}.{name}": state for name, state in states.items()}
        entries = trained.optimizer.state_dict()["state"]
        parts = {
            f"optimizer.{name}.{part}": value
            for number, name in _numbered(trained)
            for part, value in entries.get(number, {}).items()
        }
        tensors |= {key: value for key, value in parts.items() if isinstance(value, Tensor)}
        manifest = {"format": FORMAT, "progress": asdict(progress), "identity": self.identity}
        manifest |= {"scaler": trained.scaler.state_dict(), **facts}
        manifest["environment"] = runtime.environment()
        manifest["optimizer"] = {k: v for k, v in parts.items() if not isinstance(v, Tensor)}
        first = self._starts_over
        write_state(self.folder, progress.step, tensors, manifest, metrics, starts_over=first)
        self._starts_over = False

    def restore(self, trained: Trained, runtime: Runtime) -> Progress:
        """Put back the found state, if any; return its progress, or that of step 0."""
        progress = Progress(**self.remembered("progress", {}))
        # If ranks found different steps, at least one of them differs from the mean, and raises.
        if runtime.sum(progress.step)[0] != progress.step * runtime.world_size:
            raise UserError(f"the processes see different states in {self.folder}: share out_dir")
        if not (found := self.found):
            return progress
        manifest, tensors = found.manifest, found.tensors
        trained.load({name: tensors[f"model.{name}"] for name in trained.weights()})
        best = {name: tensors.get(f"best.{name}") for name in trained.weights()}
        if None not in best.values():
            trained.best = {name: weight.to(runtime.device) for name, weight in best.items()}
        numbers = {name: number for number, name in _numbered(trained)}
        state = {}
        for key, value in (tensors | manifest["optimizer"]).items():
            if key.startswith("optimizer."):
                name, _, part = key.removeprefix("optimizer.").rpartition(".")
                state.setdefault(numbers[name], {})[part] = value
        # Groups are not saved: they follow from the options.
        groups = trained.optimizer.state_dict()["param_groups"]
        trained.optimizer.load_state_dict({"state": state, "param_groups": groups})
        trained.scaler.load_state_dict(manifest["scaler"])
        kinds = ("cpu", runtime.device.type)
        runtime.set_rng_state({kind: tensors.get(f"rng.{runtime.rank}.{kind}") for kind in kinds})
        tensors.clear()  # self.found lives on; its tensors need not
        for name, value in runtime.environment().items():
            if (before := manifest["environment"].get(name)) != value:
                print(f"note: {name} was {before} and is now {value}: the bits will differ")
        print(f"resumed at step {progress.step} of {manifest['total_steps']} from {found.path}")
        return progress


def saved_states(folder: Path) -> list[tuple[int, Path]]:
    """``(step, path)`` of the states in ``folder``, whole or damaged, the newest first."""
    found = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*")]
    states = [(int(match[1]), path) for match, path in found if match and path.is_dir()]
    return sorted(states, reverse=True)


def newest_state(folder: Path) -> State | None:
    """The newest whole state, with a printed line for each damaged one; None without any.

    Raises ``UserError`` when all are damaged, or when one may not be read.
    """
    states = saved_states(folder)
    for _, path in states:
        try:
            return _read(path)
        except _Damaged as damage:
            print(f"warning: state {path} is damaged ({damage}) and is passed over")
    if states:
        raise UserError(f"no state in {folder} can be used: all are damaged; start without resume")
    return None


def write_state(
    folder: Path, step: int, tensors: dict, manifest: dict, metrics: str, *, starts_over: bool
) -> None:
    """Write ``folder``/step-N, then delete all but the newest ``KEPT``.

    ``starts_over``: the states in ``folder`` are another run's. They go just before the new one
    takes its name, as do states of later steps, which a resume passed over as damaged. Raises
    ``UserError`` when the disk refuses; the earlier states stay until the new one is written.
    """
    unfinished = folder / f".new-step-{step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".*-step-*"):  # from a run that was killed
            shutil.rmtree(stale, ignore_errors=True)
        unfinished.mkdir()
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, unfinished / TENSORS)
        text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
        (unfinished / MANIFEST).write_bytes(text.encode())
        (unfinished / METRICS).write_bytes(metrics.encode())
        (unfinished / TENSORS).chmod((unfinished / METRICS).stat().st_mode)  # safetensors: 0600
        sums = "".join(f"{sha256_file(unfinished / name)}  {name}\n" for name in FILES)
        (unfinished / SUMS).write_bytes(sums.encode())
        for name in (*FILES, SUMS):
            with (unfinished / name).open("r+b") as file:  # Windows syncs only open-for-writing
                os.fsync(file.fileno())
        fsync_folder(unfinished)
        for other, path in saved_states(folder):
            if starts_over or other >= step:
                _discard(path)
        os.rename(unfinished, folder / f"step-{step}")
        fsync_folder(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        way_out = "make room there or choose another out_dir, then resume"
        raise UserError(f"cannot save a state in {folder}: {reason}; {way_out}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for _, path in saved_states(folder)[KEPT:]:
        with contextlib.suppress(OSError):  # on Windows somebody may read it; the next save retries
            _discard(path)


def _read(path: Path) -> State:
    try:
        contents = {name: (path / name).read_bytes() for name in FILES}
        written = (path / SUMS).read_bytes()
    except PermissionError as error:  # nothing is wrong with the state
        raise UserError(f"{error.filename}: {error.strerror}; allow reading it") from error
    except OSError as error:
        raise _Damaged(f"{Path(error.filename or path).name}: {error.strerror}") from error
    sums = [f"{hashlib.sha256(contents[name]).hexdigest()}  {name}\n".encode() for name in FILES]
    for name, line in zip(FILES, sums, strict=True):
        if line not in written:
            raise _Damaged(f"checksum of {name}")
    if written != b"".join(sums):
        raise _Damaged(f"{SUMS} holds more than checksums")
    manifest = json.loads(contents[MANIFEST])
    return State(path, manifest, load(contents[TENSORS]), contents[METRICS].decode())


def _discard(path: Path) -> None:
    """Delete a state. It gets another name first, so that a kill leaves no half of it."""
    gone = path.with_name(f".old-{path.name}")
    os.rename(path, gone)
    shutil.rmtree(gone)


def _numbered(trained: Trained) -> list[tuple[int, str]]:
    """The number that the optimizer's state dict gives each parameter, and its name."""
    names = {id(parameter): name for name, parameter in trained.model.named_parameters()}
    groups = trained.optimizer.state_dict()["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    parameters = [p for group in trained.optimizer.param_groups for p in group["params"]]
    return [(number, names[id(p)]) for number, p in zip(numbers, parameters, strict=True)]


def _check_identity(found: State, identity: dict) -> None:
    if found.manifest["format"] != FORMAT:
        raise UserError(f"{found.path} is of another version of this program; start without resume")
    before, step = found.manifest["identity"], found.manifest["progress"]["step"]
    differences = []
    for key in sorted(before.keys() | identity.keys()):
        old, new = before.get(key), identity.get(key)
        if old != new:
            is_content = key.startswith("the content of")  # nobody can read a checksum
            said = f"changed since step {step}" if is_content else f"was {old} and is now {new}"
            differences.append(f"{key} {said}")
    if differences:
        way_out = "resume with the old ones; to go on with new ones, start a new run in another"
        way_out += " out_dir with this one's file as base or skill; or start over without resume"
        raise UserError(f"{'; '.join(differences)}; {way_out}")
