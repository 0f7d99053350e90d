"""Exact resume: what a run must remember so that going on gives, bit for bit, what not stopping
would have given.

That holds for the same machine, torch and thread count, and for as many processes as before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from core.errors import UserError
from core.files import try_lock
from trainer.progress import Progress
from trainer.runtime import Runtime
from trainer.state_files import State, newest_state, planned_steps, saved_states, write_state

FORMAT = 1
LOCK = "run.lock"


class RunStates:
    """The saved states of one run, in ``folder``, and the one it goes on from.

    ``identity``: what must not change when the run is resumed; keys are ``--flag`` or words such as
    "the base", values are plain JSON. ``memory``: a dict of plain JSON that belongs to the caller;
    it is saved along and filled again on a resume. Raises ``UserError`` when ``resume`` is asked
    for and the newest whole state has another identity, or none is whole.
    """

    def __init__(self, folder: Path, identity: dict, memory: dict, *, resume: bool):
        self.folder, self.identity, self.memory = folder, identity, memory
        self._seen = saved_states(folder)
        self.found = newest_state(folder) if resume else None
        self._starts_over = self.found is None  # so the first save deletes what is there
        if self.found:
            _check_identity(self.found, identity)
            memory.update(self.found.manifest["memory"])
        elif resume:
            print(f"--resume: there is no state in {folder}: starting from the beginning")

    def rows_per_step(self, default: int) -> int:
        """The rows of an optimizer step: those of the resumed run, whatever the number of processes
        is now.
        """
        return self.found.manifest["rows_per_step"] if self.found else default

    @property
    def metrics(self) -> str:
        """The metrics file's lines up to the state."""
        return self.found.metrics if self.found else ""

    @property
    def wandb_id(self) -> str | None:
        return self.found.manifest["wandb_id"] if self.found else None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other process can be: two runs of one name would delete one another's states.

        Raises ``UserError`` when another one is, or nothing can be written in ``folder``.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / LOCK).open("a")
        except OSError as error:
            raise UserError(
                f"cannot write in {self.folder}: {error.strerror}; choose another --out_dir"
            ) from error
        with file:
            if not try_lock(file):
                raise UserError(
                    f"another run is at work in {self.folder}: let it end or choose another --out_dir"
                )
            if saved_states(self.folder) != self._seen:
                raise UserError(
                    f"another run has just saved in {self.folder}: start again, to go on from there"
                )
            yield

    def warn_of_others(self) -> None:
        """Say which unfinished run one that starts over will replace."""
        others = saved_states(self.folder)
        if self.found or not others:
            return
        (step, newest), *_ = others
        if (total := planned_steps(newest)) != step:
            print(
                f"note: {self.folder} holds a run that got to step {step} of {total}: with the same options --resume"
                " goes on with it; this run starts over and deletes it at its first save"
            )

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        runtime: Runtime,
    ) -> Progress:
        """Put everything back to where the found state was; without one, just a run's beginning."""
        step = self.found.manifest["progress"]["step"] if self.found else 0
        if runtime.sum(step)[0] != step * runtime.world_size:
            raise UserError(
                f"the processes do not see the same states in {self.folder}: --out_dir must be shared"
            )
        if not self.found:
            return Progress()
        manifest, tensors = self.found.manifest, self.found.tensors
        with torch.no_grad():
            for name, parameter in _trainable(model).items():
                parameter.copy_(tensors[f"model.{name}"])
        numbers = {name: number for number, name in _numbered(model, optimizer)}
        state = {}
        for key, value in (tensors | manifest["optimizer"]).items():
            if key.startswith("optimizer."):
                name, _, part = key.removeprefix("optimizer.").rpartition(".")
                state.setdefault(numbers[name], {})[part] = value
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        )
        scaler.load_state_dict(manifest["scaler"])
        progress = Progress(**manifest["progress"])
        runtime.set_rng_state(
            {name: tensors.get(f"rng.{runtime.rank}.{name}") for name in runtime.rng_state()}
        )
        tensors.clear()
        for name, value in runtime.environment().items():
            if (before := manifest["environment"].get(name)) != value:
                rows = (
                    f", a step keeps its {manifest['rows_per_step']} rows"
                    if name == "processes"
                    else ""
                )
                print(
                    f"note: {name} was {before} and is now {value}{rows}: the result will not be equal bit for bit"
                )
        print(
            f"resumed at step {progress.step} of {manifest['total_steps']} from {self.found.path}",
            flush=True,
        )
        return progress

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        progress: Progress,
        rng: list[dict[str, Tensor]],
        runtime: Runtime,
        *,
        metrics: str,
        **facts: object,
    ) -> None:
        """Write the state after step ``progress.step``; ``rng`` holds each rank's, ``facts`` go
        into the manifest.
        """
        tensors = {f"model.{name}": parameter for name, parameter in _trainable(model).items()}
        tensors |= {
            f"rng.{rank}.{name}": state
            for rank, states in enumerate(rng)
            for name, state in states.items()
        }
        held = optimizer.state_dict()["state"]
        parts = {
            f"optimizer.{name}.{part}": value
            for number, name in _numbered(model, optimizer)
            for part, value in held.get(number, {}).items()
        }
        tensors |= {key: value for key, value in parts.items() if isinstance(value, Tensor)}
        manifest = {
            "format": FORMAT,
            "progress": asdict(progress),
            "identity": self.identity,
            "memory": self.memory,
            "optimizer": {
                key: value for key, value in parts.items() if key not in tensors
            },  # plain numbers
            "scaler": scaler.state_dict(),
            "environment": runtime.environment(),
            **facts,
        }
        write_state(
            self.folder, progress.step, tensors, manifest, metrics, starts_over=self._starts_over
        )
        self._starts_over = False


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def _numbered(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[int, str]]:
    """The number that the optimizer's state dict gives each parameter, and the parameter's name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    numbers = [
        number for group in optimizer.state_dict()["param_groups"] for number in group["params"]
    ]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [
        (number, names[id(parameter)])
        for number, parameter in zip(numbers, parameters, strict=True)
    ]


def _check_identity(found: State, identity: dict) -> None:
    if found.manifest["format"] != FORMAT:
        raise UserError(
            f"{found.path} is of another version of this program; start without --resume"
        )
    before, step = found.manifest["identity"], found.manifest["progress"]["step"]
    differences = []
    for key in sorted(before.keys() | identity.keys()):
        old, new = before.get(key), identity.get(key)
        if old != new:
            said = (
                f"was {_shown(old)} and is now {_shown(new)}"
                if key.startswith("--")
                else f"changed since step {step}"
            )
            differences.append(f"{key} {said}")
    if differences:
        raise UserError(
            f"{'; '.join(differences)}; resume with the old ones or start without --resume"
        )


def _shown(value: object) -> str:
    return "unset" if value is None else str(value)
