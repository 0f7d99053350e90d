"""The two losses that the training doors hand to the loop. They fit any causal LM with Hugging
Face's ``labels``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import IGNORED


def loss_sum(model: nn.Module, batch) -> Tensor:
    """Cross-entropy in nats summed over the supervised targets of a ``Batch``; 0 when there are
    none.
    """
    return model(**batch.inputs, labels=batch.labels, num_items_in_batch=1).loss


def nats_of(control: set[int]):
    """A loss for evaluation: ``(model, batch) -> (2,)``, the nats of all targets and those of text
    alone.

    ``control``: the ids that stand for no text.
    """
    control_ids = torch.tensor(sorted(control))

    def sums(model: nn.Module, batch) -> Tensor:
        logits = model(**batch.inputs).logits[:, :-1].flatten(0, 1).float()
        targets = batch.labels[:, 1:].flatten()
        nats = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        is_text = ~torch.isin(targets, control_ids.to(targets.device))
        return torch.stack((nats.sum(), nats[is_text].sum()))

    return sums
