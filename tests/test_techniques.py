"""A technique that the benchmark swaps for another changes the time of a step, not its result."""

import pytest
import torch
from conftest import ragged_batch

from benchmarks import techniques
from core.errors import UserError
from model.loss import loss_sum

SWAPPED = (
    "autograd kernels",
    "real rotary pairs",
    "repeated keys and values",
    "fused projections",
    "attention by blocks",
)


@pytest.mark.parametrize("variant", SWAPPED)
def test_every_variant_is_the_same_function(tiny_model, variant):
    model, batch = tiny_model.double().train(), ragged_batch(3, 1, length=100)

    def loss_and_gradients():
        loss = loss_sum(model, batch)
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    ours = loss_and_gradients()
    with techniques.changed(variant):
        theirs = loss_and_gradients()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_an_unknown_variant_is_named():
    with pytest.raises(UserError, match="'Moun' is no variant; there are autograd kernels, "):
        techniques.main(["--variant", "Moun"])
