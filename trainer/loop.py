"""The only training loop. Pretraining, fine-tuning and LoRA differ in what they hand to it."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from core.errors import UserError, reason_of
from dataset.batches import KINDS, Batch
from trainer.checkpoints import Trained
from trainer.optimizer import lr_at, make_optimizer
from trainer.run import BatchSource, Run, Summary
from trainer.runtime import Runtime

LossSum = Callable[[nn.Module, Batch], Tensor]


def causal_loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """The cross-entropy in nats, summed over the supervised targets of ``batch``; 0 without any.

    Any causal language model with Hugging Face's ``labels`` will do: it shifts them itself, so
    that the logits at t are compared with labels[t + 1], and divides its sum by
    ``num_items_in_batch``.
    """
    return model(**batch.inputs, labels=batch.labels, num_items_in_batch=1).loss


def train(
    model: nn.Module,
    source: BatchSource,
    groups: list[dict],
    run: Run,
    loss_sum: LossSum = causal_loss_sum,
) -> Summary:
    """Train ``model`` in place and leave it in eval mode; ``groups`` hold what is trained.

    ``loss_sum(model, batch)`` is the summed loss of a micro-batch. It is divided by the targets of
    its kind in the whole optimizer step over all ranks, so neither accumulation nor the number of
    processes changes the gradient. Raises ``UserError`` when nothing is trainable, and when the
    loss or a gradient (in fp16: several in a row) is not finite, before it reaches the weights;
    raises ``Stopped`` when a signal ended the run early, after saving it.
    """
    options, runtime = run.options, run.runtime
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not parameters:
        raise UserError("the model has no trainable parameter: a removed LoRA leaves a frozen base")
    run.plan(source)
    schedule = run.total, run.warmup, options.decay_ratio, options.learning_rate
    optimizer = make_optimizer(groups, options.learning_rate, options.optimizer, runtime.device)
    scaler = runtime.scaler()
    with run.at_work(Trained(model, optimizer, scaler)):  # restores the found state, if any
        replica = warm_up(model, source.largest_batches(), run, loss_sum)
        for batches in run.steps(source):  # from where the run stands, epoch after epoch
            lr = lr_at(run.progress.step, *schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_ratio"]  # LoRA+ trains B faster than A
            parts, n_targets = accumulate_gradients(replica, batches, scaler, runtime, loss_sum)
            scaler.unscale_(optimizer)
            norm = clip_gradients(parameters, options.grad_clip or math.inf)
            # A signal to one rank stops all at the same step.
            own = sum(batch.n_tokens for batch in batches), run.request.signum > 0
            tokens, n_asked, *sums = runtime.sum(*own, *parts.values())
            run.require_finite(sum(sums), norm)
            scaler.step(optimizer)  # in fp16 it skips a step whose gradient overflowed
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            losses = dict(zip(parts, sums, strict=True))
            run.finish_step(losses, n_targets, int(tokens), lr, norm)
            run.validate_when_due()
            run.save_when_due()
            if n_asked or run.progress.finished:
                break
        summary = run.finish()
    model.eval()
    if summary.steps < run.last:
        raise run.stopped()
    return summary


def warm_up(model: nn.Module, batches: list[Batch], run: Run, loss_sum: LossSum) -> nn.Module:
    """Pass over ``batches`` without leaving a trace; return ``model`` as the ranks share it.

    Memory is allocated, the model compiled and the other ranks met before the first step. Raises
    ``UserError`` where the model cannot be compiled.
    """
    options, runtime = run.options, run.runtime

    def forward_and_backward(module: nn.Module) -> None:
        for batch in batches:
            with runtime.autocast():
                loss = loss_sum(module, runtime.move(batch))
            loss.backward()
        runtime.synchronize()

    random_states = runtime.rng_states()[runtime.rank]
    model.train()
    forward_and_backward(model)
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        few = ", ".join(idle[:8])
        print(f"warning: {len(idle)} trainable tensors get no gradient and will not learn: {few}")
    if options.compile:
        print("compiling")
        model.compile()
    replica = runtime.replicate(model, has_idle=bool(idle))
    if options.compile or replica is not model:
        try:
            forward_and_backward(replica)
        except torch._dynamo.exc.TorchDynamoException as error:  # uncompiled, the pass was fine
            way_out = "install the C++ compiler that PyTorch asks for, or do not compile"
            raise UserError(f"compile: {reason_of(error)}; {way_out}") from error
    model.zero_grad(set_to_none=True)
    runtime.set_rng_state(random_states)
    return replica


def accumulate_gradients(
    replica: nn.Module,
    batches: list[Batch],
    scaler: torch.amp.GradScaler,
    runtime: Runtime,
    loss_sum: LossSum,
) -> tuple[dict[str, float], dict[str, int]]:
    """Leave the gradient of one optimizer step, over all ranks, in every rank's parameters.

    Returns, for each of ``KINDS``, this rank's part of its token mean and the targets of all ranks.
    """
    own = [sum(batch.n_targets for batch in batches if batch.kind == kind) for kind in KINDS]
    n_targets = dict(zip(KINDS, map(int, runtime.sum(*own)), strict=True))
    losses = {kind: torch.zeros((), device=runtime.device) for kind in KINDS}
    for n, batch in enumerate(batches, 1):
        # Ranks exchange gradients once a step: each in its last pass, however many passes it has.
        with nullcontext() if n == len(batches) else runtime.local(replica):
            with runtime.autocast():
                part = loss_sum(replica, runtime.move(batch)) / max(n_targets[batch.kind], 1)
            # DDP averages over the ranks.
            scaler.scale(part * batch.weight * runtime.world_size).backward()
        losses[batch.kind] = losses[batch.kind] + part.detach()
    return {kind: float(loss) for kind, loss in losses.items()}, n_targets


def clip_gradients(parameters: list[nn.Parameter], largest: float) -> float:
    """Scale gradients of a larger norm than ``largest`` down to it; return the norm before."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm > largest:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return float(norm)
