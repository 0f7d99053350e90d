"""From files to batches: nothing lost, nothing learned twice, everything counted exactly, every run
alike.
"""

import json
import math
import multiprocessing
import random
from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from conftest import write_rows as write

from core.errors import UserError
from core.paths import bundled_data
from dataset.batches import (
    IGNORED,
    KEEP,
    OWN,
    PASS_COST,
    Batches,
    KeepingBatches,
    PretrainDataset,
    SFTDataset,
    micro_batches,
    validation_batches,
)
from dataset.chat import encode_chat, encode_documents
from dataset.tokenizer import spelled_bytes

RNG = random.Random(2)
WORDS = ["the", "cat", "天地", "sat", "on", "一二三", "a", "mat", "😀", "and", "你好", "café"]


def words(least, most):
    return " ".join(RNG.choices(WORDS, k=RNG.randint(least, most)))


TEXTS = [{"text": words(1, 12)} for _ in range(40)] + [
    {"text": words(200, 300)},
    {"text": words(60, 90)},
]
CHATS = [
    {
        "conversations": [
            {"role": role, "content": words(1, 25)}
            for role in ["system"] * (n % 3 == 0) + ["user", "assistant"] * RNG.randint(1, 3)
        ]
    }
    for n in range(60)
]


@pytest.fixture
def texts(tmp_path):
    return write(tmp_path / "texts.jsonl", TEXTS)


@pytest.fixture
def chats(tmp_path):
    return write(tmp_path / "chats.jsonl", CHATS)


@pytest.fixture
def make(tokenizer, tmp_path):
    """A data set of one file; by default all of it is training data."""

    def make(kind, path, max_seq_len, val_ratio=0.0, **settings):
        return kind(
            (path,),
            tokenizer,
            max_seq_len,
            cache=tmp_path / "cache",
            val_ratio=val_ratio,
            **settings,
        )

    return make


def learned_texts(tokenizer, batch):
    """What each row of a batch learns, as bytes without control tokens."""
    control = set(tokenizer.all_special_ids)
    rows = [[int(n) for n in row if n != IGNORED and int(n) not in control] for row in batch.labels]
    return [b"".join(spelled_bytes(tokenizer, row)) for row in rows]


def check_batch(tokenizer, batch):
    """The contract of ``Batch``, recounted the slow way."""
    ids, labels = batch.inputs["input_ids"], batch.labels
    assert batch.inputs.keys() == {"input_ids"} and ids.dtype == labels.dtype == torch.int64
    assert ids.shape == labels.shape
    assert ((labels == ids) | (labels == IGNORED)).all() and (labels[:, 0] == IGNORED).all()
    assert batch.n_targets == sum(int(n) != IGNORED for row in labels for n in row) > 0
    assert batch.n_bytes == sum(map(len, learned_texts(tokenizer, batch)))
    assert batch.n_tokens == int((ids != tokenizer.pad_token_id).sum())


def window_rows(samples):
    return [(samples[n] >> 1, samples[n] & 1) for n in range(len(samples.lengths))]


# Pretraining


