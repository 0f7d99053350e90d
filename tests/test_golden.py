"""The model computes what MiniMind's own code did: figures of benchmarks/parity_minimind.py."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.seeded_model import (
    add_seeded_lora,
    one_by_one,
    seeded_model,
    swap_rotary_pair,
    whole,
)

FILE = Path(__file__).parent / "golden" / "parity_minimind.json"
GOLDEN = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.fixture
def model_and_ids():
    return seeded_model(GOLDEN["config"])


def difference(logits, key):
    expected = torch.tensor(GOLDEN[key])
    picked = logits[:, GOLDEN["positions"]]
    assert picked.shape == expected.shape
    return (picked - expected).abs().max().item()


def test_logits_are_minimind_s(model_and_ids):
    model, ids = model_and_ids
    assert difference(whole(model, ids), "base") <= 1e-5
    assert difference(one_by_one(model, ids), "base") <= 1e-5


def test_logits_with_lora_are_minimind_s(model_and_ids):
    model, ids = model_and_ids
    add_seeded_lora(model, GOLDEN["rank"])
    assert difference(whole(model, ids), "lora") <= 1e-5
    assert difference(one_by_one(model, ids), "lora") <= 1e-5


def test_the_figures_tell_a_wrong_model_apart(model_and_ids):
    model, ids = model_and_ids
    assert difference(whole(model, ids), "lora") > 0.1, "LoRA left out"
    swap_rotary_pair(model)
    assert difference(whole(model, ids), "base") > 0.1, "cosine and sine of one rotary pair swapped"
