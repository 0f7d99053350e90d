"""What a run measures, and where it is written: held-out loss, speed, memory, log and picture."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import UserError, reason_of
from core.files import atomic_write
from dataset.batches import Batch
from model.kernels import IGNORED
from model.loss import keep_sum
from trainer.options import TrainOptions
from trainer.runtime import Runtime

UNCOUNTED_STEPS = 3  # the first steps allocate memory and warm caches, so no speed counts them


@dataclass(frozen=True)
class Metrics:
    """``loss`` in nats per supervised target; ``bits_per_byte`` of the learned text alone.

    Control tokens count as neither bits nor bytes. Both are NaN without any ``targets``.
    """

    loss: float
    bits_per_byte: float
    targets: int
    bytes: int


@dataclass(frozen=True)
class KeptMetrics(Metrics):
    """Those of a skill on general chats; ``kl``: KL(p_base || p_skill), nats per target."""

    kl: float


def nats_of(
    model: nn.Module, inputs: dict[str, Tensor], targets: Tensor, runtime: Runtime
) -> Tensor:
    """``-log p`` in nats of each of ``targets`` (B, N) int64, fp32; 0 where one is ``IGNORED``.

    The logits at n predict target n; ``inputs`` for the model's forward may hold later positions.
    It runs uncompiled: a new length would cost a compilation.
    """
    with runtime.autocast(), torch.compiler.set_stance("force_eager"):
        logits = model(**inputs).logits[:, : targets.size(1)].flatten(0, 1).float()
    nats = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return nats.view_as(targets)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], runtime: Runtime, control: set[int]
) -> Metrics:
    """The token mean over ``batches``; ``control`` holds the ids that stand for no text.

    The model keeps its mode.
    """
    was_training = model.training
    model.eval()
    control_ids = torch.tensor(sorted(control), device=runtime.device)
    nats, text_nats, targets, text_bytes = 0.0, 0.0, 0, 0
    for batch in batches:
        batch = runtime.move(batch)
        labels = batch.labels[:, 1:]
        losses = nats_of(model, batch.inputs, labels, runtime)
        nats += float(losses.sum())
        text_nats += float(losses[~torch.isin(labels, control_ids)].sum())
        targets, text_bytes = targets + batch.n_targets, text_bytes + batch.n_bytes
    model.train(was_training)
    bits = text_nats / math.log(2)
    loss = nats / targets if targets else math.nan
    return Metrics(loss, bits / text_bytes if text_bytes else math.nan, targets, text_bytes)


@torch.no_grad()
def evaluate_kept(
    model: nn.Module,
    batches: Iterable[Batch],
    runtime: Runtime,
    control: set[int],
    base: nn.Module,
) -> KeptMetrics:
    """As ``evaluate``; also how far ``model`` is from its ``base``, as ``keep_sum`` takes it."""
    nats, metrics = 0.0, evaluate(model, batches, runtime, control)
    was_training = model.training
    model.eval()
    for batch in map(runtime.move, batches):
        with runtime.autocast(), torch.compiler.set_stance("force_eager"):
            nats += float(keep_sum(model, base, batch.inputs, batch.labels))
    model.train(was_training)
    return KeptMetrics(
        **asdict(metrics), kl=nats / metrics.targets if metrics.targets else math.nan
    )


def score_of(found: dict[str, Metrics]) -> float:
    """What the best weights have least of: the first kind's loss and the others' KL to the base."""
    first, *others = found.values()
    return first.loss + sum(m.kl for m in others if isinstance(m, KeptMetrics) and m.targets)


class Validation:
    """The held-out results of a run: the first and the last of each kind, with their steps.

    ``measures`` maps a kind to a function whose result is a dataclass of numbers with ``loss`` and
    ``targets``. ``results`` is plain JSON, which a run state keeps: the "first" and "last" of each
    kind, {} where nothing was held out; with ``mark_best`` also the "best".
    """

    def __init__(self, measures: dict[str, Callable[[], Metrics]]):
        self.measures = measures
        self.results: dict[str, dict] = {kind: {} for kind in measures}

    def __call__(self, step: int) -> dict[str, Metrics]:
        """Measure every kind after optimizer step ``step``; return the results."""
        found = {kind: measure() for kind, measure in self.measures.items()}
        for kind, metrics in found.items():
            if metrics.targets:
                last = {"step": step, **strict(asdict(metrics))}
                self.results[kind] = {"first": last, **self.results[kind], "last": last}
        return found

    def mark_best(self) -> None:
        """The last results are those of the weights that will be saved."""
        for result in self.results.values():
            if result:
                result["best"] = result["last"]

    def __str__(self) -> str:
        lines = []
        for kind, result in self.results.items():
            once = {r["step"]: r for r in result.values()}  # the first may be the last
            steps = [f"loss {r['loss']:.4f} after step {step}" for step, r in once.items()]
            lines.append(f"{kind}: {', '.join(steps) or 'nothing held out'}")
        return "\n".join(lines)


def strict(value: object) -> object:
    """``value`` as strict JSON has it: null in the place of NaN and infinity."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Clock:
    """Training time, of which ``seconds`` had passed before this process began."""

    def __init__(self, runtime: Runtime, seconds: float = 0.0):
        self._runtime, self._before = runtime, seconds
        self._began = self._counted_from = time.perf_counter()
        self._steps = self._tokens = self._uncounted_tokens = 0

    def tick(self, tokens: int) -> None:
        """Count one optimizer step over ``tokens`` tokens, padding left out."""
        self._steps, self._tokens = self._steps + 1, self._tokens + tokens
        if self._steps == UNCOUNTED_STEPS:
            self._runtime.synchronize()
            self._counted_from, self._uncounted_tokens = time.perf_counter(), self._tokens

    def elapsed(self) -> float:
        """The seconds since the run began, pauses left out."""
        return self._before + time.perf_counter() - self._began

    def pace(self) -> tuple[float, float | None]:
        """Tokens per second, and seconds per step; None while it is too early to tell."""
        now, counted_steps = time.perf_counter(), self._steps - UNCOUNTED_STEPS
        if counted_steps <= 0:
            return self._tokens / (now - self._began), None
        seconds = now - self._counted_from
        return (self._tokens - self._uncounted_tokens) / seconds, seconds / counted_steps

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, no training time passes."""
        before = time.perf_counter()
        yield
        away = time.perf_counter() - before
        self._began, self._counted_from = self._began + away, self._counted_from + away


def duration(seconds: float) -> str:
    """``45 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def matmul_peak(model: nn.Module, runtime: Runtime) -> float:
    """An estimate of the tokens/s of all ranks if Linear layers were all the work.

    It takes 4 FLOP a weight and token, 6 where the weight trains (Kaplan et al. 2020), at the speed
    of one large product.
    """
    flops, size = 1, 512 if runtime.device.type == "cpu" else 4096
    for module in model.modules():
        if isinstance(module, nn.Linear):
            passes = 6 if module.weight.requires_grad else 4
            flops += passes * module.in_features * module.out_features
    a, times = torch.ones(size, size, device=runtime.device, dtype=runtime.dtype), []
    for _ in range(10):
        runtime.synchronize()
        began = time.perf_counter()
        a @ a
        runtime.synchronize()
        times.append(time.perf_counter() - began)
    return runtime.sum(2 * size**3 / min(times))[0] / flops


