"""What a training run has beside its weights: progress, clock, log, validation, saved states."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NoReturn, Protocol

import torch
from tqdm import tqdm

from core.errors import ECHO_SECONDS, STOPPING, Stopped, UserError
from dataset.batches import KEEP, KINDS, OWN, Batch
from trainer.checkpoints import RunStates, Trained
from trainer.metrics import (
    Clock,
    NoLog,
    RunLog,
    Validation,
    duration,
    matmul_peak,
    peak_memory_mb,
    score_of,
)
from trainer.options import TrainOptions
from trainer.runtime import Runtime

DRY_RUN_STEPS = 20
FEWEST_BETWEEN = 10  # steps between two validations whose interval is not named
MAX_OVERFLOWS = 20  # fp16 steps in a row that overflow before the run is given up


class BatchSource(Protocol):
    """An item of ``steps`` holds this rank's micro-batches of an optimizer step, at least one.

    A step has ``rows_per_step`` rows over all ranks. ``steps(epoch, start)`` leaves out the first
    ``start`` steps of the epoch.
    """

    steps_per_epoch: int
    rows_per_step: int

    def steps(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]: ...
    def largest_batches(self) -> list[Batch]: ...  # one of each kind


@dataclass(frozen=True)
class Summary:
    """How a run went; the last line of its metrics file.

    ``first_loss`` is that of step 1, before any update. ``final`` is the last validation, with its
    step; None in ranks other than 0. ``matmul_share`` is the speed over ``matmul_peak``;
    ``peak_memory_mb`` counts one process.
    """

    steps: int
    first_loss: float | None
    last_loss: float | None
    final: dict | None
    tokens: int
    seconds: float
    tokens_per_second: float
    matmul_share: float
    peak_memory_mb: int | None

    def __str__(self) -> str:
        work = f"{self.steps} steps, {self.tokens:,} tokens in {duration(self.seconds)}"
        speed = f"{self.tokens_per_second:,.0f} tokens/s ({self.matmul_share:.0%} of matmul peak)"
        memory = f", peak memory {self.peak_memory_mb:,} MB" if self.peak_memory_mb else ""
        return f"{work}: loss {self.first_loss:.3f} -> {self.last_loss:.3f}, {speed}{memory}"


@dataclass
class Run:
    """One run, from resuming it to its last line; ``train`` drives it.

    ``write_files(metrics)`` writes what the run is for, a base or a skill. Rank 0 calls it every
    ``save_interval`` steps and at the end, and then writes the state that ``states`` can resume
    from. With ``keep_best`` the model has the weights of the best validation so far while it
    writes, and from the end on. ``verdict()`` adds to the metrics of the finished file. A signal of
    ``STOPPING`` ends the run early: saved, but not validated again. ``log_to`` is the metrics file.
    A dry run makes a few steps and writes nothing.
    """

    options: TrainOptions
    runtime: Runtime
    states: RunStates
    validation: Validation
    write_files: Callable[[dict], None]
    log_to: Path
    verdict: Callable[[], dict] | None = None

    def plan(self, source: BatchSource) -> None:
        """Fix the number of steps. Raises ``UserError`` when the warm-up is longer than the run."""
        options = self.options
        total = options.epochs * source.steps_per_epoch
        self.total = min(total, options.max_steps) if options.max_steps else total
        self.last = min(self.total, DRY_RUN_STEPS) if options.dry_run else self.total
        tenth = max(FEWEST_BETWEEN, math.ceil(self.total / 10))
        self.val_interval = options.val_interval or tenth
        self.warmup = options.warmup_iters or round(options.warmup_ratio * self.total)
        self.rows_per_step = source.rows_per_step
        if self.warmup >= self.total:
            wrong = f"a warm-up of {self.warmup} steps must be shorter than the run of {self.total}"
            raise UserError(f"{wrong} optimizer steps: lower warmup_iters or warmup_ratio")

    @property
    def kept(self) -> str:
        return f"the save of step {self.saved} stands" if self.saved else "nothing was saved"

    @contextmanager
    def at_work(self, trained: Trained) -> Iterator[None]:
        """Inside, the run is alone in its folder, stands where its state was, logs, and may stop.

        Raises ``UserError`` when another process is at this run.
        """
        options, runtime, states = self.options, self.runtime, self.states
        self.trained, self.log = trained, NoLog()
        with ExitStack() as stack:

            def open_log() -> None:
                lines = states.found.metrics if states.found else ""
                wandb_id = states.remembered("wandb_id", None)
                self.log = stack.enter_context(RunLog(self.log_to, options, lines, wandb_id))

            self.request = stack.enter_context(stop_requests())
            if not options.dry_run:
                runtime.on_first(lambda: stack.enter_context(states.alone()))
            self.progress = states.restore(trained, runtime)
            self.saved = self.started_at = self.progress.step
            if self.progress.finished:
                self.last = self.started_at
            self.validation.results = states.remembered("validation", self.validation.results)
            if not options.dry_run:
                runtime.on_first(open_log)
            sizes = [0, 0]  # of the frozen parameters, of the trainable ones
            for p in trained.model.parameters():  # one of 4 bits counts as what it stands for
                sizes[p.requires_grad] += getattr(p, "quant_state", p).shape.numel()
            print(f"{runtime}\ntraining {sizes[1]:,} of {sum(sizes):,} parameters")
            left = self.last if self.progress.finished else self.total
            left -= self.progress.step
            print(f"{left} optimizer steps of {self.rows_per_step} rows")
            look = {"bar_format": "{n_fmt}/{total_fmt} |{bar:20}| {elapsed}{postfix}"}
            look |= {"initial": self.progress.step, "total": self.total}
            look["disable"] = True if runtime.rank > 0 else None  # None: only on a terminal
            self.bar = stack.enter_context(tqdm(**look))
            yield

    def steps(self, source: BatchSource) -> Iterator[list[Batch]]:
        """The steps that are left, epoch after epoch; none after a stop during the warm-up."""
        self.matmul_peak = matmul_peak(self.trained.model, self.runtime)
        self.clock = Clock(self.runtime, self.progress.seconds)
        if self.runtime.sum(self.request.signum > 0)[0]:
            return
        while self.progress.step < self.last:
            epoch, done = divmod(self.progress.step, source.steps_per_epoch)
            try:
                yield from islice(source.steps(epoch, done), self.last - self.progress.step)
            except (RuntimeError, OSError):
                # Where no system keeps a Ctrl-C from a process that is still starting, it ends
                # the source's helpers too. Several ranks must stop at the same step.
                if not self.request.signum or self.runtime.world_size > 1:
                    raise
                return

    def require_finite(self, loss: float, norm: float) -> None:
        """Raise ``UserError`` when the step's ``loss`` or gradient ``norm`` is not finite.

        Under fp16 a few overflows in a row are normal: the scaler skips those steps.
        """
        progress = self.progress
        progress.overflows = 0 if math.isfinite(norm) else progress.overflows + 1
        allowed = MAX_OVERFLOWS if self.trained.scaler.is_enabled() else 0
        if not math.isfinite(loss) or progress.overflows > allowed:
            found = f"step {progress.step + 1}: loss {loss}, gradient norm {norm}; the weights were"
            way_out = "lower learning_rate or inspect the data"
            raise UserError(f"{found} not touched and {self.kept}: {way_out}")

    def finish_step(
        self, losses: dict, n_targets: dict, tokens: int, lr: float, norm: float
    ) -> None:
        """Count a step; every ``log_interval`` steps write a line of the metrics file.

        ``losses`` are the token means of each of ``KINDS`` over its ``n_targets``, of all ranks.
        """
        progress = self.progress
        progress.step += 1
        progress.first_loss = losses[OWN] if progress.step == 1 else progress.first_loss
        for kind, count in n_targets.items():
            progress.nats[kind] += losses[kind] * count
            progress.targets[kind] += count
        progress.tokens += tokens
        self.clock.tick(tokens)
        if progress.step % self.options.log_interval == 0 or progress.step in (1, self.last):
            self._log(lr, norm)
        self.bar.update()

    def _log(self, lr: float, norm: float) -> None:
        progress, counts = self.progress, self.progress.targets
        means = {kind: nats / max(counts[kind], 1) for kind, nats in progress.nats.items()}
        kept = {"keep_loss": means[KEEP]} if counts[KEEP] else {}
        progress.nats, progress.targets = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0)
        progress.last_loss = means[OWN]
        speed, step_seconds = self.clock.pace()
        left = step_seconds and step_seconds * (self.total - progress.step)
        record = {"step": progress.step, "loss": progress.last_loss, **kept}
        record |= {"lr": lr, "grad_norm": norm}
        share = round(speed / self.matmul_peak, 4)
        record |= {"tokens_per_second": round(speed, 1), "matmul_share": share}
        record |= {"peak_memory_mb": peak_memory_mb(self.runtime)}
        record |= {"seconds": round(self.clock.elapsed(), 2), "seconds_left": left}
        self.log.write(record)
        text = f"loss {progress.last_loss:.3f}, "
        text += f"keep loss {means[KEEP]:.3f}, " if kept else ""
        text += f"{speed:,.0f} tokens/s"
        text += f", {duration(left)} left" if left is not None else ""
        self.bar.set_postfix_str(text, refresh=False)
        if self.bar.disable:
            print(f"step {progress.step}/{self.total}: {text}")

    def validate_when_due(self) -> None:
        """Validate every ``val_interval`` steps and at the end; a dry run never does.

        With ``patience`` the run may be over then: no rank takes another step.
        """
        step = self.progress.step
        if self.options.dry_run or (step % self.val_interval and step < self.total):
            return
        with self.clock.paused():
            if self.runtime.on_first(self._validate) or step == self.total:
                self.progress.finished, self.last = True, step

    def _validate(self) -> bool:
        """Measure, keep the weights if none were better; whether patience is at its end.

        Raises ``UserError`` when an update, whose own loss was fine, made the weights useless.
        """
        options, progress = self.options, self.progress
        found = self.validation(progress.step)
        first, score = next(iter(found.values())), score_of(found)
        if not first.targets:
            return False
        numbers = asdict(first) | ({"score": score} if len(found) > 1 else {})
        line = {"step": progress.step} | {f"val_{name}": x for name, x in numbers.items()}
        for kind, metrics in list(found.items())[1:]:
            line |= {f"val_{kind}_{name}": x for name, x in asdict(metrics).items()}
        self.log.write(line)
        shown = [f"{name} {x:.4f}" for name, x in numbers.items() if isinstance(x, float)]
        tqdm.write(f"step {progress.step}: validation {', '.join(shown)}")
        if not math.isfinite(score):
            self._refuse_weights()
        progress.waited += 1
        if progress.best_score is None or score < progress.best_score:
            progress.best_score, progress.best_step, progress.waited = score, progress.step, 0
            if options.keep_best:
                self.trained.best = self.trained.snapshot()
                self.validation.mark_best()
        return bool(options.patience) and progress.waited >= options.patience

    def save_when_due(self) -> None:
        """Save every ``save_interval`` steps and at the end; a dry run never does."""
        step = self.progress.step
        is_due = step % self.options.save_interval == 0 or step == self.last
        if is_due and not self.options.dry_run:
            self.save()

    def save(self) -> None:
        """Write the files and the state of this step. All ranks call it; rank 0 writes."""
        self.progress.seconds = self.clock.elapsed()
        rng = self.runtime.rng_states()
        with self.clock.paused():
            self.runtime.on_first(lambda: self._write(rng))
        self.saved = self.progress.step

    def _write(self, rng: list[dict]) -> None:
        """Write the state last, so that what a kill cuts short is done again.

        Raises ``UserError`` as ``_validate`` does.
        """
        weights = self.trained.weights().values()
        if not all(torch.stack(weight.aminmax()).isfinite().all() for weight in weights):
            self._refuse_weights()
        self._write_files()
        self.log.keep()
        facts = {"total_steps": self.total, "rows_per_step": self.rows_per_step}
        facts |= {"validation": self.validation.results, "wandb_id": self.log.wandb_id}
        self.states.save(self.trained, self.runtime, rng, self.progress, self.log.lines, **facts)

    def _write_files(self, verdict: bool = False) -> None:
        """Write what the run is for, of the best weights if those are kept."""
        trained, progress = self.trained, self.progress
        now = trained.snapshot() if trained.best else {}
        trained.load(trained.best)
        step = progress.best_step if trained.best else progress.step
        said = self.verdict() if verdict and self.verdict else {}
        self.write_files({"step": step, **self.validation.results, **said})
        trained.load(now)

    def _refuse_weights(self) -> NoReturn:
        useless = f"step {self.progress.step}: the weights became useless and {self.kept}"
        raise UserError(f"{useless}: lower learning_rate")

    def finish(self) -> Summary:
        """Save what is not saved yet, and sum the run up in print and in its log's last line.

        With ``keep_best`` the model is left with the best weights, in rank 0.
        """
        progress, is_dry = self.progress, self.options.dry_run
        if self.saved < progress.step and not is_dry:
            self.save()
        if self.started_at == self.last:
            tqdm.write(f"this run was finished at step {self.last}: its files are written again")
        if self.started_at == self.last or (progress.finished and self.verdict):
            # All is saved by now: whatever ends this loses the verdict alone.
            with self.clock.paused():
                self.runtime.on_first(partial(self._write_files, verdict=True))
        seconds, final = self.clock.elapsed(), next(iter(self.validation.results.values()))
        speed, memory = progress.tokens / seconds, peak_memory_mb(self.runtime)
        losses = progress.first_loss, progress.last_loss, final.get("last")
        pace = progress.tokens, seconds, speed, speed / self.matmul_peak
        summary = Summary(progress.step, *losses, *pace, memory)
        if progress.finished:
            self.log.write({"step": progress.step, "summary": asdict(summary)})
        if progress.step == self.last:
            did = "measured, nothing written" if is_dry else "trained"
            tqdm.write(f"{did}: {summary}")
        step_seconds = self.clock.pace()[1]
        if is_dry and step_seconds:
            whole = duration(step_seconds * self.total)
            tqdm.write(f"the whole run of {self.total} steps takes about {whole}, without saves")
        if self.options.keep_best and self.saved:
            self._tell_chosen()
        self.trained.load(self.trained.best)
        return summary

    def _tell_chosen(self) -> None:
        progress = self.progress
        if not self.trained.best:
            text = "nothing was measured on held-out rows: saved are the last weights"
        else:
            text = f"saved are the weights of step {progress.best_step}, the best on held-out rows"
        tqdm.write(text)

    def stopped(self) -> Stopped:
        """What to raise where a signal ended the run early; it is printed here."""
        # Where this process had no signal of its own, another rank had one.
        signum = self.request.signum or signal.SIGTERM
        kept = "all is saved: resume goes on from there" if self.saved else "nothing is saved"
        place = f"after step {self.progress.step} of {self.total}"
        print(f"stopped by {signal.Signals(signum).name} {place}; {kept}")
        return Stopped(signum)


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
