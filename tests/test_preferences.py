"""Pairs of answers: which rows they are read from, their ids, and the loss that prefers one."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import CPU, SMALL, flags, write_rows

import train_dpo
from benchmarks.seeded_model import seeded_model
from core.files import sha256_file
from core.paths import TOKENIZER_DIR, base_path, cache_dir, checkpoints_dir, lora_path, metrics_path
from dataset.batches import Batches, masked
from dataset.preferences import SIDES, PreferenceDataset, clean_pair, encode_pairs
from dataset.rows import BadRow
from dataset.tokenizer import load_tokenizer
from model.lora.skill_file import read_lora
from model.loss import answer_log_probs, preference_sum
from model.model_lora import attach_lora
from model.weights import RunRecord, choose_base, load_base, read_record
from scripts import inspect_data, prepare_data
from trainer.keeping import JUDGING_SHARE, judging_share
from trainer.preferences import evaluate_pairs, log_probs
from trainer.stage import Base

SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 6400}


PAIRS = [
    {"prompt": f"Question {n}?", "chosen": "yes " * (1 + n % 4), "rejected": "no " * (1 + n % 3)}
    for n in range(24)
]


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
        ({"prompt": "Q", "chosen": "a"}, 'no "chosen" and "rejected"'),
    ],
)
def test_what_is_no_pair_is_a_bad_row(row, why):
    with pytest.raises(BadRow, match=why):
        clean_pair(row)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    path = write_rows(folder / "p.jsonl", PAIRS)
    return PreferenceDataset(
        (path,), load_tokenizer(TOKENIZER_DIR), 64, cache=folder, val_ratio=0.1
    )


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


def test_only_the_last_answers_are_compared():
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    pair = clean_pair({"prompt": turns("a", "b", "Q"), "chosen": "good", "rejected": "bad"})["pair"]
    ids, learned = encode_pairs(tokenizer, [pair])[0]
    compared = [token for token, is_learned in zip(ids, learned, strict=True) if is_learned]
    assert tokenizer.decode(compared) == "good<|im_end|>bad<|im_end|>"


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
            found += loss.item()
        assert abs(found - wanted.item()) <= 1e-10 * abs(wanted.item())
        for name, parameter in model.named_parameters():
            assert (parameter.grad - gradients[name]).abs().max() <= 1e-10


def test_the_first_loss_is_ln_2(data):
    model, _ = seeded_model(SHAPE)
    batch = data.train.collate(np.arange(6))
    with torch.no_grad():
        reference = answer_log_probs(model, batch.inputs, batch.labels)
        loss = preference_sum(model, batch.inputs, batch.labels, reference, 0.1)
    assert abs(float(loss) / 6 - math.log(2)) < 1e-6


def test_what_is_measured_is_the_change_since_the_reference(data):
    model, _ = seeded_model(SHAPE)
    samples, beta = data.train, 0.2
    samples.reference = log_probs(model, samples, CPU)
    batches = [batch for _, batch in samples.in_order(7)]
    start = evaluate_pairs(model, batches, CPU, set(), beta)
    assert start.targets == len(samples.lengths) and abs(start.margin) < 1e-4
    assert start.loss == pytest.approx(math.log(2), abs=1e-5)
    other, rng = seeded_model(SHAPE)[0], torch.Generator().manual_seed(1)
    for parameter in other.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=rng)
    found = evaluate_pairs(other, batches, CPU, set(), beta)
    moved = log_probs(other, samples, CPU) - samples.reference
    margins = moved[:, 0] - moved[:, 1]
    assert found.loss == pytest.approx(float(torch.log1p((-beta * margins).exp()).mean()), rel=1e-4)
    numbers = [margins.mean(), *moved.mean(0), (margins > 0).double().mean()]
    measured = [found.margin, found.chosen, found.rejected, found.accuracy]
    assert measured == pytest.approx([float(x) for x in numbers], rel=1e-4)
    assert 0 < found.accuracy < 1


# the door

RUN = {**SMALL, "max_steps": 6, "log_interval": 1, "batch_size": 4, "val_ratio": 0.2}


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory):
    """A copy of the trained folder, with a file of pairs."""
    folder = tmp_path_factory.mktemp("preferred")
    shutil.copytree(trained.out, folder / "out")
    pairs = write_rows(folder / "pairs.jsonl", PAIRS)
    return folder / "out", flags(
        data_path=pairs, out_dir=folder / "out", general_data=trained.general
    )


def first_loss(out, run):
    return json.loads(metrics_path(out, run).read_text(encoding="utf-8").splitlines()[0])["loss"]


def test_all_weights_learn_the_preference_and_the_chat_takes_them(place, capsys):
    out, argv = place
    base = base_path(out, "full_sft", 64)
    before = base.read_bytes()
    path = train_dpo.main([*argv, *flags(**RUN, learning_rate=1e-3)])
    printed = capsys.readouterr().out
    assert path == base_path(out, "rlhf", 64) == choose_base(out)
    assert base.read_bytes() == before and first_loss(out, "rlhf_64") == pytest.approx(math.log(2))
    record, found = read_record(path), read_record(path).metrics
    assert record.stage == "rlhf" and record.base["fingerprint"] == read_record(base).fingerprint
    assert found["pairs"]["last"]["loss"] < math.log(2) - 0.01 < found["pairs"]["first"]["loss"]
    assert found["pairs"]["last"]["accuracy"] == 1 and found["general"]["last"]["kl"] > 0
    assert "preferred in 100%" in printed and found["verdict"]["sentence"] in printed
    learned = {entry["sha256"] for entry in record.data}
    assert learned > {entry["sha256"] for entry in read_record(base).data}


def test_a_skill_learns_the_preference_on_a_base_that_stays(place):
    out, argv = place
    base = base_path(out, "full_sft", 64)
    settings = {"base": base, "lora_name": "kind", "learning_rate": 1e-2}
    path = train_dpo.main([*argv, *flags(**RUN, **settings)])
    assert path == lora_path(out, "kind", 64) and first_loss(out, "lora_kind_64") == pytest.approx(
        math.log(2)
    )
    metrics = read_lora(path)[1].metrics
    assert metrics["pairs"]["last"]["loss"] < math.log(2) - 0.01
    model, _ = load_base(choose_base(out, skill_base=read_lora(path)[1].base))
    attach_lora(model, path)


@pytest.mark.parametrize("more", [{}, {"lora_name": "again"}])
def test_a_preference_resumes_bit_for_bit_from_the_same_reference(place, more, capsys):
    out, argv = place
    base = base_path(out, "full_sft", 64)
    words = [*argv, *flags(**RUN, **more, base=base, save_interval=3, keep=2)]
    path = train_dpo.main(words)
    whole, name = path.read_bytes(), path.name.removesuffix(".pth")
    shutil.rmtree(checkpoints_dir(out, name) / "step-6")
    capsys.readouterr()
    train_dpo.main([*words, "--resume"])
    assert path.read_bytes() == whole and "asking" not in capsys.readouterr().out


def test_a_reference_is_of_one_base_and_whole(place, tmp_path, capsys):
    out, argv = place

    def references(stage):
        words = {**RUN, "max_steps": 1, "out_dir": tmp_path, "base": base_path(out, stage, 64)}
        train_dpo.main([*argv, *flags(**words)])
        asked = capsys.readouterr().out.count("asking the base about")
        return asked, {path: path.read_bytes() for path in cache_dir(tmp_path).glob("reference-*")}

    asked, first = references("full_sft")
    assert asked == len(first) == 2, "one of the pairs to train on, one of those held out"
    asked, both = references("pretrain")
    assert asked == 2 and len(both) == 4 and len(set(both.values())) == 4
    for path, content in first.items():
        path.write_bytes(content[:-8])
    assert references("full_sft") == (2, both), "what is damaged is asked again"


def test_general_chats_hold_all_weights_to_what_they_were(place):
    out, argv = place
    moved = []
    for keep in (0, 100):
        words = flags(**RUN, base=base_path(out, "full_sft", 64), learning_rate=1e-3, keep=keep)
        path = train_dpo.main([*argv, *words])
        moved.append(read_record(path).metrics["general"]["last"]["kl"])
    assert moved[1] < moved[0] / 2


@pytest.mark.parametrize("stage, code", [("dpo", 0), ("auto", 1)])
def test_pairs_are_inspected_and_prepared(place, tmp_path, capsys, stage, code):
    _, argv = place
    pairs = argv[1]
    assert inspect_data.main([pairs, "--stage", stage]) == code
    printed = capsys.readouterr().out
    assert ("answers: 48, of which 48 are learned" in printed) == (code == 0)
    assert ("set aside" in printed) is False
    if code == 0:
        prepare_data.main([pairs, *flags(stage=stage, out_dir=tmp_path)])
        assert "24 preference rows" in capsys.readouterr().out


def test_chats_that_only_held_a_base_are_not_what_it_has_learned(trained):
    sha256 = sha256_file(trained.general)
    for option, expected in (("general_data", (JUDGING_SHARE, False)), ("data_path", (0.1, False))):
        record = RunRecord(data=[{"option": option, "sha256": sha256}], val_ratio=0.1)
        base = Base(trained.general, None, None, record)
        options = train_dpo.Options(out_dir=trained.out)
        assert judging_share(base, [trained.general], options) == expected
