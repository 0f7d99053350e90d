"""The only training loop: pretraining, fine-tuning and LoRA differ in what they hand in."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from core.errors import Stopped, UserError
from trainer.evaluation import Metrics
from trainer.measure import announce, peak_memory_mb, speed_figures
from trainer.metrics import NoLog, RunLog
from trainer.optimizer import lr_at, make_optimizer
from trainer.options import TrainOptions
from trainer.progress import Clock, duration
from trainer.run_state import RunStates
from trainer.runtime import Runtime
from trainer.signals import StopRequest, stop_requests

DRY_RUN_STEPS = 20
MAX_OVERFLOWS = 20  # fp16 steps in a row whose scaled gradient overflows before the run is given up

LossSum = Callable[[nn.Module, object], Tensor]


class BatchSource(Protocol):
    """One item of ``steps`` = the micro-batches of one optimizer step, of ``rows_per_step`` rows
    over all ranks.

    ``steps(epoch, start)`` leaves out the first ``start`` steps of the epoch. A rank's list is
    never empty.
    """

    steps_per_epoch: int
    rows_per_step: int

    def steps(self, epoch: int, start: int = 0) -> Iterator[list]: ...


@dataclass(frozen=True)
class Summary:
    """How a run went; the last line of its metrics file.

    ``first_loss`` is that of step 1, before any update; ``final`` the last validation, None in
    other ranks than 0. ``matmul_share`` is explained at ``Floor.share``; ``peak_memory_mb`` is that
    of one process.
    """

    steps: int
    first_loss: float
    last_loss: float
    final: Metrics | None
    tokens: int
    seconds: float
    tokens_per_second: float
    matmul_share: float
    peak_memory_mb: int | None

    def __str__(self) -> str:
        memory = f", peak memory {self.peak_memory_mb:,} MB" if self.peak_memory_mb else ""
        return (
            f"{self.steps} steps, {self.tokens:,} tokens in {duration(self.seconds)}: loss {self.first_loss:.3f} ->"
            f" {self.last_loss:.3f}, {self.tokens_per_second:,.0f} tokens/s"
            f" ({100 * self.matmul_share:.0f} % of the matmul floor){memory}"
        )


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
    states: RunStates,
) -> Summary:
    """Train ``model`` in place and leave it in eval mode.

    ``loss_sum(model, batch)`` is the summed loss of a micro-batch; it is divided by the supervised
    targets of the whole optimizer step over all ranks, so that neither accumulation nor the number
    of processes changes anything. Every ``save_interval`` steps and at the end rank 0 calls
    ``validate()``, then ``on_save(step)``, and writes the state from which ``states`` can go on; a
    signal of ``STOPPING`` ends the run early, saved but not validated, with ``Stopped``; output
    that nobody takes any more is dropped. ``log_to`` is the metrics file. ``options.dry_run`` makes
    a few steps and writes nothing. Raises ``UserError`` when nothing is trainable, when another
    process is at this run, and when the loss or a gradient is not finite: before it reaches the
    weights.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not parameters:
        raise UserError(
            "the model has no trainable parameter: a removed LoRA leaves its base frozen"
        )
    total = options.epochs * source.steps_per_epoch
    total = min(total, options.max_steps) if options.max_steps else total
    warmup = options.warmup_iters or round(options.warmup_ratio * total)
    if warmup >= total:
        raise UserError(
            f"a warm-up of {warmup} steps must be shorter than the run of {total} optimizer steps: lower --warmup_iters"
            " or --warmup_ratio"
        )
    optimizer = make_optimizer(groups, options.learning_rate, options.optimizer, runtime.device)
    scaler = runtime.scaler()
    last = min(total, DRY_RUN_STEPS) if options.dry_run else total
    with ExitStack() as stack:
        request = stack.enter_context(stop_requests())
        if not options.dry_run:
            runtime.on_first(lambda: stack.enter_context(states.alone()))
        run = states.restore(model, optimizer, scaler, runtime)
        saved, was_finished, final = run.step, run.step == total, None
        replica, floor = announce(
            model, source, total - run.step, runtime, loss_sum, options.compile
        )
        log = NoLog()

        def open_log() -> None:
            nonlocal log
            states.warn_of_others()
            log = stack.enter_context(RunLog(log_to, options, states.metrics, states.wandb_id))

        if not options.dry_run:
            runtime.on_first(open_log)
        bar = stack.enter_context(_bar(run.step, total, runtime))
        clock = Clock(runtime, run.seconds)

        def kept() -> str:
            return f"the save of step {saved} stands" if saved else "nothing was saved"

        def write(rng: list[dict] | None) -> None:
            """In rank 0; ``rng`` None: the state is there. It comes last: what a kill cuts short is
            done again.
            """
            nonlocal final
            if (
                run.step == total or run.step % options.save_interval == 0
            ):  # a stop in between leaves no trace
                final = validate()
                if final.targets and rng is not None:
                    log.write(
                        {"step": run.step}
                        | {f"val_{name}": value for name, value in final.figures().items()}
                    )
                    _say(bar, f"step {run.step}: validation {final}")
            finite = all(
                torch.stack(parameter.aminmax()).isfinite().all() for parameter in parameters
            )
            if not finite or (final and final.targets and not math.isfinite(final.loss)):
                # The loss of this step was fine, and its update was not.
                raise UserError(
                    f"step {run.step}: the weights became useless and {kept()}: lower --learning_rate"
                )
            on_save(run.step)
            log.keep()
            if rng is not None:
                facts = {
                    "total_steps": total,
                    "rows_per_step": source.rows_per_step,
                    "wandb_id": log.wandb_id,
                }
                states.save(model, optimizer, scaler, run, rng, runtime, metrics=log.lines, **facts)

        def save() -> None:
            nonlocal saved
            run.seconds = clock.elapsed()
            with clock.paused():
                runtime.on_first(partial(write, runtime.rng_states()))
            saved = run.step

        replica.train()
        stopping = runtime.sum(request.signum > 0)[
            0
        ]  # while it was announced: nothing was learned yet
        for batches in () if stopping else _steps(source, run.step, last, request, runtime):
            lr = lr_at(run.step, total, warmup, options.decay_ratio, options.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_ratio"]
            loss, n_targets = _backward(replica, batches, scaler, runtime, loss_sum)
            scaler.unscale_(optimizer)
            norm = _clip(parameters, options.grad_clip or math.inf)
            # Summed, so that all ranks stop at the same step: for a number that is not finite, or
            # for a signal.
            loss, tokens, stopping = runtime.sum(
                loss, sum(batch.n_tokens for batch in batches), request.signum > 0
            )
            run.step += 1
            run.overflows = 0 if math.isfinite(norm) else run.overflows + 1
            if not math.isfinite(loss) or run.overflows > (
                MAX_OVERFLOWS if scaler.is_enabled() else 0
            ):
                raise UserError(
                    f"step {run.step}: loss {loss}, gradient norm {norm}; the weights were not touched and {kept()}:"
                    " lower --learning_rate or look at the data with scripts/inspect_data.py"
                )
            scaler.step(optimizer)  # skips the step, in fp16, if a gradient overflowed
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            run.first_loss = loss if run.step == 1 else run.first_loss
            run.add(loss, n_targets, int(tokens))
            clock.tick(int(tokens))
            if run.step % options.log_interval == 0 or run.step in (1, last):
                record = {"step": run.step, "loss": run.take_loss(), "lr": lr, "grad_norm": norm}
                record |= speed_figures(clock, floor, total - run.step, runtime)
                log.write(record)
                _show(bar, record)
            bar.update()
            if (run.step % options.save_interval == 0 or run.step == total) and not options.dry_run:
                save()
            if stopping:
                break
        if saved < run.step and not options.dry_run:
            save()
        if was_finished:
            _say(bar, f"this run was finished at step {total}: its files are written again")
            runtime.on_first(partial(write, None))
        seconds = clock.elapsed()
        speed = run.tokens / seconds
        figures = run.tokens, seconds, speed, floor.share(speed), peak_memory_mb(runtime)
        result = Summary(run.step, run.first_loss, run.last_loss, final, *figures)
        if run.step == total:
            log.write({"step": total, "summary": asdict(result)})
    model.eval()
    if run.step < last:
        signum = request.signum or signal.SIGTERM  # without an own signal, another rank had one
        kept = "--resume goes on from there: all is" if saved else "nothing is"
        print(
            f"stopped by {signal.Signals(signum).name} after step {run.step} of {total}; {kept} saved",
            flush=True,
        )
        raise Stopped(signum)
    print(f"{'measured, nothing written' if options.dry_run else 'trained'}: {result}")
    if options.dry_run and (whole := clock.seconds_for(total)):
        print(
            f"the whole run of {total} steps takes about {duration(whole)}, validations and saves not counted"
        )
    return result


def _backward(
    replica: nn.Module,
    batches: list,
    scaler: torch.amp.GradScaler,
    runtime: Runtime,
    loss_sum: LossSum,
) -> tuple[float, int]:
    """Add the gradients of one optimizer step, over all ranks, to every rank's.

    Returns this rank's part of the step's loss (a token mean) and the number of targets of all
    ranks.
    """
    (n_targets,) = runtime.sum(sum(batch.n_targets for batch in batches))
    loss = torch.zeros((), device=runtime.device)
    for n, batch in enumerate(batches, 1):
        # Ranks meet once a step, in the last backward pass; how many micro-batches each has does
        # not matter.
        with nullcontext() if n == len(batches) else runtime.local(replica):
            with runtime.autocast():
                share = loss_sum(replica, runtime.move(batch)) / max(n_targets, 1)
            scaler.scale(
                share * runtime.world_size
            ).backward()  # because the ranks' gradients are averaged
        loss = loss + share.detach()
    return float(loss), int(n_targets)


def _clip(parameters: list[nn.Parameter], largest: float) -> float:
    """The gradient norm; gradients of a larger one are scaled down to it, and others are not
    touched at all.
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm > largest:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return float(norm)


def _steps(
    source: BatchSource, start: int, total: int, request: StopRequest, runtime: Runtime
) -> Iterator[list]:
    """The optimizer steps from ``start`` to ``total``, epoch after epoch."""
    while start < total:
        epoch, skipped = divmod(start, source.steps_per_epoch)
        try:
            for batches in islice(source.steps(epoch, skipped), total - start):
                yield batches
                start += 1
        except (RuntimeError, OSError):
            # Where no system keeps a Ctrl-C from a process that is still starting, it ends the
            # source's helpers too.
            if (
                not request.signum or runtime.world_size > 1
            ):  # several ranks must stop at the same step
                raise
            return


def _bar(step: int, total: int, runtime: Runtime) -> tqdm:
    """A progress bar on a terminal; nothing (but ``_show``'s lines) where the output goes to a
    file.
    """
    disable = True if runtime.rank > 0 else None
    return tqdm(
        initial=step,
        total=total,
        bar_format="{n_fmt}/{total_fmt} |{bar:20}| {elapsed}{postfix}",
        disable=disable,
    )


def _say(bar: tqdm, text: str) -> None:
    """Print a line above the bar, if there is one."""
    with bar.external_write_mode():
        print(text, flush=True)


def _show(bar: tqdm, record: dict) -> None:
    left = record["seconds_left"]
    text = f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s"
    text += f", {duration(left)} left" if left is not None else ""
    bar.set_postfix_str(text, refresh=False)
    if bar.disable:
        print(f"step {record['step']}/{bar.total}: {text}", flush=True)