def peak_memory_mb(runtime: Runtime) -> int | None:
    """The most MB that this process held: on its GPU if it has one, else in RAM.

    MPS tells what it holds now; Windows tells nothing.
    """
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated(runtime.device) >> 20
    if runtime.device.type == "mps":
        return torch.mps.driver_allocated_memory() >> 20
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 20 if sys.platform == "darwin" else 10  # bytes there, KB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> unit


class RunLog(AbstractContextManager):
    """Writes the metrics file ``path`` (.jsonl), a picture beside it (.png), and wandb.

    ``lines`` are those of the run that this one resumes. Without them, lines go to
    ``<path>.part.jsonl`` until ``keep`` says that something was saved: a run that fails before
    leaves the files of an earlier run alone, and none of its own.
    """

    def __init__(
        self, path: Path, options: TrainOptions, lines: str = "", wandb_id: str | None = None
    ):
        self.path, self.lines = path, lines
        self._part = path.with_suffix(".part.jsonl")
        self._file = path if lines else self._part
        self._wandb = _wandb_run(path, options, wandb_id) if options.use_wandb else None
        self.wandb_id = self._wandb.id if self._wandb is not None else None
        atomic_write(self._file, lambda file: file.write(lines.encode()))

    def write(self, record: dict) -> None:
        """Append one JSON line; NaN and infinity become null."""
        line = json.dumps(strict(record), allow_nan=False) + "\n"
        self.lines += line
        try:
            with self._file.open("a", encoding="utf-8", newline="\n") as file:
                file.write(line)
        except OSError as error:  # with several ranks, one must not end here alone
            print(f"note: cannot write {self._file} ({error.strerror}); the next save writes all")
        if self._wandb is not None:
            values = {name: value for name, value in record.items() if name != "step"}
            self._wandb.log(values, step=record["step"])

    def keep(self) -> None:
        """Make these the metrics of what lies in out_dir. Raises ``UserError`` on a full disk."""
        atomic_write(self.path, lambda file: file.write(self.lines.encode()))
        self._file = self.path
        self._part.unlink(missing_ok=True)  # a kill may have left one in the run resumed here

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(kind is not None))
        if self._file == self.path:
            records = [json.loads(line) for line in self.lines.splitlines()]
            plot_losses(records, self.path.with_suffix(".png"))
        else:
            self._part.unlink(missing_ok=True)


class NoLog:
    """Stands for a ``RunLog`` in every rank but the first: it takes records and keeps none."""

    def write(self, record: dict) -> None:
        pass


def plot_losses(records: list[dict], path: Path) -> None:
    """Draw training and validation loss against optimizer steps as a PNG."""
    from matplotlib.figure import Figure  # not pyplot, which has global state and wants windows

    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss (nats)")
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        found = [record for record in records if record.get(key) is not None]
        steps, losses = [r["step"] for r in found], [r[key] for r in found]
        axes.plot(steps, losses, style, label=label, markersize=3)
    axes.grid(alpha=0.3)
    axes.legend()
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _wandb_run(path: Path, options: TrainOptions, wandb_id: str | None):
    import wandb

    settings = {"project": options.wandb_project, "name": path.stem, "id": wandb_id}
    settings |= {"resume": "allow" if wandb_id else None}
    settings |= {"dir": os.environ.get("WANDB_DIR", path.parent)}
    flags = asdict(options).items()  # numbers stay numbers, for plots over runs
    config = {name: v if isinstance(v, int | float) else str(v) for name, v in flags}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return wandb.init(**settings, config=config)
    except Exception as error:  # no key, no network: wandb raises its own kinds
        way_out = "log in with `wandb login` or set WANDB_MODE=offline"
        raise UserError(f"use_wandb: {reason_of(error)}; {way_out}") from error
