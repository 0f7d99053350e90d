"""Invariants of LMConfig and MiniMindLM: size, ties, initial values, caching, padding, positions,
losses.
"""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.seeded_model import fill
from core.errors import UserError
from model.kernels import IGNORED, TARGETS_AT_ONCE
from model.LMConfig import LMConfig
from model.model import CACHE, MiniMindLM, RMSNorm, rope_table, rotate
from model.model_lora import apply_lora

VOCAB = 320


@pytest.fixture(scope="module")
def default_model():
    """The 25.8 M parameter model; not to be changed."""
    torch.manual_seed(0)
    return MiniMindLM(LMConfig())


def ids(rows, length, seed=0, vocab=VOCAB):
    return torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model, *arguments, **settings):
    with torch.no_grad():
        return model(*arguments, **settings).logits


# config


def test_default_size(default_model):
    assert default_model.config.hidden_dim == 1408
    assert sum(parameter.numel() for parameter in default_model.parameters()) == 25_829_888


@pytest.mark.parametrize(
    ("dim", "multiple_of", "hidden_dim"),
    [(512, 64, 1408), (768, 64, 2048), (96, 64, 256), (100, 1, 266)],
)
def test_hidden_dim_is_derived_when_the_config_is_made(dim, multiple_of, hidden_dim):
    assert LMConfig(dim=dim, n_heads=2, multiple_of=multiple_of).hidden_dim == hidden_dim


def test_hidden_dim_that_is_given_stays_and_one_kv_head_a_query_head_is_none():
    config = LMConfig(hidden_dim=1000, n_kv_heads=None)
    assert (config.hidden_dim, config.n_kv_heads) == (1000, 8)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"dim": 0}, "dim=0"),
        ({"dim": 100}, "n_heads=8"),
        ({"dim": 24, "n_heads": 8}, "even"),
        ({"n_heads": 0}, "n_heads=0"),
        ({"n_kv_heads": 3}, "n_kv_heads=3"),
        ({"n_kv_heads": 16}, "n_kv_heads=16"),
        ({"n_kv_heads": 0}, "n_kv_heads=0"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"multiple_of": 0}, "multiple_of=0"),
        ({"max_seq_len": 0}, "max_seq_len=0"),
        ({"hidden_dim": -1}, "hidden_dim=-1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"norm_eps": 0.0}, "norm_eps=0.0"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ],
)
def test_impossible_configs_are_refused_at_once(settings, named):
    with pytest.raises(UserError, match=named):
        LMConfig(**settings)


# weights


def test_head_stays_tied_through_a_strict_load(sharp_model):
    other = MiniMindLM(sharp_model.config).eval()
    other.load_state_dict(sharp_model.state_dict(), strict=True)
    assert other.output.weight.data_ptr() == other.tok_embeddings.weight.data_ptr()
    assert torch.equal(logits_of(other, ids(2, 9)), logits_of(sharp_model, ids(2, 9)))


def test_state_dict_keys_are_minimind_s(tiny_model):
    block = [
        "attention.wq",
        "attention.wk",
        "attention.wv",
        "attention.wo",
        "attention_norm",
        "ffn_norm",
    ]
    block += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    names = {"tok_embeddings", "norm", "output"} | {
        f"layers.{n}.{name}" for n in range(2) for name in block
    }
    assert set(tiny_model.state_dict()) == {f"{name}.weight" for name in names}


def test_save_pretrained_round_trip_is_bit_exact(sharp_model, tmp_path):
    before = logits_of(sharp_model, ids(2, 20))
    sharp_model.save_pretrained(tmp_path)
    loaded = MiniMindLM.from_pretrained(tmp_path).eval()
    assert loaded.output.weight.data_ptr() == loaded.tok_embeddings.weight.data_ptr()
    assert loaded.config.hidden_dim == sharp_model.config.hidden_dim
    assert torch.equal(logits_of(loaded, ids(2, 20)), before)


@pytest.mark.parametrize("has_run", [True, False])
def test_rotary_tables_stay_fp32_in_a_bf16_model(sharp_model, has_run):
    exact = logits_of(copy.deepcopy(sharp_model), ids(2, 100))
    if has_run:
        logits_of(sharp_model, ids(2, 100))
    rounded = logits_of(sharp_model.bfloat16(), ids(2, 100))
    assert rounded.dtype == torch.bfloat16
    assert sharp_model._rope.dtype == torch.complex64
    assert (rounded.float() - exact).abs().max() < 0.1


