"""What a run leaves behind: one JSON line a log step, a picture of the losses, and Weights & Biases if asked."""

import json
import os
from pathlib import Path

from core.errors import UserError
from core.files import atomic_write


class RunLog:
    """Writes ``path`` (.jsonl), ``path`` with .png, and wandb; a context manager.

    Until ``keep`` says that the run has saved something, its lines go to ``<path>.part.jsonl``: a run that fails before
    leaves the files of an earlier one alone.
    """

    def __init__(self, path: Path, use_wandb: bool, project: str, config: dict):
        self.path, self.records = path, []
        self._file = path.with_suffix(".part.jsonl")
        self._wandb = _wandb_run(path, project, config) if use_wandb else None
        atomic_write(self._file, lambda file: None)

    def __enter__(self) -> "RunLog":
        return self

    def write(self, record: dict) -> None:
        self.records.append(record)
        try:
            with self._file.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._file}: {error.strerror}; make room or choose an --out_dir") from error
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def keep(self) -> None:
        """From now on these are the metrics of what lies in out_dir."""
        if self._file != self.path:
            os.replace(self._file, self.path)
            self._file = self.path

    def __exit__(self, *_) -> None:
        if self._wandb is not None:
            self._wandb.finish()
        if self._file == self.path:
            plot_losses(self.records, self.path.with_suffix(".png"))


def plot_losses(records: list[dict], path: Path) -> None:
    """Training and validation loss against optimizer steps, as a PNG."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no window system

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss (nats per token)", title=path.stem)
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=3)
    axes.grid(alpha=0.3)
    axes.legend()
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _wandb_run(path: Path, project: str, config: dict):
    import wandb

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return wandb.init(project=project, name=path.stem, config=config, dir=os.environ.get("WANDB_DIR", path.parent))
    except Exception as error:  # no key, no network: wandb raises its own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--use_wandb: {reason}; log in with `wandb login` or set WANDB_MODE=offline") from error
