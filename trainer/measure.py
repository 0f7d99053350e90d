"""What a run is about to do, how fast this machine can do it at best, and how long it will take."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from core.errors import UserError, reason_of
from trainer.progress import Clock
from trainer.runtime import Runtime, count_parameters

PASSES = 2  # forward and backward passes before the first step
PRODUCT_SECONDS = 0.1  # spent on finding the speed of a plain matrix product
KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
ATTENTION = [f"_scaled_dot_product_{kernel}" for kernel in KERNELS]
LossSum = Callable[[nn.Module, object], Tensor]


@dataclass(frozen=True)
class Floor:
    """``flops_per_token``: of the matrix products of a forward and backward pass.
    ``flops_per_second``: of one large matrix product, the best that all ranks' devices do together
    in the run's dtype."""

    flops_per_token: float
    flops_per_second: float

    def share(self, tokens_per_second: float) -> float:
        """Which part of the time would be left if nothing but the matrix products took any, each at
        best speed.
        """
        return tokens_per_second * self.flops_per_token / self.flops_per_second


def announce(
    model: nn.Module, source, steps: int, runtime: Runtime, loss_sum: LossSum, compiled: bool
) -> tuple[nn.Module, Floor]:
    """Print what is about to happen; returns the model as ``runtime`` replicates it, and the
    machine's floor.

    ``PASSES`` forward and backward passes are made and leave no trace. ``compiled``: the model is
    compiled on the way; raises ``UserError`` where that cannot be done.
    """
    every, trainable = count_parameters(model)
    print(f"{runtime}\ntraining {trainable:,} of {every:,} parameters")
    batches = next(iter(source.steps(0)))
    model.train()
    random_states = runtime.rng_state()
    with _flop_counter() as counter:
        _pass(model, batches[-1], runtime, loss_sum)
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        print(
            f"warning: {len(idle)} trainable tensors got no gradient and will not learn: {', '.join(idle[:8])}"
        )
    if compiled:
        print("compiling", flush=True)
        model.compile()
    replica = runtime.replicate(model, has_idle=bool(idle))
    try:  # compiles, allocates memory, meets the other ranks: nothing that a step's time should hold
        _pass(replica, batches[-1], runtime, loss_sum)
    except torch._dynamo.exc.TorchDynamoException as error:  # the same pass was fine before
        reason = reason_of(error)
        raise UserError(
            f"--compile: {reason}; install the C++ compiler that PyTorch wants or leave it out"
        ) from error
    model.zero_grad(set_to_none=True)
    runtime.set_rng_state(random_states)
    flops, tokens, rate = runtime.sum(
        counter.get_total_flops(), batches[-1].n_tokens, _product_rate(runtime)
    )
    print(f"{steps} optimizer steps of {source.rows_per_step} rows", flush=True)
    return replica, Floor(flops / max(tokens, 1), rate)


def speed_figures(clock: Clock, floor: Floor, steps_left: int, runtime: Runtime) -> dict:
    """What a log line says beside the loss; ``seconds_left`` is None while it cannot be told."""
    speed, left = clock.tokens_per_second(), clock.seconds_for(steps_left)
    return {
        "tokens_per_second": round(speed, 1),
        "matmul_share": round(floor.share(speed), 4),
        "peak_memory_mb": peak_memory_mb(runtime),
        "seconds": round(clock.elapsed(), 2),
        "seconds_left": None if left is None else round(left, 1),
    }


def peak_memory_mb(runtime: Runtime) -> int | None:
    """The most MB that this process has held: on the GPU if it uses one (MPS tells what it holds
    now), else in RAM.
    """
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated(runtime.device) >> 20
    if runtime.device.type == "mps":
        return torch.mps.driver_allocated_memory() >> 20
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (
        20 if sys.platform == "darwin" else 10
    )


def _pass(model: nn.Module, batch, runtime: Runtime, loss_sum: LossSum) -> None:
    with runtime.autocast():
        loss = loss_sum(model, runtime.move(batch))
    loss.backward()
    runtime.synchronize()


def _flop_counter() -> FlopCounterMode:
    """torch's counter, taught every fused attention: it knows none for CPUs, and in older versions
    no shared heads.
    """

    def forward(
        q, k, *_, **__
    ) -> int:  # two products, called with the shapes (B, heads, T or S, head_dim)
        return 4 * math.prod(q) * k[2]

    def backward(gradient, q, k, *_, **__) -> int:  # five: the scores are computed again
        return 10 * math.prod(q) * k[2]

    aten = torch.ops.aten
    known = {getattr(aten, name): forward for name in ATTENTION}
    known |= {getattr(aten, f"{name}_backward"): backward for name in ATTENTION}
    return FlopCounterMode(display=False, custom_mapping=known)


def _product_rate(runtime: Runtime) -> float:
    """FLOP/s of this rank's device at a square matrix product, the best of a few."""
    size = 1024 if runtime.device.type == "cpu" else 4096
    a = torch.ones(size, size, device=runtime.device, dtype=runtime.dtype)
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < PRODUCT_SECONDS:
        runtime.synchronize()
        started = time.perf_counter()
        a @ a
        runtime.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
