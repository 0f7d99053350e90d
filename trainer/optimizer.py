"""Parameter groups and the learning-rate schedule."""

import torch
from torch import nn

# Schedule, warm-up and betas are the best of benchmarks/results/sweep_recipe.json.
BETAS = (0.9, 0.95)
DECAY = 0.4  # share of the steps after the warm-up in which the rate falls


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The trainable parameters: matrices decay, vectors (norms) do not. Tied tensors count once."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_optimizer(groups: list[dict], learning_rate: float) -> torch.optim.AdamW:
    """Fused AdamW over the groups that hold anything."""
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=BETAS, fused=True)


def warmup_steps(asked: int, total: int) -> int:
    """``--warmup_iters``, or 1 % of the run when it is 0."""
    return asked or round(0.01 * total)


def lr_at(step: int, total: int, warmup: int, peak: float) -> float:
    """Learning rate of optimizer step ``step`` in [0, total): linear warm-up, ``peak``, linear decay to zero."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    left = 1 - (step - warmup) / max(total - warmup, 1)
    return peak * min(1.0, left / DECAY)
