"""Decoding: short pure functions, and the loop around them."""

import copy

import pytest
import torch
from tokenizers.decoders import DecodeStream

from core.errors import UserError
from core.paths import TOKENIZER_DIR
from dataset.tokenizer import load_tokenizer
from model.generation import (
    TOGETHER,
    Sampling,
    generate,
    generate_all,
    keep_top_k,
    keep_top_p,
    next_token,
    penalize_repetition,
)

GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


def run(model, ids, sampling, stop=frozenset(), seed=0) -> list[int]:
    return list(generate(model, ids, sampling, set(stop), torch.Generator().manual_seed(seed)))


def test_greedy_decoding_with_a_cache_equals_argmax_without_one(tiny_model):
    ids = [5, 6, 7]
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(tiny_model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert run(tiny_model, [5, 6, 7], GREEDY) == ids[3:]


def test_it_ends_before_a_stop_id_at_the_limit_or_where_the_context_ends(tiny_model):
    free = run(tiny_model, [5, 6, 7], GREEDY)
    assert len(free) == 12
    assert run(tiny_model, [5, 6, 7], GREEDY, stop={free[4]}) == free[: free.index(free[4])]
    context = tiny_model.config.max_seq_len
    prompt = [5] * (context - 3)
    assert len(run(tiny_model, prompt, GREEDY)) == 3
    for bad in ([], [5] * context):
        with pytest.raises(UserError, match="context"):
            run(tiny_model, bad, GREEDY)


def test_a_seed_repeats_and_another_differs(tiny_model):
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=20)
    assert run(tiny_model, [5], sampling, seed=1) == run(tiny_model, [5], sampling, seed=1)
    assert run(tiny_model, [5], sampling, seed=1) != run(tiny_model, [5], sampling, seed=2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_among_many_gets_the_tokens_that_it_gets_alone(tiny_model, temperature):
    model = copy.deepcopy(tiny_model).double()  # a batch rounds elsewhere, far below any toss-up
    sampling = Sampling(temperature, 0.9, repetition_penalty=9.0, max_new_tokens=12)
    prompts = [[5, 6, 7], [8], [7, 6, 5], [9], *([n, 8, 3] for n in range(TOGETHER))]
    alone = [run(model, ids, sampling, seed=n) for n, ids in enumerate(prompts)]
    stop = {alone[0][3], alone[1][5], alone[5][9]}
    alone = [run(model, ids, sampling, stop, seed=n) for n, ids in enumerate(prompts)]
    assert len(set(map(len, alone))) > 3
    rngs = [torch.Generator().manual_seed(n) for n in range(len(prompts))]
    assert generate_all(model, prompts, sampling, stop, rngs) == alone
    if temperature:  # a prompt that ended draws no more, so that its chat goes on as it does alone
        again = torch.Generator().manual_seed(0)
        list(generate(model, prompts[0], sampling, stop, again))
        assert (rngs[0].get_state() == again.get_state()).all()
    assert generate_all(model, [], sampling, stop, []) == []


def test_the_penalty_makes_repeats_less_likely_whatever_the_sign():
    logits = torch.tensor([2.0, -2.0, 1.0, 0.0])
    assert penalize_repetition(logits, [0, 1, 1], 2.0).tolist() == [1.0, -4.0, 1.0, 0.0]
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.0]  # the model's own tensor is left alone
    before, after = logits.softmax(-1), penalize_repetition(logits, [0, 1], 2.0).softmax(-1)
    assert (after[:2] < before[:2]).all()


def test_top_k_and_top_p_keep_exactly_the_likeliest():
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    logits = probabilities.log()

    def kept(filtered):
        return [index for index, value in enumerate(filtered.tolist()) if value > -torch.inf]

    assert kept(keep_top_k(logits, 2)) == [1, 3]
    assert kept(keep_top_k(logits, 0)) == kept(keep_top_k(logits, 9)) == [0, 1, 2, 3]
    # the fewest ids whose sum reaches p: 0.4; 0.4 + 0.3; all but the least
    assert [kept(keep_top_p(logits, p)) for p in (1e-6, 0.39, 0.65, 0.85, 1.0)] == [
        [1],
        [1],
        [1, 3],
        [1, 2, 3],
        [0, 1, 2, 3],
    ]


def test_drawing_follows_the_filtered_probabilities():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    rng = torch.Generator().manual_seed(0)
    drawn = [
        next_token(logits, [], Sampling(temperature=1.0, top_p=0.65), rng) for _ in range(2000)
    ]
    assert set(drawn) == {1, 3}
    assert drawn.count(1) / 2000 == pytest.approx(4 / 7, abs=0.04)
    assert next_token(logits, [], Sampling(temperature=0.0), rng) == 1
    assert {
        next_token(logits, [], Sampling(temperature=1.0, top_p=1.0, top_k=1), rng)
        for _ in range(20)
    } == {1}


def test_streaming_never_shows_part_of_a_character():
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    text = "龘 😀 naïve 👩‍👩‍👧 𠮷"  # rare characters, spelled by several byte tokens each
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)
    decoder = DecodeStream(skip_special_tokens=True)
    pieces = [decoder.step(tokenizer.backend_tokenizer, token) for token in ids]
    assert "".join(piece for piece in pieces if piece) == text
    assert not any(piece and "�" in piece for piece in pieces)


def test_a_model_that_has_generated_can_still_be_trained(tiny_model):
    run(tiny_model, [5, 6], GREEDY)
    ids = torch.tensor([[5, 6, 7]])
    tiny_model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in tiny_model.parameters())
