"""Pairs of answers: which rows they are read from, their ids, and the loss that prefers one."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarks.seeded_model import seeded_model
from core.paths import TOKENIZER_DIR
from dataset.batches import Batches, masked
from dataset.preferences import SIDES, PreferenceDataset, clean_pair
from dataset.rows import BadRow
from dataset.tokenizer import load_tokenizer
from model.loss import answer_log_probs, preference_sum

SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 6400}


def turns(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


WANTED = {"chosen": turns("Q", "good"), "rejected": turns("Q", "bad")}
OTHER_NAMES = {side: {"from": "gpt", "value": WANTED[side][-1]["content"]} for side in SIDES}


@pytest.mark.parametrize(
    "row",
    [
        WANTED,
        {"prompt": "Q", "chosen": "good", "rejected": "bad"},
        {"prompt": "Q", **WANTED},
        {"prompt": turns("Q"), "chosen": turns("Q", "good")[1:], "rejected": turns("Q", "bad")[1:]},
        {"conversations": [{"from": "human", "value": "Q"}], **OTHER_NAMES},
        {"question": "Q", "chosen": "good", "rejected": "bad"},
    ],
)
def test_pairs_are_read_in_every_style(row):
    assert clean_pair(row) == {"pair": WANTED}


def test_what_stands_before_the_answers_stays():
    row = {"system": "S", "prompt": turns("a", "b", "Q"), "chosen": "good", "rejected": "bad"}
    pair = clean_pair(row)["pair"]
    before = [{"role": "system", "content": "S"}, *turns("a", "b", "Q")]
    assert pair == {side: [*before, WANTED[side][-1]] for side in SIDES}
    history = {"instruction": "I", "input": "J", "history": [["a", "b"]]}
    pair = clean_pair({**history, "chosen": "x", "rejected": "y"})["pair"]
    assert [turn["content"] for turn in pair["chosen"]] == ["a", "b", "I\nJ", "x"]


@pytest.mark.parametrize(
    "row, why",
    [
        ({"chosen": "a", "rejected": "b"}, "chosen: an answer without its question"),
        ({"prompt": "Q", "chosen": "a", "rejected": "a"}, "the same answer"),
        ({"prompt": "R", **WANTED}, "chosen: it does not begin as prompt does"),
        ({**WANTED, "rejected": turns("R", "bad")}, "in more than their last answers"),
        ({"prompt": "Q", "chosen": "", "rejected": "b"}, "chosen: "),
        ({"prompt": "Q", "chosen": "a", "rejected": 3}, "rejected: "),
        ({"prompt": "Q", "chosen": "a"}, ""),
    ],
)
def test_what_is_no_pair_is_a_bad_row(row, why):
    with pytest.raises(BadRow, match=why):
        clean_pair(row)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        {
            "prompt": f"Question {n}?",
            "chosen": "yes " * (1 + n % 4),
            "rejected": "no " * (1 + n % 3),
        }
        for n in range(24)
    ]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    return PreferenceDataset((folder / "p.jsonl",), tokenizer, 64, cache=folder, val_ratio=0.1)


def test_both_chats_are_those_of_fine_tuning_up_to_the_end_of_the_answer(data):
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    for n in range(len(data.train.lengths)):
        texts = [tokenizer.decode(side >> 1) for side in data.train.sides(n)]
        asked = {text.partition("<|im_start|>assistant\n")[0] for text in texts}
        said = [text.partition("assistant\n")[2] for text in texts]
        assert len(asked) == 1 and [text[:2] for text in said] == ["ye", "no"]
        assert all(text.endswith("<|im_end|>") for text in said)
        learned = [tokenizer.decode((side >> 1)[side % 2 == 1]) for side in data.train.sides(n)]
        assert learned == said
        assert data.train.lengths[n] == 2 * max(map(len, data.train.sides(n)))


def naive(model, samples, beta, reference):
    """The loss by its formula, one chat at a time."""
    total = 0
    for n in range(len(samples.lengths)):
        moved = []
        for side in range(2):
            row = torch.from_numpy(samples.sides(n)[side].astype(np.int64))
            ids, learned = row >> 1, row % 2 == 1
            log_p = model(ids[None]).logits[0].log_softmax(-1)
            own = sum(log_p[t - 1, ids[t]] for t in range(1, len(ids)) if learned[t])
            moved.append(own - reference[n, side])
        total = total - torch.log(1 / (1 + torch.exp(-beta * (moved[0] - moved[1]))))
    return total


def test_loss_and_gradient_are_those_of_the_formula_however_they_are_cut(data):
    model, samples = seeded_model(SHAPE)[0].double(), data.train
    rng = torch.Generator().manual_seed(0)
    samples.reference = -30 * torch.rand(
        len(samples.lengths), 2, dtype=torch.float64, generator=rng
    )
    wanted = naive(model, samples, 0.3, samples.reference)
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    for batch_size, micro_tokens in ((5, 2048), (1, 64), (24, 300)):
        model.zero_grad()
        batches = Batches(samples, batch_size, 1, 0, micro_tokens=micro_tokens)
        parts = [batch for step in batches.steps(0) for batch in step]
        assert sum(batch.n_targets for batch in parts) == len(samples.lengths)
        found = 0.0
        for batch in (*parts, masked(parts[0])):
            loss = preference_sum(model, batch.inputs, batch.labels, batch.reference, 0.3)
            loss.backward()
            found += float(loss)
        assert abs(found - float(wanted)) <= 1e-10 * abs(float(wanted))
        for name, parameter in model.named_parameters():
            assert (parameter.grad - gradients[name]).abs().max() <= 1e-10


def test_the_first_loss_is_ln_2(data):
    model, _ = seeded_model(SHAPE)
    batch = data.train.collate(np.arange(6))
    with torch.no_grad():
        reference = answer_log_probs(model, batch.inputs, batch.labels)
        loss = preference_sum(model, batch.inputs, batch.labels, reference, 0.1)
    assert abs(float(loss) / 6 - math.log(2)) < 1e-6