def test_positions_of_bf16_features_are_turned_in_fp32():
    turns = rope_table(16, 100, 1e4, torch.device("cpu"))
    x = torch.randn(2, 100, 3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(rotate(x, turns), rotate(x.float(), turns).bfloat16())


def test_initial_values(default_model):
    deep = 0.02 / math.sqrt(2 * default_model.config.n_layers)
    for name, parameter in default_model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            expected = deep if name.endswith(("wo.weight", "w2.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
            assert abs(parameter.mean().item()) < 0.05 * expected, name


def test_first_loss_is_that_of_guessing(default_model):
    inputs = torch.randint(0, 6400, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = default_model(inputs, labels=inputs).loss
    assert abs(loss.item() - math.log(6400)) <= 0.3


def test_rms_norm_computes_its_statistics_in_fp32():
    norm = RMSNorm(256, 1e-5)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) * 100
    expected = x / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected.float())
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


# positions, cache, padding


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("new", [1, 7])
def test_cached_decoding_equals_uncached(sharp_model, rows, new):
    tokens = ids(rows, 10 + new)
    with torch.no_grad():
        cache = sharp_model(tokens[:, :10], use_cache=True)[CACHE]
        out = sharp_model(tokens[:, 10:], **{CACHE: cache}, use_cache=True)
    torch.testing.assert_close(
        out.logits, logits_of(sharp_model, tokens)[:, 10:], atol=1e-5, rtol=0
    )
    assert [keys.shape for keys, _ in out[CACHE]] == [(rows, 2, 10 + new, 16)] * 2


def test_no_cache_is_returned_unless_asked_for(tiny_model):
    assert CACHE not in tiny_model(ids(1, 3))


def test_a_position_sees_only_what_stands_before_it(sharp_model):
    tokens = ids(1, 30)
    before = logits_of(sharp_model, tokens)
    tokens[0, 20] += 1
    after = logits_of(sharp_model, tokens)
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().amax(-1).min() > 1e-3, (
        "every later position sees the change"
    )


def test_padding_and_batch_mates_never_change_a_row(sharp_model):
    short, long = ids(1, 11, seed=1), ids(1, 40, seed=2)
    padded = F.pad(short, (0, 29))
    alone = logits_of(sharp_model, short)
    together = logits_of(sharp_model, torch.cat((long, padded)))
    torch.testing.assert_close(logits_of(sharp_model, padded)[:, :11], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together[1:, :11], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together[:1], logits_of(sharp_model, long), atol=1e-5, rtol=0)


def tensors_in(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def test_no_square_of_the_length_is_ever_stored(tiny_model):
    length = 100
    with torch.no_grad():
        cache = tiny_model(ids(2, length), use_cache=True)[CACHE]
        tiny_model(ids(2, 10), **{CACHE: cache})
    stored = [tensor for module in tiny_model.modules() for tensor in tensors_in(vars(module))]
    assert len(stored) > 20
    assert [
        tensor.shape for tensor in stored if sum(size >= length for size in tensor.shape) > 1
    ] == []


def test_rotary_tables_are_built_once_and_cover_the_context(tiny_model):
    logits_of(tiny_model, ids(1, 3))
    table = tiny_model._rope
    assert table.shape == (128, 8)
    logits_of(tiny_model, ids(1, 128))
    assert tiny_model._rope is table
    assert not list(tiny_model.buffers()), (
        "a buffer would change dtype with the model and come back as garbage"
    )


def test_past_the_context_is_refused(tiny_model):
    assert logits_of(tiny_model, ids(1, 128)).shape == (1, 128, VOCAB)
    with pytest.raises(UserError, match="129"):
        tiny_model(ids(1, 129))
    cache = tiny_model(ids(1, 100), use_cache=True)[CACHE]
    assert logits_of(tiny_model, ids(1, 28), **{CACHE: cache}).shape == (1, 28, VOCAB)
    with pytest.raises(UserError, match="129"):
        tiny_model(ids(1, 29), **{CACHE: cache})


# what forward accepts


def test_loss_is_the_mean_over_supervised_targets_one_step_ahead(sharp_model):
    tokens = ids(2, 12)
    labels = tokens.clone()
    labels[0, :5] = IGNORED
    labels[1, 9:] = IGNORED
    logits = logits_of(sharp_model, tokens).double().log_softmax(-1)
    learned = [(r, t) for r in range(2) for t in range(11) if labels[r, t + 1] != IGNORED]
    nats = -sum(logits[r, t, tokens[r, t + 1]].item() for r, t in learned)
    assert len(learned) == 7 + 8
    for num_items, divisor in ((None, 15), (4, 4), (torch.tensor(30), 30)):
        loss = sharp_model(tokens, labels=labels, num_items_in_batch=num_items).loss
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(nats / divisor, rel=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_a_bf16_model_has_an_fp32_loss_and_an_fp64_one_keeps_its_precision(tiny_model, training):
    tokens = ids(1, 5)
    tiny_model.train(training)
    assert tiny_model.bfloat16()(tokens, labels=tokens).loss.dtype == torch.float32
    assert tiny_model.double()(tokens, labels=tokens).loss.dtype == torch.float64


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("num_items", [None, 7])
def test_training_computes_supervised_positions_alone_with_the_same_gradients(
    sharp_model, num_items, with_lora
):
    """Evaluation takes the plain path through all positions; float64, so that rounding hides
    nothing.
    """
    if with_lora:
        apply_lora(sharp_model, rank=4, target_modules="all-linear")
        fill((name, p) for name, p in sharp_model.named_parameters() if "lora" in name)
    model = sharp_model.double()
    tokens, labels = ids(3, 12), ids(3, 12)
    labels[0, :5], labels[1, 9:], labels[2, ::2] = IGNORED, IGNORED, IGNORED
    found = {}
    for training in (False, True):
        model.train(training).zero_grad()
        out = model(tokens, labels=labels, num_items_in_batch=num_items)
        assert (out.logits is None) == training
        out.loss.backward()
        found[training] = [
            out.loss.detach(),
            *(p.grad for p in model.parameters() if p.requires_grad),
        ]
    for plain, trimmed in zip(found[False], found[True], strict=True):
        assert (plain - trimmed).abs().max() <= 1e-10 * plain.abs().max()


def test_training_never_holds_the_logits_of_a_whole_batch(default_model):
    """The largest tensor of a step, forward and backward, is a slice of the logits, however many
    tokens there are.
    """
    model = copy.deepcopy(default_model).train()
    model.layers = model.layers[-1:]
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            nonlocal largest
            out = operation(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    tokens = ids(5, 512, vocab=model.config.vocab_size)
    with Watch():
        model(tokens, labels=tokens).loss.backward()
    assert (
        largest
        == TARGETS_AT_ONCE * model.config.vocab_size
        < tokens.numel() * model.config.vocab_size / 2
    )


@pytest.mark.parametrize("training", [False, True])
def test_an_all_masked_batch_gives_zero_loss_and_zero_gradients(tiny_model, training):
    tiny_model.train(training)
    loss = tiny_model(ids(2, 6), labels=torch.full((2, 6), IGNORED)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all((parameter.grad == 0).all() for parameter in tiny_model.parameters())


def test_logits_to_keep(sharp_model):
    tokens = ids(2, 8)
    everything = logits_of(sharp_model, tokens)
    for kept, positions in (
        (0, range(8)),
        (1, [7]),
        (3, [5, 6, 7]),
        (torch.tensor([0, 4]), [0, 4]),
    ):
        kept_logits = logits_of(sharp_model, tokens, logits_to_keep=kept)
        torch.testing.assert_close(kept_logits, everything[:, list(positions)], atol=1e-6, rtol=0)


def test_labels_with_logits_to_keep_are_refused(tiny_model):
    with pytest.raises(UserError, match="logits_to_keep"):
        tiny_model(ids(1, 4), labels=ids(1, 4), logits_to_keep=1)


def test_dropout_works_in_training_only(tiny_model):
    model = MiniMindLM(LMConfig(**{**tiny_model.config.to_dict(), "dropout": 0.5}))
    tokens = ids(1, 8)
    assert not torch.equal(logits_of(model.train(), tokens), logits_of(model, tokens))
    assert torch.equal(logits_of(model.eval(), tokens), logits_of(model, tokens))


def test_compiling_silences_what_inductor_would_say_of_rotary_positions(tiny_model):
    said = "Torchinductor does not support code generation for complex operators."
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tiny_model.compile()
        warnings.warn(f"{said} Performance may be worse than eager.", stacklevel=1)
    assert not [warning for warning in told if said in str(warning.message)]
