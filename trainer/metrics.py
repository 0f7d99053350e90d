"""What a run leaves behind: one JSON line a log step, a picture of the losses, and Weights & Biases if asked."""

import json
import os
from pathlib import Path

from core.errors import UserError
from core.files import atomic_write


class RunLog:
    """Writes ``path`` (.jsonl), ``path`` with .png, and wandb. An earlier file of that name is replaced."""

    def __init__(self, path: Path, use_wandb: bool, project: str, config: dict):
        self.path = path
        self.records: list[dict] = []
        self._wandb = _wandb_run(project, path.stem, config) if use_wandb else None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8", newline="\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another --out_dir") from error

    def write(self, record: dict) -> None:
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def close(self) -> None:
        self._file.close()
        if self.records:
            plot_losses(self.records, self.path.with_suffix(".png"))
        if self._wandb is not None:
            self._wandb.finish()


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


def _wandb_run(project: str, name: str, config: dict):
    import wandb

    try:
        return wandb.init(project=project, name=name, config=config, dir=os.environ.get("WANDB_DIR"))
    except Exception as error:  # no key, no network: wandb raises its own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--use_wandb: {reason}; log in with `wandb login` or set WANDB_MODE=offline") from error
