"""The only training loop: pretraining, fine-tuning and LoRA differ in what they hand in."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from core.errors import UserError
from trainer.evaluation import Metrics
from trainer.metrics import RunLog
from trainer.optimizer import lr_at, make_optimizer, warmup_steps
from trainer.options import TrainOptions
from trainer.progress import Clock, LossWindow, duration
from trainer.runtime import Runtime, count_parameters

MAX_OVERFLOWS = 20  # fp16 steps in a row whose scaled gradient overflows before the run is given up

LossSum = Callable[[nn.Module, object], Tensor]


class BatchSource(Protocol):
    """One item of ``steps`` = the micro-batches of one optimizer step."""

    steps_per_epoch: int

    def steps(self, epoch: int, start: int = 0) -> Iterator[list]: ...


@dataclass(frozen=True)
class Summary:
    """How a run went. ``first_loss`` is that of step 1, before any update; ``final`` the last validation."""

    steps: int
    first_loss: float
    last_loss: float
    seconds: float
    tokens: int
    final: Metrics


def train(
    model: nn.Module,
    source: BatchSource,
    groups: list[dict],
    options: TrainOptions,
    runtime: Runtime,
    *,
    loss_sum: LossSum,
    on_save: Callable[[int], None],
    validate: Callable[[], Metrics],
    log_to: Path,
) -> Summary:
    """Train ``model`` in place and leave it in eval mode.

    ``loss_sum(model, batch)`` is the summed loss of a micro-batch; it is divided by the supervised targets of the whole
    optimizer step, so that accumulation changes nothing. Every ``save_interval`` steps, at the end, and when Ctrl-C
    ends the run early (which then raises ``KeyboardInterrupt``), ``validate()`` runs and then ``on_save(step)``.
    ``log_to`` is the metrics file. Raises ``UserError`` when nothing is trainable, and when the loss or a gradient is
    not finite: before it reaches the weights.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not parameters:
        raise UserError("the model has no trainable parameter: a removed LoRA leaves its base frozen")
    total = options.epochs * source.steps_per_epoch
    total = min(total, options.max_steps) if options.max_steps else total
    warmup = warmup_steps(options.warmup_iters, total)
    if warmup >= total:
        raise UserError(f"--warmup_iters {warmup} must be shorter than the run of {total} optimizer steps")
    optimizer = make_optimizer(groups, options.learning_rate)
    scaler = runtime.scaler()
    _announce(model, source, total, options, runtime, loss_sum)

    log = RunLog(log_to, options.use_wandb, options.wandb_project, {k: str(v) for k, v in asdict(options).items()})
    window, clock = LossWindow(), Clock(runtime)
    step, overflows, first_loss, last_loss, final = 0, 0, math.nan, math.nan, None
    model.train()
    with _interruptible() as interrupted, log, _bar(total) as bar:
        for batches in _all_steps(source, total):
            lr = lr_at(step, total, warmup, options.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, n_targets = _backward(model, batches, scaler, runtime, loss_sum)
            scaler.unscale_(optimizer)
            norm = float(nn.utils.clip_grad_norm_(parameters, options.grad_clip or math.inf))
            step += 1
            overflows = 0 if math.isfinite(norm) else overflows + 1
            if not math.isfinite(loss) or overflows > (MAX_OVERFLOWS if scaler.is_enabled() else 0):
                raise UserError(
                    f"step {step}: loss {loss}, gradient norm {norm}; the weights were not touched and the last save"
                    " stands: lower --learning_rate or look at the data with scripts/inspect_data.py"
                )
            if step == 1:
                first_loss = loss
                _report_idle(model)
            scaler.step(optimizer)  # skips the step, in fp16, if a gradient overflowed
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            window.add(loss, n_targets)
            clock.tick(sum(batch.n_tokens for batch in batches))
            is_last = step == total or interrupted.is_set()
            if step % options.log_interval == 0 or step == 1 or is_last:
                last_loss, speed = window.take(), clock.tokens_per_second()
                _show(bar, step, f"loss {last_loss:.3f}, {speed:,.0f} tokens/s{clock.left(total - step)}")
                log.write(
                    {"step": step, "loss": last_loss, "lr": lr, "grad_norm": norm, "tokens_per_second": round(speed, 1)}
                    | {"seconds": round(clock.elapsed(), 2)}
                )
            bar.update()
            if step % options.save_interval == 0 or is_last:
                with clock.paused():
                    final = validate()
                    if final.targets:
                        log.write({"step": step, "val_loss": final.loss, "val_bits_per_byte": final.bits_per_byte})
                        print(f"\rstep {step}: validation {final}", flush=True)
                    on_save(step)
                    log.keep()
            if is_last:
                break
    model.eval()
    if step < total:
        print(f"stopped by Ctrl-C after step {step} of {total}; its weights are saved", flush=True)
        raise KeyboardInterrupt
    return Summary(step, first_loss, last_loss, clock.elapsed(), clock.tokens, final)


def _backward(
    model: nn.Module, batches: list, scaler: torch.amp.GradScaler, runtime: Runtime, loss_sum: LossSum
) -> tuple[float, int]:
    """Add the gradients of one optimizer step; returns its loss (a token mean) and its number of targets."""
    n_targets = sum(batch.n_targets for batch in batches)
    loss = torch.zeros((), device=runtime.device)
    for batch in batches:
        with runtime.autocast():
            share = loss_sum(model, runtime.move(batch)) / max(n_targets, 1)
        scaler.scale(share).backward()
        loss = loss + share.detach()
    return float(loss), n_targets


def _all_steps(source: BatchSource, total: int) -> Iterator[list]:
    epoch = step = 0
    while step < total:
        for batches in source.steps(epoch):
            if step == total:
                return
            yield batches
            step += 1
        epoch += 1


def _announce(
    model: nn.Module, source: BatchSource, total: int, options: TrainOptions, runtime: Runtime, loss_sum: LossSum
) -> None:
    """Print what is about to happen, with the time it will take by a measured forward and backward pass."""
    every, trainable = count_parameters(model)
    rows = options.batch_size * options.accumulation_steps
    print(f"{runtime}\ntraining {trainable:,} of {every:,} parameters")
    batches = next(source.steps(0))
    model.eval()  # without dropout, so that the measurement draws no random number
    for _ in range(2):  # the first pass allocates and is not counted
        began = time.perf_counter()
        with runtime.autocast():
            loss = loss_sum(model, runtime.move(batches[-1]))
        loss.backward()
        runtime.synchronize()
        seconds = time.perf_counter() - began
    model.zero_grad(set_to_none=True)  # and leaves no trace
    slots = sum(batch.labels.numel() for batch in batches) / batches[-1].labels.numel()
    print(f"{total} optimizer steps of {rows} rows, about {duration(seconds * slots * total)}", flush=True)


def _report_idle(model: nn.Module) -> None:
    """Say which trainable parameters took no part in the first step, such as a LoRA whose forward is bypassed."""
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        print(f"warning: {len(idle)} trainable tensors got no gradient and will not learn: {', '.join(idle[:8])}")


def _bar(total: int) -> tqdm:
    """A progress bar on a terminal; nothing (but ``_show``'s lines) where the output goes to a file."""
    return tqdm(total=total, bar_format="{n_fmt}/{total_fmt} |{bar:20}| {elapsed}{postfix}", disable=None)


def _show(bar: tqdm, step: int, text: str) -> None:
    bar.set_postfix_str(text, refresh=False)
    if bar.disable:
        print(f"step {step}/{bar.total}: {text}", flush=True)


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Inside, a first Ctrl-C sets the event, so that the running step can end; a second one interrupts at once."""
    event = threading.Event()

    def on_signal(signum, frame):
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
