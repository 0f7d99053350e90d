"""Losses beside cross-entropy: what holds a model to its base, and what prefers an answer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import IGNORED
from model.lora.layer import without_lora


def keep_sum(
    model: nn.Module, base: nn.Module, inputs: dict[str, Tensor], labels: Tensor
) -> Tensor:
    """KL(p_base || p_model) in nats, over the learned ``labels`` (B, T) int64; 0 without any.

    ``base`` is the model itself, what ``model`` wraps, or a frozen copy of what it was: with its
    LoRA switched off and in evaluation mode, uncompiled, it is the teacher. No gradient flows into
    it. The sum over the vocabulary is in fp32, or fp64 for such logits. Raises ``UserError`` for a
    ``base`` that trains without a LoRA.
    """
    learned = labels[:, 1:] != IGNORED  # (B, T - 1): the logits at t predict t + 1

    def log_p(module: nn.Module) -> Tensor:  # (learned, V)
        logits = module(**inputs).logits[:, :-1][learned]
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return logits.log_softmax(-1, wide)

    was_training = base.training
    with torch.no_grad(), without_lora(base), torch.compiler.set_stance("force_eager"):
        try:
            wanted = log_p(base.eval())
        finally:
            base.train(was_training)
    return nn.functional.kl_div(log_p(model), wanted, reduction="sum", log_target=True)


def preference_sum(
    model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, reference: Tensor, beta: float
) -> Tensor:
    """Direct preference optimisation's loss (Rafailov et al. 2023), summed over pairs.

    ``-log sigmoid(beta * (moved(chosen) - moved(rejected)))``, where a chat has moved by its
    ``answer_log_probs`` minus ``reference`` (B,), what these were before. The first half of
    ``labels`` (B, T) belongs to chosen chats. Pairs without learned labels count 0.
    """
    moved = answer_log_probs(model, inputs, labels)
    chosen, rejected = (moved - reference.to(moved)).chunk(2)
    counts = (labels != IGNORED).any(1).chunk(2)[0]
    return (preference_loss(chosen - rejected, beta) * counts).sum()


def preference_loss(margins: Tensor, beta: float) -> Tensor:
    """``-log sigmoid(beta * margin)`` of each of ``margins``, in nats."""
    return -F.logsigmoid(beta * margins)


def answer_log_probs(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """``log p`` in nats of all learned ``labels`` (B, T) of each row, (B,); fp32, or else fp64."""
    learned, targets = labels[:, 1:] != IGNORED, labels[:, 1:]
    logits = model(**inputs).logits[:, :-1][learned]
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    nats = F.cross_entropy(logits.to(wide), targets[learned], reduction="none")
    each = nats.new_zeros(learned.shape)  # not index_add, whose order of sums is a GPU's own
    each[learned] = -nats
    return each.sum(1)