@pytest.mark.parametrize("max_seq_len", [2, 3, 7, 64, 65, 10_000])
def test_every_token_but_the_first_is_predicted_exactly_once(make, tokenizer, texts, max_seq_len):
    encoded = encode_documents(tokenizer, [row["text"] for row in TEXTS])
    stream = [pair for ids, learned in encoded for pair in zip(ids, learned, strict=True)]
    samples = make(PretrainDataset, texts, max_seq_len).train
    windows = window_rows(samples)
    assert len(windows) == len(samples.lengths) == -(-(len(stream) - 1) // (max_seq_len - 1))
    assert all(2 <= len(ids) <= max_seq_len for ids, _ in windows)
    assert all(len(ids) == max_seq_len for ids, _ in windows[:-1])
    predicted = [
        pair for ids, learned in windows for pair in zip(ids[1:], learned[1:], strict=True)
    ]
    assert [(int(n), bool(flag)) for n, flag in predicted] == stream[1:]
    assert all(left[0][-1] == right[0][0] for left, right in pairwise(windows))


@pytest.mark.parametrize("max_seq_len", [2, 33, 512])
def test_all_text_is_learned_and_its_bytes_are_counted(make, tokenizer, texts, max_seq_len):
    samples = make(PretrainDataset, texts, max_seq_len).train
    batches = [batch for step in Batches(samples, 4, 2, seed=0).steps(0) for batch in step]
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    assert not (labels == tokenizer.bos_token_id).any(), (
        "the beginning of a document is context, not learned"
    )
    assert (labels == tokenizer.eos_token_id).sum() == len(TEXTS)
    assert sum(batch.n_bytes for batch in batches) == sum(
        len(row["text"].encode()) for row in TEXTS
    )
    assert sum(batch.n_targets for batch in batches) == int((labels != IGNORED).sum())


def test_windows_describe_themselves(make, texts):
    data = make(PretrainDataset, texts, 64)
    assert data.train.describe().startswith(f"{len(TEXTS)} documents, ")
    assert (
        len(data.val.lengths) == 0
        and data.val.describe() == "0 documents, 0 tokens, 0 windows, 0 % truncated"
    )


# Chats


@pytest.mark.parametrize("max_seq_len", [2, 20, 40, "a chat's own", 10_000])
def test_a_chat_loses_its_tail_and_is_left_out_when_nothing_remains(
    make, tokenizer, chats, max_seq_len
):
    encoded = [encode_chat(tokenizer, row["conversations"]) for row in CHATS]
    max_seq_len = len(encoded[0][0]) if max_seq_len == "a chat's own" else max_seq_len
    kept = [
        (ids[:max_seq_len], flags[:max_seq_len])
        for ids, flags in encoded
        if any(flags[1:max_seq_len])
    ]
    if not kept:
        with pytest.raises(UserError, match=r"nothing is left to learn in .*chats.jsonl"):
            make(SFTDataset, chats, max_seq_len)
        return
    samples = make(SFTDataset, chats, max_seq_len).train
    assert [(ids.tolist(), flags.tolist()) for ids, flags in window_rows(samples)] == kept
    truncated = sum(len(ids) > max_seq_len for ids, _ in encoded)
    without_targets = len(CHATS) - len(kept)
    words = samples.describe()
    assert words.startswith(f"{len(kept)} chats, {sum(len(ids) for ids, _ in kept)} tokens, ")
    assert f", {100 * truncated / len(CHATS):.1f} % truncated at {max_seq_len}" in words
    assert (f", {without_targets} left out" in words) == (without_targets > 0)
    assert max_seq_len != 20 or 0 < without_targets < truncated, "the case is there"


def test_answers_alone_are_learned_and_counted(make, tokenizer, chats):
    samples = make(SFTDataset, chats, 10_000).train
    batch = samples.collate(np.arange(len(CHATS)))
    check_batch(tokenizer, batch)
    answers = [
        "".join(m["content"] for m in row["conversations"] if m["role"] == "assistant")
        for row in CHATS
    ]
    assert learned_texts(tokenizer, batch) == [answer.encode() for answer in answers]
    turns = sum(message["role"] == "assistant" for row in CHATS for message in row["conversations"])
    assert (batch.labels == tokenizer.eos_token_id).sum() == turns


# Batches of both kinds


@pytest.mark.parametrize(("kind", "file"), [(PretrainDataset, "texts"), (SFTDataset, "chats")])
@pytest.mark.parametrize("max_seq_len", [17, 64])
def test_batches_keep_their_contract(make, tokenizer, request, kind, file, max_seq_len):
    samples = make(kind, request.getfixturevalue(file), max_seq_len).train
    batches = Batches(samples, 4, 2, seed=3)
    steps = list(batches.steps(0))
    assert len(steps) == batches.steps_per_epoch == -(-len(samples.lengths) // 8)
    for step in steps:
        for batch in step:
            check_batch(tokenizer, batch)
            ids = batch.inputs["input_ids"]
            assert len(ids) <= 4 and ids.shape[1] <= max_seq_len
            padding = ids == tokenizer.pad_token_id
            assert not padding.all(dim=0).any(), "no column is padding alone"
            assert (padding[:, 1:] >= padding[:, :-1]).all(), "padding stands on the right"
            assert (batch.labels[padding] == IGNORED).all()
    sizes = sorted(sum(len(batch.labels) for batch in step) for step in steps)
    assert sizes[1:] == [8] * (len(steps) - 1)  # one may be smaller


@pytest.mark.parametrize(("own", "others"), [(9, (2, 3)), (2, (5, 1)), (3, (0,)), (4, (4,))])
def test_others_are_half_as_often_and_no_row_is_missing(make, chats, own, others):
    samples = make(SFTDataset, chats, 64).train
    digests, parts = iter(dict.fromkeys(samples.digests())), []
    for count in (own, *others):
        parts.append(samples.only([next(digests) for _ in range(count)]))
    mixed = parts[0].with_half(parts[1:]).digests()
    assert set(mixed) == {each for part in parts for each in part.digests()}
    times = [sum(each in set(part.digests()) for each in mixed) for part in parts]
    assert all(n in (0, times[0] // 2) for n in times[1:]) and times.count(0) == others.count(0)


def rows_in(step):
    """The samples of a step, unpadded."""
    rows = [row for batch in step for row in batch.inputs["input_ids"].tolist()]
    return [tuple(np.trim_zeros(row, "b")) for row in rows]


def flat(steps):
    return [
        (batch.inputs["input_ids"].tolist(), batch.labels.tolist())
        for step in steps
        for batch in step
    ]


def test_each_epoch_uses_every_sample_once_in_an_order_of_its_own(make, chats):
    samples = make(SFTDataset, chats, 40).train
    expected = Counter(tuple(ids.tolist()) for ids, _ in window_rows(samples))
    orders = []
    for seed in (0, 1):
        for epoch in (0, 1, 2):
            steps = list(Batches(samples, 2, 2, seed).steps(epoch))
            assert Counter(row for step in steps for row in rows_in(step)) == expected
            assert flat(Batches(samples, 2, 2, seed).steps(epoch)) == flat(steps)
            orders.append(json.dumps(flat(steps)))
    assert len(set(orders)) == 6


@pytest.mark.parametrize("start", [0, 1, 7, 14, 15])
def test_a_later_start_gives_the_tail_of_the_epoch(make, chats, start):
    batches = Batches(make(SFTDataset, chats, 10_000).train, 2, 2, seed=5)
    assert batches.steps_per_epoch == 15
    assert flat(batches.steps(1, start)) == flat(list(batches.steps(1))[start:])


def test_worker_processes_change_nothing(make, chats, capfd):
    samples = make(SFTDataset, chats, 40).train
    alone, helped = (Batches(samples, 4, 2, seed=1, num_workers=workers) for workers in (0, 2))
    assert flat(alone.steps(0, 2)) == flat(helped.steps(0, 2))
    assert capfd.readouterr().err == ""


def test_drawing_batches_leaves_the_random_state_alone(make, chats):
    """Otherwise dropout would go another way after a resume within an epoch."""
    samples = make(SFTDataset, chats, 40).train
    before = torch.get_rng_state()
    list(Batches(samples, 4, 2, seed=1).steps(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_steps_join_rows_of_like_length(make, chats, monkeypatch):
    samples = make(SFTDataset, chats, 10_000).train
    sizes = {}
    for pool in (1, 10):
        monkeypatch.setattr("dataset.batches.POOL", pool)
        sizes[pool] = sum(
            max(map(len, rows_in(step))) for step in Batches(samples, 3, 1, seed=1).steps(0)
        )
    assert sizes[10] < 0.8 * sizes[1]


def test_neither_steps_nor_their_rows_keep_an_order(make, chats, monkeypatch):
    samples = make(SFTDataset, chats, 10_000).train
    monkeypatch.setattr("dataset.batches.POOL", 3)
    first, second = (
        [rows_in(step) for step in Batches(samples, 3, 1, seed=1).steps(epoch)] for epoch in (0, 1)
    )
    assert set(map(frozenset, first)) != set(map(frozenset, second)), "other rows meet"
    lengths = [len(step[0]) for step in first]
    assert any(left > right for left, right in pairwise(lengths))
    assert any(lengths[n] < max(lengths[n + 1 : n + 3]) for n in range(0, len(lengths) - 2, 3)), (
        "not by length"
    )


@pytest.mark.parametrize(
    ("batch_size", "micro_tokens"), [(10, 2048), (3, 600), (100, 10), (1, 2048)]
)
def test_micro_batches_are_the_cheapest_cut_within_their_limits(
    make, chats, batch_size, micro_tokens
):
    samples = make(SFTDataset, chats, 10_000).train
    indices = np.arange(0, len(samples.lengths), 5)
    lengths = np.sort(samples.lengths[indices])[::-1]

    def cost(cuts):
        parts = [lengths[a:b] for a, b in pairwise((0, *cuts, len(lengths)))]
        if any(
            len(part) > batch_size or (len(part) > 1 and len(part) * part[0] > micro_tokens)
            for part in parts
        ):
            return math.inf
        return sum(len(part) * part[0] + micro_tokens * PASS_COST for part in parts)

    inner = range(1, len(lengths))
    cheapest = min(cost(cuts) for n in range(len(lengths)) for cuts in combinations(inner, n))
    parts = micro_batches(samples.lengths, indices, batch_size, micro_tokens)
    assert sorted(np.concatenate(parts)) == indices.tolist()
    assert cost(np.cumsum([len(part) for part in parts])[:-1]) == cheapest
    order = np.concatenate([samples.lengths[part] for part in parts])
    assert order.tolist() == lengths.tolist(), "the longest first"


@pytest.mark.parametrize("file", ["lora_identity.jsonl", "lora_medical.jsonl", "sft_mini"])
def test_little_of_what_is_computed_is_padding(tokenizer, tmp_path, file):
    samples = SFTDataset(
        (bundled_data(file),), tokenizer, 512, cache=tmp_path, val_ratio=0.05
    ).train
    batches = Batches(samples, 16, 1, seed=0)
    steps = [batch for step in batches.steps(1) for batch in step]
    share = sum(batch.n_tokens for batch in steps) / sum(batch.labels.numel() for batch in steps)
    assert share == batches.useful_share(1) >= 0.95
    for rank in range(4):
        assert Batches(samples, 16, 1, seed=0, rank=rank, world_size=4).useful_share(1) >= 0.95


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_each_step(make, chats, world_size):
    samples = make(SFTDataset, chats, 40).train
    alone = Batches(samples, 2, 2, seed=4, rows_per_step=4)
    ranks = [
        Batches(samples, 2, 2, 4, rank=n, world_size=world_size, rows_per_step=4)
        for n in range(world_size)
    ]
    for whole, *shares in zip(
        alone.steps(1, 2), *(rank.steps(1, 2) for rank in ranks), strict=True
    ):
        assert Counter(row for share in shares for row in rows_in(share) if row) == Counter(
            rows_in(whole)
        )
        assert sum(batch.n_tokens for share in shares for batch in share) == sum(
            batch.n_tokens for batch in whole
        )
        tokens = [sum(batch.n_tokens for batch in share) for share in shares]
        longest = max(len(row) for share in shares for row in rows_in(share))
        assert max(tokens) <= sum(tokens) / world_size + longest, "as much for each"
        targets = [sum(batch.n_targets for batch in share) for share in shares]
        assert all(targets) and sum(targets) == sum(batch.n_targets for batch in whole)
    assert Batches(samples, 2, 3, 4, world_size=world_size).rows_per_step == 6 * world_size


def test_a_process_without_rows_gets_one_masked_batch(make, chats):
    samples = make(SFTDataset, chats, 40).train
    ranks = [Batches(samples, 1, 1, 4, rank=rank, world_size=2, rows_per_step=1) for rank in (0, 1)]
    (idle,), (busy,) = sorted(
        (next(rank.steps(0)) for rank in ranks), key=lambda step: step[0].n_targets
    )
    assert (idle.labels == IGNORED).all() and idle.labels.shape == idle.inputs["input_ids"].shape
    assert (idle.n_targets, idle.n_bytes, idle.n_tokens) == (0, 0, 0) and busy.n_targets


@pytest.mark.parametrize("probed", [1000, 1])
@pytest.mark.parametrize(("batch_size", "micro_tokens"), [(3, 100_000), (100, 200), (4, 10)])
def test_the_largest_micro_batch_of_an_epoch_is_known_beforehand(
    make, chats, monkeypatch, batch_size, micro_tokens, probed
):
    samples = make(SFTDataset, chats, 10_000).train
    monkeypatch.setattr("dataset.batches.PROBED", probed)
    for rank in (0, 1):
        share = {"rank": rank, "world_size": 2, "num_workers": 1}
        batches = Batches(samples, batch_size, 2, 7, micro_tokens=micro_tokens, **share)
        (found,) = batches.largest_batches()
        assert multiprocessing.active_children() == [], "made in this process"
        largest = max(batch.labels.numel() for step in batches.steps(0) for batch in step)
        assert found.labels.numel() == largest or probed == 1
        assert 0.8 * largest < found.labels.numel() <= largest
        assert flat([[found]])[0] in flat(batches.steps(0))


# Steps of two kinds


@pytest.fixture
def two_kinds(make, chats):
    """Own batches, with so many workers, and those that also hold: 7 of 24 general rows a step."""
    data = make(SFTDataset, chats, 10_000, val_ratio=0.4)
    assert (len(data.train.lengths), len(data.val.lengths)) == (36, 24)

    def two_kinds(num_workers=0):
        own = Batches(data.train, 4, 2, 3, num_workers)
        general = Batches(data.val, 4, 2, 3, rows_per_step=7, micro_tokens=150)
        return own, KeepingBatches(own, general, weight=0.5)

    return two_kinds


def of_kind(kind, steps):
    return [[batch for batch in step if batch.kind == kind] for step in steps]


def test_each_own_step_also_gets_general_rows(two_kinds):
    own, both = two_kinds()
    sizes = "steps_per_epoch", "rows_per_step"
    assert [getattr(both, size) for size in sizes] == [getattr(own, size) for size in sizes]
    steps, alone = ([step for n in range(3) for step in each.steps(n)] for each in (both, own))
    assert flat(of_kind(OWN, steps)) == flat(alone)
    assert {(batch.kind, batch.weight) for step in steps for batch in step} == {
        (OWN, 1.0),
        (KEEP, 0.5),
    }
    kept = of_kind(KEEP, steps)
    assert all(step[-1].kind == KEEP for step in steps) and any(len(step) > 1 for step in kept)
    # 24 rows give 4 steps, one of them smaller; then they come again, in another order.
    counts = [len(rows_in(step)) for step in kept]
    assert [sorted(counts[n : n + 4]) for n in (0, 4, 8)] == [[3, 7, 7, 7]] * 3
    rounds = [[row for step in kept[n : n + 4] for row in rows_in(step)] for n in (0, 4, 8)]
    assert len(set(rounds[0])) == 24 and len({tuple(rows) for rows in rounds}) == 3
    assert len({frozenset(rows) for rows in rounds}) == 1
    assert not set(rounds[0]) & {row for step in of_kind(OWN, steps) for row in rows_in(step)}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_general_rows_of_a_step_follow_from_its_number_alone(two_kinds, num_workers):
    alone, both = two_kinds()[1], two_kinds(num_workers)[1]
    whole = [step for epoch in range(3) for step in alone.steps(epoch)]
    for epoch, start in ((0, 0), (0, 3), (1, 0), (1, 4), (2, 2)):
        done = epoch * 5 + start
        assert flat(both.steps(epoch, start)) == flat(whole[done : (epoch + 1) * 5])


def test_the_largest_micro_batches_are_one_of_each_kind(two_kinds):
    own, both = two_kinds()
    found = both.largest_batches()
    assert [(batch.kind, batch.weight) for batch in found] == [(OWN, 1.0), (KEEP, 0.5)]
    assert flat([found]) == flat([own.largest_batches() + both.general.largest_batches()])


def test_validation_reads_about_so_many_tokens_spread_over_all(make, chats):
    samples = make(SFTDataset, chats, 10_000).train
    total = sum(len(ids) for ids, _ in window_rows(samples))
    batches = validation_batches(samples, 4, total // 3)
    rows = rows_in(batches)
    assert [len(row) for row in rows] == sorted(map(len, rows), reverse=True), "little padding"
    count = len(samples.lengths)
    assert abs(len(rows) - count // 3) <= 1 and all(len(batch.labels) <= 4 for batch in batches)
    firsts, lasts = (tuple((samples[n] >> 1).tolist()) for n in (0, count - 1))
    assert firsts in rows and lasts in rows
    assert len(rows_in(validation_batches(samples, 4, 10 * total))) == count
    assert len(rows_in(validation_batches(samples, 4, 1))) == 1
    assert validation_batches(make(SFTDataset, chats, 40).val, 4, 100) == []
