"""Held-out loss and bits per byte."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.runtime import Runtime


@dataclass(frozen=True)
class Metrics:
    """``loss``: nats per supervised target. ``bits_per_byte``: of the learned text, control tokens
    in neither part.

    Both are NaN when nothing was supervised (``targets`` 0).
    """

    loss: float
    bits_per_byte: float
    targets: int
    bytes: int

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}, {self.bits_per_byte:.4f} bits per byte"
            if self.targets
            else "nothing held out"
        )

    def figures(self) -> dict[str, float]:
        """What a log line says of it."""
        return {"loss": self.loss, "bits_per_byte": self.bits_per_byte}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable,
    runtime: Runtime,
    *,
    loss_sum: Callable[[nn.Module, object], Tensor],
) -> Metrics:
    """Token mean over ``batches``. ``loss_sum(model, batch)`` returns two sums in nats: all
    targets, text alone.

    The model is put into eval mode and back, and runs uncompiled: its many lengths would cost
    programs of their own.
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


@dataclass(frozen=True)
class Scores:
    """A classifier on ``targets`` rows; NaN without any.

    ``loss``: nats a row. ``f1``: of label 1 where there are two, else the mean over all labels.
    ``mcc``: Matthews' correlation, for any number of labels that of Gorodkin (2004); 0 where it has
    no value.
    """

    loss: float
    accuracy: float
    f1: float
    mcc: float
    targets: int

    def __str__(self) -> str:
        if not self.targets:
            return "nothing held out"
        return f"loss {self.loss:.4f}, accuracy {self.accuracy:.4f}, F1 {self.f1:.4f}, Matthews {self.mcc:.4f}"

    def figures(self) -> dict[str, float]:
        """What a log line says of it."""
        return {"loss": self.loss, "accuracy": self.accuracy, "f1": self.f1, "mcc": self.mcc}


@torch.no_grad()
def score(model: nn.Module, batches: Iterable, runtime: Runtime) -> Scores:
    """The scores of a classifier, whose ``logits`` are (B, labels), over ``batches`` with
    ``labels`` (B,).
    """
    was_training = model.training
    model.eval()
    nats, predicted, labels, count = 0.0, [], [], 0
    for batch in batches:
        with runtime.autocast(), torch.compiler.set_stance("force_eager"):
            logits = model(**runtime.move(batch).inputs).logits.float().cpu()
        nats += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
        predicted.append(logits.argmax(-1))
        labels.append(batch.labels)
        count = logits.size(-1)
    model.train(was_training)
    if not labels:
        return Scores(math.nan, math.nan, math.nan, math.nan, 0)
    # table[t, p]: how many rows of label t were called p
    table = torch.zeros(count, count, dtype=torch.float64)
    table.index_put_(
        (torch.cat(labels), torch.cat(predicted)),
        torch.ones((), dtype=torch.float64),
        accumulate=True,
    )
    return scores_of(table, nats / float(table.sum()))


def scores_of(table: Tensor, loss: float) -> Scores:
    """The scores of a confusion table (true labels, predicted labels), float64."""
    total, right = float(table.sum()), table.diagonal()
    true, called = table.sum(1), table.sum(0)
    f1 = 2 * right / (true + called).clamp(min=1)
    covariance = float(right.sum()) * total - float(true @ called)
    spread = math.sqrt((total**2 - float(called @ called)) * (total**2 - float(true @ true)))
    return Scores(
        loss,
        float(right.sum()) / total,
        float(f1[1] if len(f1) == 2 else f1.mean()),
        covariance / spread if spread else 0.0,
        int(total),
    )
