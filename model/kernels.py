"""Three memory-saving operations with hand-written gradients, tested against plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # the label of a position that is not learned, PyTorch's own default
# How many positions have logits at the same time: 26 MB in fp32 for 6,400 tokens.
TARGETS_AT_ONCE = 1024
# The same on a CPU with a frozen head: nothing is summed over slices, so small slices cost nothing.
FROZEN_AT_ONCE = 128


class _RMSNorm(torch.autograd.Function):
    """``weight * F.rms_norm(x.float(), ...).type_as(x)`` over the last dimension, or in fp64."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square().div_(x.size(-1))
        scale = mean_square.add_(eps).rsqrt_()  # (..., 1)
        normed = (wide * scale).type_as(x)
        ctx.save_for_backward(normed, scale, weight)
        return weight * normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        normed, scale, weight = ctx.saved_tensors
        product = (grad * normed).flatten(0, -2)
        grad_weight = product.sum(0).type_as(weight) if ctx.needs_input_grad[1] else None
        # d/dx of x * scale(x) is scale * (grad - normed * mean(grad * normed)), with grad already
        # times weight.
        mean = (product @ weight.type_as(product)).div_(-normed.size(-1)).view(scale.shape)
        grad_x = torch.addcmul(grad * weight, normed, mean.type_as(normed)).mul_(scale)
        return grad_x, grad_weight, None


class _SwiGLU(torch.autograd.Function):
    """``F.silu(gate) * up``, which keeps only its two inputs for the backward pass."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _LinearCrossEntropy(torch.autograd.Function):
    """``F.cross_entropy(hidden @ weight.T, targets, reduction="sum")``, a slice of N at a time.

    ``hidden`` (N, D), ``weight`` (V, D), ``targets`` (N,) int64, none of them ignored. The softmax
    is fp32, or fp64 for fp64 inputs; under autocast, products are in its dtype. The gradients are
    computed in the forward pass, so that all logits never exist at once.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        narrow = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = hidden.new_zeros((), dtype=wide)
        at_once = FROZEN_AT_ONCE if kind == "cpu" and grad_weight is None else TARGETS_AT_ONCE
        for start in range(0, len(targets), at_once):
            part = slice(start, start + at_once)
            inputs, wanted = hidden[part].to(dtype), targets[part, None]
            log_p = F.log_softmax(inputs @ narrow.t(), -1, dtype=wide)  # (n, V)
            loss -= log_p.gather(1, wanted).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            slope = log_p.exp_()  # softmax minus the one-hot target
            slope.scatter_add_(1, wanted, slope.new_full(wanted.shape, -1.0))
            slope = slope.to(dtype)
            if grad_hidden is not None:
                grad_hidden[part] = slope @ narrow
            if grad_weight is not None:
                grad_weight += slope.t() @ inputs
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return *(None if saved is None else saved * grad for saved in ctx.saved_tensors), None


rms_norm, swiglu = _RMSNorm.apply, _SwiGLU.apply
linear_cross_entropy = _LinearCrossEntropy.apply
