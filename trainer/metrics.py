"""What a run leaves behind: one JSON line a log step, a picture of the losses, and Weights & Biases
if asked.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

from core.errors import UserError, reason_of
from core.files import atomic_write
from trainer.options import TrainOptions
from trainer.state_files import strict


class RunLog:
    """Writes ``path`` (.jsonl), ``path`` with .png, and wandb; a context manager.

    ``lines`` are those of the run that this one resumes. Without them, until ``keep`` says that the
    run has saved something, lines go to ``<path>.part.jsonl``: a run that fails before leaves the
    files of an earlier one alone, and none of its own.
    """

    def __init__(
        self, path: Path, options: TrainOptions, lines: str = "", wandb_id: str | None = None
    ):
        self.path, self.lines = path, lines
        self._part = path.with_suffix(".part.jsonl")
        self._file = path if lines else self._part
        self._wandb = _wandb_run(path, options, wandb_id) if options.use_wandb else None
        atomic_write(self._file, lambda file: file.write(lines.encode()))

    @property
    def wandb_id(self) -> str | None:
        return self._wandb.id if self._wandb is not None else None

    def __enter__(self) -> "RunLog":
        return self

    def write(self, record: dict) -> None:
        line = json.dumps(strict(record, lambda number: None), allow_nan=False) + "\n"
        self.lines += line
        try:
            with self._file.open("a", encoding="utf-8", newline="\n") as file:
                file.write(line)
        except OSError as error:  # one rank alone must not end here; a disk that stays full ends all at the next save
            print(
                f"note: cannot write {self._file} ({error.strerror}); make room: the next save writes it whole"
            )
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def keep(self) -> None:
        """From now on these are the metrics of what lies in out_dir. Raises ``UserError`` when the
        disk refuses.
        """
        atomic_write(self.path, lambda file: file.write(self.lines.encode()))
        self._file = self.path
        self._part.unlink(
            missing_ok=True
        )  # also one that a kill just here left in the run that this one resumes

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(kind is not None))
        if self._file == self.path:
            plot_losses(
                [json.loads(line) for line in self.lines.splitlines()],
                self.path.with_suffix(".png"),
            )
        else:
            self._part.unlink(missing_ok=True)


class NoLog:
    """What a process that is not the first keeps in place of a ``RunLog``."""

    lines, wandb_id = "", None

    def __enter__(self) -> "NoLog":
        return self

    def write(self, record: dict) -> None:
        pass

    def __exit__(self, *_) -> None:
        pass


def plot_losses(records: list[dict], path: Path) -> None:
    """Training and validation loss against optimizer steps, as a PNG."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no window system

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(
        xlabel="optimizer step", ylabel="loss (nats per token)", title=path.stem
    )
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [
            (record["step"], record[key]) for record in records if record.get(key) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=3)
    axes.grid(alpha=0.3)
    axes.legend()
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _wandb_run(path: Path, options: TrainOptions, wandb_id: str | None):
    import wandb

    settings = {
        "project": options.wandb_project,
        "name": path.stem,
        "dir": os.environ.get("WANDB_DIR", path.parent),
    }
    flags = asdict(options).items()  # numbers stay numbers, for plots over runs
    settings["config"] = {
        name: value if isinstance(value, int | float) else str(value) for name, value in flags
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return wandb.init(**settings, id=wandb_id, resume="allow" if wandb_id else None)
    except Exception as error:  # no key, no network: wandb raises its own kinds
        reason = reason_of(error)
        raise UserError(
            f"--use_wandb: {reason}; log in with `wandb login` or set WANDB_MODE=offline"
        ) from error
