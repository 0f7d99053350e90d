"""What holds a skill to its base: the divergence of their next tokens on general chats."""

import torch
from torch import Tensor, nn

from model.kernels import IGNORED
from model.lora.layer import without_lora


def keep_sum(
    model: nn.Module, base: nn.Module, inputs: dict[str, Tensor], labels: Tensor
) -> Tensor:
    """KL(p_base || p_model) in nats, over the learned ``labels`` (B, T) int64; 0 without any.

    ``base`` is the model itself, or what ``model`` wraps: with its LoRA switched off and in
    evaluation mode, uncompiled, it is the teacher. No gradient flows into it. The sum over the
    vocabulary is in fp32, or fp64 for such logits. Raises ``UserError`` for a ``base`` without
    LoRA.
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
