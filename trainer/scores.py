"""The scores of a text classifier on held-out rows."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.batches import Batch
from trainer.runtime import Runtime


@dataclass(frozen=True)
class Scores:
    """How a classifier does on ``targets`` rows; NaN without any.

    ``loss`` is in nats a row. ``f1`` is that of label 1 where there are two labels, else the mean
    over all. ``mcc`` is Matthews' correlation, for any number of labels that of Gorodkin (2004),
    and 0 where it has no value.
    """

    loss: float
    accuracy: float
    f1: float
    mcc: float
    targets: int


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[Batch], runtime: Runtime) -> Scores:
    """Score a classifier with ``logits`` (B, labels) on ``batches`` with ``labels`` (B,)."""
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
