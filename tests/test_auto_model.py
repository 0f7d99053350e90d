"""A folder of ``save_pretrained`` opens by transformers' auto classes and computes the same."""

import pytest
import torch
from conftest import IDS, logits_of
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import interop.auto
from core.errors import UserError
from model.generation import Sampling, generate
from model.LMConfig import LMConfig
from model.model import CACHE, MiniMindLM


@pytest.fixture
def opened(sharp_model, tmp_path):
    """What the auto class makes of the sharp model's own folder."""
    sharp_model.save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path)


def continued(model, ids, new, **settings):
    """What the library's greedy decoding adds to the rows of ``ids``."""
    settings = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0, **settings}
    return model.generate(ids, **settings)[:, ids.size(1) :].tolist()


def test_the_auto_classes_open_what_the_model_saved(sharp_model, opened, tmp_path):
    assert isinstance(opened, MiniMindLM) and opened.can_generate() and not opened.training
    assert torch.equal(logits_of(opened), logits_of(sharp_model))
    assert opened.output.weight is opened.tok_embeddings.weight
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, LMConfig) and config.to_dict() == opened.config.to_dict()
    opened.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(again), logits_of(sharp_model))


def test_greedy_decoding_is_that_of_our_own_decoder(sharp_model, opened):
    greedy, rng = Sampling(temperature=0.0, max_new_tokens=20), torch.Generator()
    ours = [list(generate(sharp_model, row, greedy, set(), rng)) for row in IDS.tolist()]
    assert len({*ours[0], *ours[1]}) > 5
    for settings in ({}, {"use_cache": False}, {"attention_mask": torch.ones_like(IDS)}):
        assert continued(opened, IDS, 20, **settings) == ours
    stop = ours[0][7]
    wanted = list(generate(sharp_model, IDS[0].tolist(), greedy, {stop}, rng))
    assert continued(opened, IDS[:1], 20, eos_token_id=stop) == [[*wanted, stop]]


def test_beams_share_a_cache_with_what_was_said_before(opened):
    beams = {"num_beams": 3, "eos_token_id": 319}
    assert continued(opened, IDS, 8, **beams) == continued(opened, IDS, 8, **beams, use_cache=False)
    cache = DynamicCache(config=opened.config)
    with torch.no_grad():
        parts = [opened(input_ids=ids, cache=cache).logits for ids in IDS.split([5, 1, 14], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits_of(opened), atol=1e-5, rtol=0)
    assert cache.get_seq_length() == IDS.size(1)
    for settings in ({"cache": cache}, {"past_key_values": opened(IDS, use_cache=True)[CACHE]}):
        with pytest.raises(UserError, match="1 columns for 21 ids"):
            opened(input_ids=IDS[:, :1], attention_mask=torch.ones(2, 1), **settings)


def test_padding_on_the_right_changes_nothing(opened):
    lengths = torch.tensor([20, 11])
    mask = (torch.arange(20) < lengths[:, None]).long()
    padded = IDS.masked_fill(mask == 0, 0)
    labels = IDS.masked_fill(mask == 0, -100)
    with torch.no_grad():
        both = opened(input_ids=padded, attention_mask=mask, labels=labels)
        alone = [opened(input_ids=IDS[n : n + 1, :length]) for n, length in enumerate(lengths)]
        losses = [opened(input_ids=IDS[n : n + 1], labels=labels[n : n + 1]).loss for n in (0, 1)]
        other = opened(input_ids=padded.masked_fill(mask == 0, 7), attention_mask=mask)
    for row, same, one in zip(both.logits, other.logits, alone, strict=True):
        wanted = one.logits[0]
        assert torch.equal(row[: len(wanted)], same[: len(wanted)])
        difference = (row[: len(wanted)] - wanted).abs().max()
        assert difference <= 1e-6 * wanted.abs().max()
    total = 19 * losses[0] + 10 * losses[1]
    torch.testing.assert_close(both.loss, total / 29)
    (logits,) = opened(padded, mask, logits_to_keep=3, return_dict=False)
    torch.testing.assert_close(logits, both.logits[:, -3:], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, "padding before an id (left padding)"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "padding before an id (left padding)"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "4 dimensions, not 2"),
        ({"attention_mask": torch.ones(1, 2)}, "2 columns for 3 ids"),
        ({"attention_mask": torch.ones(1, 4)}, "4 columns for 3 ids"),
        ({"cache": ()}, "a tuple cannot hold this model's keys"),
        ({"cache": DynamicCache(offloading=True)}, "an offloaded cache cannot hold"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(opened, change, said):
    with pytest.raises(UserError) as refused:
        opened(input_ids=IDS[:1, :3], **change)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("mask", [[1, 1, 0], [0, 1, 1]])
def test_prompts_of_several_lengths_are_refused(opened, mask):
    mask = torch.tensor([[1, 1, 1], mask])
    with pytest.raises(UserError, match="padding in the prompts' attention_mask, left or right"):
        continued(opened, IDS[:, :3], 1, attention_mask=mask)


def test_only_what_was_imported_is_registered(opened):
    assert type(opened) is interop.auto.MiniMindForCausalLM
    assert not hasattr(MiniMindLM, "generate"), "training has no use for it, and pays for it"
