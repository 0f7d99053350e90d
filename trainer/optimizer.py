"""Muon and AdamW as one optimizer, what each of them updates, and the learning-rate schedule."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from core.errors import UserError
from trainer.runtime import multiplies_bf16

# Numbers without another source, and the schedule's defaults, come from
# benchmarks/results/sweep_recipe.json, which docs/engine.md reads.
BETAS = (0.8, 0.95)
MOMENTUM = 0.95  # Muon's (Jordan 2024), as are the coefficients and the number of iterations
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOST_TOGETHER = 1 << 23  # numbers of the matrices that are computed at once
# The RMS of AdamW's updates. Muon's are given the same, so they need no rate of their own (Liu et
# al. 2025).
ADAMW_RMS = 0.2


def param_groups(
    model: nn.Module,
    weight_decay: float,
    optimizer: str = "adamw",
    fast: Iterable[nn.Parameter] = (),
    lr_ratio: float = 1.0,
) -> list[dict]:
    """The trainable parameters in groups: matrices decay, vectors (norms) do not.

    With ``optimizer`` "muon", Muon updates the weights of the Linear layers except a tied head.
    The learning rate of the ``fast`` parameters is ``lr_ratio`` times that of the others (LoRA+,
    Hayou et al. 2024). A tied tensor counts once.
    """
    linears, fast, groups = set(), {id(parameter) for parameter in fast}, {}
    if optimizer == "muon":
        linears = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
        linears -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in [p for p in model.parameters() if p.requires_grad]:
        decay = weight_decay if parameter.dim() > 1 else 0.0
        ratio = lr_ratio if id(parameter) in fast else 1.0
        settings = {"weight_decay": decay, "muon": id(parameter) in linears, "lr_ratio": ratio}
        group = groups.setdefault(tuple(settings.values()), {"params": [], **settings})
        group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(
    groups: list[dict], learning_rate: float, name: str, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer called ``name``. Raises ``UserError`` where bitsandbytes is missing."""
    if name != "paged_adamw":
        return MuonAdamW(groups, learning_rate)
    if device.type != "cuda":
        print(f"note: only NVIDIA GPUs page; on {device} paged_adamw is adamw")
        return MuonAdamW(groups, learning_rate)
    try:
        from bitsandbytes.optim import PagedAdamW
    except ImportError as error:
        raise UserError("paged_adamw needs: pip install -r requirements-4bit.txt") from error
    return PagedAdamW(groups, lr=learning_rate, betas=BETAS)


class MuonAdamW(torch.optim.AdamW):
    """Fused AdamW, and Muon (Jordan 2024) for the groups whose ``muon`` is true.

    Muon's update is the momentum with all its singular values brought to about 1. Its state is
    AdamW's without the second moment.
    """

    def __init__(self, groups: list[dict], learning_rate: float):
        super().__init__(groups, lr=learning_rate, betas=BETAS, fused=True)
        # Without it a GradScaler that skips a step would skip AdamW's part alone.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self) -> None:
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                self._muon(group)
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step()
        self.param_groups = groups

    def _muon(self, group: dict) -> None:
        """Update the matrices of a group, those of a shape together: that makes products large."""
        alike, rate = defaultdict(list), group["lr"]
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike[parameter.shape, parameter.device].append(parameter)
        for (shape, device), several in alike.items():
            # Either precision is enough.
            dtype = torch.bfloat16 if multiplies_bf16(device) else torch.float32
            together = max(1, MOST_TOGETHER // shape.numel())
            for part in (several[n : n + together] for n in range(0, len(several), together)):
                updates = orthogonalized(torch.stack([self._nesterov(p) for p in part]), dtype)
                for parameter, update in zip(part, updates, strict=True):
                    parameter.mul_(1 - rate * group["weight_decay"])
                    parameter.add_(update, alpha=-rate * ADAMW_RMS * math.sqrt(max(shape)))

    def _nesterov(self, parameter: nn.Parameter) -> Tensor:
        """Count a step; the gradient with Nesterov's momentum."""
        state, gradient = self.state[parameter], parameter.grad
        if not state:
            state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(parameter)
        state["step"] += 1
        momentum = state["exp_avg"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM)


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """``matrices`` (K, N, M), each with its singular values brought to about 1 by Newton-Schulz.

    The smallest singular values do not get all the way there.
    """
    x = matrices.to(dtype)
    if tall := x.size(1) > x.size(2):
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def lr_at(step: int, total: int, warmup: int, decay: float, peak: float) -> float:
    """The rate of step ``step`` in [0, total): it rises, stays at ``peak`` and falls to 0.

    ``decay`` is the share of the steps after the warm-up in which it falls. Both slopes are linear.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    left = 1 - (step - warmup) / max(total - warmup, 1)
    return peak * min(1.0, left / decay)
