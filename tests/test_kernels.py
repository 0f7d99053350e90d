"""The hand-written gradients against autograd's own, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.kernels import FROZEN_AT_ONCE, TARGETS_AT_ONCE, linear_cross_entropy, rms_norm, swiglu


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def values_and_gradients(operation, tensors, trainable):
    """The output, and the gradient of its sum under random weights for each input (None where not
    trainable).
    """
    inputs = [
        tensor.clone().requires_grad_(wanted)
        for tensor, wanted in zip(tensors, trainable, strict=True)
    ]
    out = operation(*inputs)
    (out * random(*out.shape, seed=9, dtype=out.dtype)).sum().backward()
    return out.detach(), [tensor.grad for tensor in inputs]


def agree(ours, plain, tensors, trainable):
    (value, gradients), (expected, wanted) = (
        values_and_gradients(f, tensors, trainable) for f in (ours, plain)
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for gradient, expected in zip(gradients, wanted, strict=True):
        assert (gradient is None) == (expected is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("trainable", [(True, True), (True, False), (False, True)])
def test_rms_norm(trainable):
    agree(
        lambda x, weight: rms_norm(x, weight, 1e-2),
        lambda x, weight: weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-2),
        (random(2, 5, 12), random(12, seed=1)),
        trainable,
    )


def test_rms_norm_of_bf16_takes_its_statistics_in_fp32():
    x, weight = random(3, 64).bfloat16() * 100, random(64, seed=1).bfloat16()
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-5), expected)


@pytest.mark.parametrize("trainable", [(True, True), (True, False), (False, True)])
def test_swiglu(trainable):
    agree(
        swiglu, lambda gate, up: F.silu(gate) * up, (random(4, 9), random(4, 9, seed=1)), trainable
    )


@pytest.mark.parametrize("trainable", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("count", [0, 1, TARGETS_AT_ONCE, 2 * TARGETS_AT_ONCE + 3])
def test_linear_cross_entropy(count, trainable):
    targets = torch.randint(0, 11, (count,), generator=torch.Generator().manual_seed(2))
    agree(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, targets),
        lambda hidden, weight: F.cross_entropy(hidden @ weight.t(), targets, reduction="sum"),
        (random(count, 6), random(11, 6, seed=1)),
        trainable,
    )


def test_a_frozen_head_holds_fewer_logits_at_once():
    longest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            nonlocal longest
            out = operation(*args, **(kwargs or {}))
            if (
                isinstance(out, torch.Tensor)
                and out.dim() == 2
                and out.size(1) == 11
                and out.size(0) != 6
            ):
                longest = max(longest, out.size(0))
            return out

    count = 2 * FROZEN_AT_ONCE + 3
    targets = torch.randint(0, 11, (count,), generator=torch.Generator().manual_seed(2))
    with Watch():
        linear_cross_entropy(random(count, 6).requires_grad_(), random(11, 6, seed=1), targets)
    assert longest == FROZEN_AT_ONCE


def test_linear_cross_entropy_needs_no_gradient_and_takes_its_softmax_in_fp32():
    hidden, weight = random(3, 6).bfloat16(), random(11, 6, seed=1).bfloat16() * 30
    targets = torch.tensor([1, 5, 10])
    expected = F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")
    assert torch.equal(linear_cross_entropy(hidden, weight, targets), expected)


def test_linear_cross_entropy_multiplies_in_autocasts_dtype():
    hidden, weight, targets = (
        random(3, 6).float(),
        random(11, 6, seed=1).float(),
        torch.tensor([1, 5, 10]),
    )
    with torch.autocast("cpu", torch.bfloat16):
        ours, ours_grads = values_and_gradients(
            lambda hidden, weight: linear_cross_entropy(hidden, weight, targets),
            (hidden, weight),
            (True, True),
        )
        plain, plain_grads = values_and_gradients(
            lambda h, w: F.cross_entropy(F.linear(h, w).float(), targets, reduction="sum"),
            (hidden, weight),
            (True, True),
        )
    assert torch.equal(ours, plain) and ours.dtype == torch.float32
    for gradient, expected in zip(ours_grads, plain_grads, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected, rtol=2e-2, atol=2e-2)
