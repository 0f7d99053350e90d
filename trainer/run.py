"""What a training run has beside its weights: progress, clock, log, validation, saved states."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from core.errors import ECHO_SECONDS, STOPPING, Stopped, UserError
from dataset.batches import Batch
from trainer.checkpoints import RunStates
from trainer.metrics import (
    Clock,
    NoLog,
    RunLog,
    Validation,
    duration,
    matmul_floor,
    peak_memory_mb,
)
from trainer.options import TrainOptions
from trainer.runtime import Runtime, count_parameters

DRY_RUN_STEPS = 20
MAX_OVERFLOWS = 20  # fp16 steps in a row that overflow before the run is given up


class BatchSource(Protocol):
    """One item of ``steps`` holds the micro-batches of one optimizer step for this rank.

    A step has ``rows_per_step`` rows over all ranks. ``steps(epoch, start)`` leaves out the first
    ``start`` steps of the epoch; a rank's list is never empty. ``largest_batch()`` is the largest
    micro-batch of this rank.
    """

    steps_per_epoch: int
    rows_per_step: int

    def steps(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]: ...
    def largest_batch(self) -> Batch: ...


@dataclass(frozen=True)
class Summary:
    """How a run went; the last line of its metrics file.

    ``first_loss`` is that of step 1, before any update. ``final`` is the last validation, with its
    step; None in ranks other than 0. ``matmul_share`` is the speed over ``matmul_floor``;
    ``peak_memory_mb`` counts one process.
    """

    steps: int
    first_loss: float
    last_loss: float
    final: dict | None
    tokens: int
    seconds: float
    tokens_per_second: float
    matmul_share: float
    peak_memory_mb: int | None

    def __str__(self) -> str:
        memory = f", peak memory {self.peak_memory_mb:,} MB" if self.peak_memory_mb else ""
        return (
            f"{self.steps} steps, {self.tokens:,} tokens in {duration(self.seconds)}: loss"
            f" {self.first_loss:.3f} -> {self.last_loss:.3f}, {self.tokens_per_second:,.0f}"
            f" tokens/s ({100 * self.matmul_share:.0f} % of the matmul floor){memory}"
        )


class Run:
    """One run, from resuming it to its last line; ``train`` drives it.

    ``write_files(metrics)`` writes what the run is for, a base or a skill. Rank 0 calls it every
    ``save_interval`` steps and at the end, after a validation, and then writes the state that
    ``states`` can resume from. A signal of ``STOPPING`` ends the run early: saved, but not
    validated again. ``log_to`` is the metrics file. A dry run makes a few steps and writes nothing.
    """

    def __init__(
        self,
        options: TrainOptions,
        runtime: Runtime,
        *,
        states: RunStates,
        validation: Validation,
        write_files: Callable[[dict], None],
        log_to: Path,
    ):
        self.options, self.runtime, self.states = options, runtime, states
        self.validation, self.write_files, self.log_to = validation, write_files, log_to

    def plan(self, source: BatchSource) -> None:
        """Fix the number of steps. Raises ``UserError`` when the warm-up is longer than the run."""
        options = self.options
        total = options.epochs * source.steps_per_epoch
        self.total = min(total, options.max_steps) if options.max_steps else total
        self.last = min(self.total, DRY_RUN_STEPS) if options.dry_run else self.total
        self.warmup = options.warmup_iters or round(options.warmup_ratio * self.total)
        self.rows_per_step = source.rows_per_step
        if self.warmup >= self.total:
            raise UserError(
                f"a warm-up of {self.warmup} steps must be shorter than the run of {self.total}"
                " optimizer steps: lower warmup_iters or warmup_ratio"
            )

    @contextmanager
    def at_work(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> Iterator[None]:
        """Inside, the run is alone in its folder, stands where its state was, logs, and may stop.

        Raises ``UserError`` when another process is at this run.
        """
        runtime, states = self.runtime, self.states
        self.trained = model, optimizer, scaler
        self.log = NoLog()
        with ExitStack() as stack:
            self.request = stack.enter_context(stop_requests())
            if not self.options.dry_run:
                runtime.on_first(lambda: stack.enter_context(states.alone()))
            self.progress = states.restore(*self.trained, runtime)
            self.saved = self.started_at = self.step
            self.validation.results = states.remembered("validation", {})
            if not self.options.dry_run:
                runtime.on_first(lambda: stack.enter_context(self._open_log()))
            every, trainable = count_parameters(model)
            print(f"{runtime}\ntraining {trainable:,} of {every:,} parameters")
            print(f"{self.total - self.step} optimizer steps of {self.rows_per_step} rows")
            self.bar = stack.enter_context(_bar(self.step, self.total, runtime))
            yield

    def _open_log(self) -> RunLog:
        lines = self.states.found.metrics if self.states.found else ""
        wandb_id = self.states.remembered("wandb_id", None)
        self.log = RunLog(self.log_to, self.options, lines, wandb_id)
        return self.log

    @property
    def step(self) -> int:
        """The optimizer steps that are done."""
        return self.progress.step

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether this process was sent a signal of ``STOPPING``."""
        return self.request.signum > 0

    def steps(self, source: BatchSource) -> Iterator[list[Batch]]:
        """The steps that are left, epoch after epoch; none after a stop during the warm-up."""
        self.floor = matmul_floor(self.trained[0], self.runtime)
        self.clock = Clock(self.runtime, self.progress.seconds)
        if self.runtime.sum(self.is_asked_to_stop)[0]:
            return
        while self.step < self.last:
            epoch, done = divmod(self.step, source.steps_per_epoch)
            try:
                yield from islice(source.steps(epoch, done), self.last - self.step)
            except (RuntimeError, OSError):
                # Where no system keeps a Ctrl-C from a process that is still starting, it ends
                # the source's helpers too. Several ranks must stop at the same step.
                if not self.is_asked_to_stop or self.runtime.world_size > 1:
                    raise
                return

    def require_finite(self, loss: float, norm: float) -> None:
        """Raise ``UserError`` when the step's ``loss`` or gradient ``norm`` is not finite.

        Under fp16 a few overflows in a row are normal: the scaler skips those steps.
        """
        progress = self.progress
        progress.overflows = 0 if math.isfinite(norm) else progress.overflows + 1
        allowed = MAX_OVERFLOWS if self.trained[2].is_enabled() else 0
        if not math.isfinite(loss) or progress.overflows > allowed:
            raise UserError(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm}; the weights were not"
                f" touched and {self._kept()}: lower learning_rate or inspect the data"
            )

    def _kept(self) -> str:
        return f"the save of step {self.saved} stands" if self.saved else "nothing was saved"

    def finish_step(self, loss: float, n_targets: int, tokens: int, lr: float, norm: float) -> None:
        """Count a step; every ``log_interval`` steps write a line of the metrics file."""
        progress = self.progress
        progress.step += 1
        progress.first_loss = loss if self.step == 1 else progress.first_loss
        progress.nats += loss * n_targets
        progress.targets += n_targets
        progress.tokens += tokens
        self.clock.tick(tokens)
        if self.step % self.options.log_interval == 0 or self.step in (1, self.last):
            progress.last_loss = progress.nats / max(progress.targets, 1)
            progress.nats, progress.targets = 0.0, 0
            speed, step_seconds = self.clock.pace()
            left = None if step_seconds is None else step_seconds * (self.total - self.step)
            self.log.write(
                {
                    "step": self.step,
                    "loss": progress.last_loss,
                    "lr": lr,
                    "grad_norm": norm,
                    "tokens_per_second": round(speed, 1),
                    "matmul_share": round(speed / self.floor, 4),
                    "peak_memory_mb": peak_memory_mb(self.runtime),
                    "seconds": round(self.clock.elapsed(), 2),
                    "seconds_left": None if left is None else round(left, 1),
                }
            )
            text = f"loss {progress.last_loss:.3f}, {speed:,.0f} tokens/s"
            text += "" if left is None else f", {duration(left)} left"
            self.bar.set_postfix_str(text, refresh=False)
            if self.bar.disable:
                print(f"step {self.step}/{self.total}: {text}", flush=True)
        self.bar.update()

    def save_at_intervals(self) -> None:
        """Save every ``save_interval`` steps and at the end, unless this is a dry run."""
        is_due = self.step % self.options.save_interval == 0 or self.step == self.total
        if is_due and not self.options.dry_run:
            self.save(validate=True)

    def save(self, validate: bool) -> None:
        """Write the files and the state of this step. All ranks call it; rank 0 writes."""
        self.progress.seconds = self.clock.elapsed()
        rng = self.runtime.rng_states()
        with self.clock.paused():
            self.runtime.on_first(lambda: self._write(rng, validate))
        self.saved = self.step

    def _write(self, rng: list[dict], validate: bool) -> None:
        """The state comes last: what a kill cuts short is done again."""
        losses = []
        if validate and (metrics := self.validation(self.step)).targets:
            figures = asdict(metrics).items()
            self.log.write({"step": self.step} | {f"val_{name}": value for name, value in figures})
            self._say(f"step {self.step}: validation {metrics}")
            losses.append(torch.tensor(metrics.loss))
        self._check_weights(losses)
        self.write_files({"step": self.step, **self.validation.record()})
        self.log.keep()
        self.states.save(
            *self.trained,
            self.progress,
            rng,
            self.runtime,
            metrics=self.log.lines,
            total_steps=self.total,
            rows_per_step=self.rows_per_step,
            validation=self.validation.results,
            wandb_id=self.log.wandb_id,
        )

    def _check_weights(self, losses: list[Tensor]) -> None:
        """Raise ``UserError`` when an update, whose own loss was fine, made the weights useless."""
        groups = self.trained[1].param_groups
        extremes = [torch.stack(p.aminmax()) for group in groups for p in group["params"]]
        if not all(numbers.isfinite().all() for numbers in (*extremes, *losses)):
            raise UserError(
                f"step {self.step}: the weights became useless and {self._kept()}: lower"
                " learning_rate"
            )

    def finish(self) -> Summary:
        """Save what is not saved yet, and sum the run up in the last line of its log."""
        if self.saved < self.step and not self.options.dry_run:
            self.save(validate=False)
        if self.started_at == self.total:
            self._say(f"this run was finished at step {self.total}: its files are written again")
            metrics = {"step": self.step, **self.validation.record()}
            self.runtime.on_first(lambda: self.write_files(metrics))
            self.log.keep()
        progress, seconds = self.progress, self.clock.elapsed()
        speed = progress.tokens / seconds
        main_result = next(iter(self.validation.record().values()))
        summary = Summary(
            self.step,
            progress.first_loss,
            progress.last_loss,
            main_result.get("last"),
            progress.tokens,
            seconds,
            speed,
            speed / self.floor,
            peak_memory_mb(self.runtime),
        )
        if self.step == self.total:
            self.log.write({"step": self.total, "summary": asdict(summary)})
        return summary

    def tell_end(self, summary: Summary) -> None:
        """Print how the run went. Raises ``Stopped`` where a signal ended it early."""
        if self.step < self.last:
            # Where this process had no signal of its own, another rank had one.
            signum = self.request.signum or signal.SIGTERM
            kept = "all is saved: resume goes on from there" if self.saved else "nothing is saved"
            name = signal.Signals(signum).name
            print(f"stopped by {name} after step {self.step} of {self.total}; {kept}", flush=True)
            raise Stopped(signum)
        dry_run = self.options.dry_run
        print(f"{'measured, nothing written' if dry_run else 'trained'}: {summary}")
        _, step_seconds = self.clock.pace()
        if dry_run and step_seconds:
            print(
                f"the whole run of {self.total} steps takes about"
                f" {duration(step_seconds * self.total)}, validations and saves not counted"
            )

    def _say(self, text: str) -> None:
        """Print a line above the bar, if there is one."""
        with self.bar.external_write_mode():
            print(text, flush=True)


def _bar(step: int, total: int, runtime: Runtime) -> tqdm:
    """A progress bar on a terminal; nothing where the output goes to a file."""
    return tqdm(
        initial=step,
        total=total,
        bar_format="{n_fmt}/{total_fmt} |{bar:20}| {elapsed}{postfix}",
        disable=True if runtime.rank > 0 else None,
    )


@dataclass
class StopRequest:
    """``signum``: the signal that asked the run to stop, 0 while none did."""

    signum: int = 0
    at: float = 0.0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, the first signal of ``STOPPING`` is noted; another one, seconds later, acts at once.

    What the process was started to ignore, by nohup for example, stays ignored. Only the main
    thread may set handlers: in another thread nothing is noted.
    """
    request = StopRequest()

    def on_signal(signum: int, frame: object) -> None:
        if not request.signum:
            request.signum, request.at = signum, time.monotonic()
        elif time.monotonic() - request.at > ECHO_SECONDS:
            signal.signal(signum, before[signum])
            signal.raise_signal(signum)

    before = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {signum: signal.getsignal(signum) for signum in STOPPING}
        before = {n: handler for n, handler in handlers.items() if handler != signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, on_signal)
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
