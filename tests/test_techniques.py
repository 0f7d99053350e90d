"""A technique that the benchmark swaps for another changes the time of a step, not its result."""

import json

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


def test_steps_of_a_variant_are_timed_beside_as_many_of_ours(tmp_path):
    result = tmp_path / "techniques.json"
    small = ["--dim", "32", "--n_layers", "1", "--max_seq_len", "32", "--rows", "2", "--steps", "2"]
    techniques.main(["--only", "attention by blocks", "--result", str(result), *small])
    found = json.loads(result.read_text(encoding="utf-8"))
    ratio = found["variants"]["attention by blocks"]["time_against_ours"]
    assert found["steps"] == 2 and 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    sides = techniques.step_seconds(
        techniques.Options(variant="Muon", dim=32, n_layers=1, max_seq_len=32, steps=3)
    )
    assert [len(seconds) for seconds in sides] == [3, 3]
