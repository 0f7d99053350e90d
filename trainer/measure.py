"""What a run is about to do and how long it will take, measured before its first step."""

import time
from collections.abc import Callable

from torch import Tensor, nn

from trainer.progress import duration
from trainer.runtime import Runtime, count_parameters


def announce(
    model: nn.Module, source, steps: int, runtime: Runtime, loss_sum: Callable[[nn.Module, object], Tensor]
) -> nn.Module:
    """Print what is about to happen; returns the model as ``runtime`` replicates it.

    Two forward and backward passes are made and leave no trace.
    """
    every, trainable = count_parameters(model)
    print(f"{runtime}\ntraining {trainable:,} of {every:,} parameters")
    batches = next(iter(source.steps(0)))
    model.eval()  # without dropout, so that the measurement draws no random number
    _pass(model, batches[-1], runtime, loss_sum)  # allocates memory, so its time says little
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        print(f"warning: {len(idle)} trainable tensors got no gradient and will not learn: {', '.join(idle[:8])}")
    replica = runtime.replicate(model, has_idle=bool(idle))
    seconds = _pass(replica, batches[-1], runtime, loss_sum)
    model.zero_grad(set_to_none=True)
    slots = sum(batch.labels.numel() for batch in batches) / batches[-1].labels.numel()
    print(
        f"{steps} optimizer steps of {source.rows_per_step} rows, about {duration(seconds * slots * steps)}", flush=True
    )
    return replica


def _pass(model: nn.Module, batch, runtime: Runtime, loss_sum: Callable[[nn.Module, object], Tensor]) -> float:
    """Seconds of one forward and backward pass."""
    began = time.perf_counter()
    with runtime.autocast():
        loss = loss_sum(model, runtime.move(batch))
    loss.backward()
    runtime.synchronize()
    return time.perf_counter() - began
