"""Updates that vary LoRA: DoRA and PiSSA."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.lora.layer import Linear, LoRA, dense_weight

SMALLEST_NORM = 1e-6  # of a row: one that is shorter counts as this long, and 0 / 0 never occurs


def forward_with_dora(linear: Linear, x: Tensor) -> Tensor:
    """What replaces the ``forward`` of a Linear that carries a ``DoRA`` as its ``lora``."""
    y, lora = type(linear).forward(linear, x), linear.lora
    if not lora.is_on:
        return y
    weight, dtype = dense_weight(linear), lora.A.weight.dtype
    stretch = lora.stretch(weight).to(dtype)
    if lora.training and lora.dropout.p:
        x = lora.dropout(x.to(dtype))
        by_base = F.linear(x, weight.to(dtype))
        update = lora.B(lora.A(x) * lora.scaling)
    else:
        by_base = (y if linear.bias is None else y - linear.bias).to(dtype)
        update = lora(x)
    return y + ((stretch - 1) * by_base + stretch * update).to(y.dtype)


class DoRA(LoRA):
    """``magnitude * V / ||V||`` of each output, with V = W + scaling * B A (Liu et al. 2024).

    ``magnitude`` (outputs,) starts as the norm of W's rows. As in the paper, no gradient flows
    through the norm. Norms are at least ``SMALLEST_NORM``, so a row of zeros learns too.
    """

    patched_forward = staticmethod(forward_with_dora)

    def __init__(self, linear: Linear, *args, **kwargs):
        super().__init__(linear, *args, **kwargs)
        norm = dense_weight(linear).float().norm(dim=1)
        self.magnitude = nn.Parameter(norm.clamp_min(SMALLEST_NORM))

    def merged(self, weight: Tensor) -> Tensor:
        return self.stretch(weight).to(weight)[:, None] * super().merged(weight)

    def stretch(self, weight: Tensor) -> Tensor:
        """magnitude / ||V|| (outputs,) for W = ``weight``, fp32 or fp64."""
        # Under autocast's fp16 a small product B A would be 0.
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            norm = LoRA.merged(self, weight).norm(dim=1).clamp_min(SMALLEST_NORM)
        return self.magnitude / norm


class PiSSA(LoRA):
    """LoRA whose A and B start as the largest singular values of W (Meng et al. 2024).

    The paper takes them out of the frozen weight. Here the base stays, and the start, ``A0`` and
    ``B0``, is subtracted from the update. A file gets both as one ordinary LoRA of twice the rank.
    """

    def __init__(self, linear: Linear, rank: int, scaling: float = 1.0, *args):
        super().__init__(linear, rank, scaling, *args)
        U, S, V = torch.linalg.svd(dense_weight(linear).float(), full_matrices=False)
        root = (S[:rank] / scaling).sqrt()
        with torch.no_grad():
            self.A.weight.copy_(root[:, None] * V[:rank])
            self.B.weight.copy_(U[:, :rank] * root)
        self.register_buffer("A0", self.A.weight.detach().clone(), persistent=False)
        self.register_buffer("B0", self.B.weight.detach().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        started = F.linear(F.linear(x.to(self.A0.dtype), self.A0) * self.scaling, self.B0)
        return super().forward(x) - started

    def merged(self, weight: Tensor) -> Tensor:
        return super().merged(weight) - self.scaling * (self.B0.to(weight) @ self.A0.to(weight))

    def is_zero(self) -> bool:
        return torch.equal(self.A.weight, self.A0) and torch.equal(self.B.weight, self.B0)

    def exported(self) -> dict[str, Tensor]:
        A, B = torch.cat((self.A.weight, self.A0)), torch.cat((self.B.weight, -self.B0), dim=1)
        return {"A.weight": A, "B.weight": B}


def lora_of(linear: Linear, tensors: dict[str, Tensor], scaling: float = 1.0) -> LoRA:
    """The LoRA whose parameters are ``tensors`` (see ``exported``), copied where not fp32."""
    kind = DoRA if "magnitude" in tensors else LoRA
    with torch.device("meta"):  # nothing is drawn
        lora = kind(linear, tensors["A.weight"].size(0), scaling, init="none")
    lora.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, assign=True)
    return lora
