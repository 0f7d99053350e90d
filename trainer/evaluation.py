"""Held-out loss and bits per byte."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.runtime import Runtime


@dataclass(frozen=True)
class Metrics:
    """``loss``: nats per supervised target. ``bits_per_byte``: of the learned text, control tokens in neither part.

    Both are NaN when nothing was supervised (``targets`` 0).
    """

    loss: float
    bits_per_byte: float
    targets: int
    bytes: int

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, {self.bits_per_byte:.4f} bits per byte" if self.targets else "nothing held out"


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable, runtime: Runtime, *, loss_sum: Callable[[nn.Module, object], Tensor]
) -> Metrics:
    """Token mean over ``batches``. ``loss_sum(model, batch)`` returns two sums in nats: all targets, text alone.

    The model is put into eval mode and back, and runs uncompiled: its many lengths would cost programs of their own.
    """
    was_training = model.training
    model.eval()
    nats, text_nats, targets, text_bytes = 0.0, 0.0, 0, 0
    for batch in batches:
        with runtime.autocast(), torch.compiler.set_stance("force_eager"):
            every, text = loss_sum(model, runtime.move(batch)).tolist()
        nats, text_nats = nats + every, text_nats + text
        targets, text_bytes = targets + batch.n_targets, text_bytes + batch.n_bytes
    model.train(was_training)
    bits = text_nats / math.log(2)
    loss = nats / targets if targets else math.nan
    return Metrics(loss, bits / text_bytes if text_bytes else math.nan, targets, text_bytes)
