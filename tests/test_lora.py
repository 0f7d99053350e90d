"""Invariants of LoRA on a model: what is a target, what trains, what stays, and that patches undo,
copy and compile.
"""

import copy

import pytest
import torch
from conftest import IDS, logits_of, ragged_batch, strengthen
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from core.errors import UserError
from model.LMConfig import LMConfig
from model.lora.layer import lora_parameters
from model.model import MiniMindLM
from model.model_lora import LoRA, apply_lora, load_lora, remove_lora, save_lora
from trainer.loop import causal_loss_sum
from trainer.metrics import evaluate
from trainer.runtime import Runtime

SQUARE = [f"layers.{n}.attention.{name}" for n in range(2) for name in ("wq", "wo")]
EVERY = [
    f"layers.{n}.{name}"
    for n in range(2)
    for name in (
        *(f"attention.{w}" for w in ("wq", "wk", "wv", "wo")),
        *(f"feed_forward.w{i}" for i in (1, 2, 3)),
    )
]


def default_model():
    """The default model without memory behind it."""
    with torch.device("meta"):
        return MiniMindLM(LMConfig())


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# targets


def test_default_targets_are_the_square_ones():
    model = default_model()
    targets = apply_lora(model, rank=16)
    assert targets == [f"layers.{n}.attention.{name}" for n in range(8) for name in ("wq", "wo")]
    assert sum(parameter.numel() for parameter in lora_parameters(model)) == 262_144
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_829_888 + 262_144
    assert trainable(model) == {
        f"{target}.lora.{matrix}.weight" for target in targets for matrix in "AB"
    }


def test_all_linear_is_everything_but_the_tied_head():
    model = default_model()
    assert len(apply_lora(model, rank=16, target_modules="all-linear")) == 8 * 7
    assert sum(parameter.numel() for parameter in lora_parameters(model)) == 1_163_264


@pytest.mark.parametrize(
    ("target_modules", "targets"),
    [
        (["wk"], ["layers.0.attention.wk", "layers.1.attention.wk"]),
        (
            ["layers.1.attention.wk", "w2"],
            [f"layers.{n}" for n in ("0.feed_forward.w2", "1.attention.wk")],
        ),
        (r"layers\.1\.attention\.w[qk]", ["layers.1.attention.wq", "layers.1.attention.wk"]),
        (
            r".*\.(w1|wv)",
            [f"layers.{n}.{name}" for n in (0, 1) for name in ("attention.wv", "feed_forward.w1")],
        ),
        (["w[13]"], [n for n in EVERY if n.endswith(("w1", "w3"))]),
        (["w[13]", "attention.wk"], [n for n in EVERY if n.endswith(("w1", "w3", "wk"))]),
        (["layers.1.*", "wk"], [n for n in EVERY if "1.a" in n or "1.f" in n or n.endswith("wk")]),
        (["(?i)W1"], [n for n in EVERY if n.endswith("w1")]),
        ([r"(?!.*feed).*"], [n for n in EVERY if "attention" in n]),  # of whole names if it can be
        ("all-linear", EVERY),
        (["All-Linear"], EVERY),
        ("square", SQUARE),
        (("SQUARE",), SQUARE),
    ],
)
def test_targets_by_name_and_by_regular_expression(tiny_model, target_modules, targets):
    if "w2" in target_modules:
        targets = [*targets, "layers.1.feed_forward.w2"]
    assert apply_lora(tiny_model, 4, target_modules=target_modules) == targets
    assert trainable(tiny_model) == {
        f"{target}.lora.{matrix}.weight" for target in targets for matrix in "AB"
    }


def test_a_word_that_ends_a_name_is_no_expression():
    model = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(4, 4)}), "a_q": nn.Linear(4, 4)})
    assert apply_lora(model, 2, target_modules=["a.q"]) == ["a.q"]
    remove_lora(model)
    assert apply_lora(model, 2, None, "all-linear", exclude_modules=["a.q"]) == ["a_q"]


@pytest.mark.parametrize(
    "target_modules", ["attention", "w", ["q_proj"], [], "output", ["output"], ["tok_embeddings"]]
)
def test_targets_that_match_nothing_are_an_error_that_lists_the_names(tiny_model, target_modules):
    with pytest.raises(UserError, match="there are w1, w2, w3, wk, wo, wq, wv"):
        apply_lora(tiny_model, target_modules=target_modules)
    assert all(parameter.requires_grad for parameter in tiny_model.parameters()), (
        "refused, yet the base is frozen"
    )


def test_a_tied_head_is_no_target_even_when_square():
    model = MiniMindLM(LMConfig(dim=64, n_layers=1, vocab_size=64))
    assert apply_lora(model) == ["layers.0.attention.wq", "layers.0.attention.wo"]
    remove_lora(model)
    for named in ("output", ["output"], ["wq", "output"], ["w9", "outp.*"]):
        with pytest.raises(UserError, match=r"modules='outp[^ ]* names a head that is tied"):
            apply_lora(model, target_modules=named)
    assert len(apply_lora(model, target_modules=".*")) == 7, "an expression may match it beside"


# patching and undoing


def test_twice_is_an_error(tiny_model):
    apply_lora(tiny_model)
    with pytest.raises(UserError, match="already applied"):
        apply_lora(tiny_model, target_modules=["w1"])
    remove_lora(tiny_model)
    apply_lora(tiny_model)


def test_step_0_equals_the_base_exactly(sharp_model):
    before = logits_of(sharp_model)
    apply_lora(sharp_model, rank=8, alpha=32, target_modules="all-linear")
    assert torch.equal(logits_of(sharp_model), before)
    for lora in (module for module in sharp_model.modules() if isinstance(module, LoRA)):
        assert not lora.B.weight.any()
    spread = torch.cat([p.flatten() for p in lora_parameters(sharp_model) if p.any()]).std().item()
    assert spread == pytest.approx(0.02, rel=0.1)


def test_removing_restores_the_base_bit_for_bit(sharp_model):
    logits, keys = logits_of(sharp_model), list(sharp_model.state_dict())
    modules = [name for name, _ in sharp_model.named_modules()]
    apply_lora(sharp_model, 4, target_modules="all-linear")
    strengthen(sharp_model, 1)
    assert set(sharp_model.state_dict()) > set(keys), "the base's keys stay while LoRA is applied"
    assert not torch.equal(logits_of(sharp_model), logits)
    remove_lora(sharp_model)
    assert torch.equal(logits_of(sharp_model), logits)
    assert list(sharp_model.state_dict()) == keys
    assert [name for name, _ in sharp_model.named_modules()] == modules
    assert not any("forward" in vars(module) for module in sharp_model.modules())


def test_alpha_over_rank_scales_the_update(sharp_model):
    linear = sharp_model.layers[0].attention.wq
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    plain = linear(x)
    for rank, alpha, scale in ((4, None, 1.0), (4, 4.0, 1.0), (4, 10.0, 2.5), (8, 2.0, 0.25)):
        apply_lora(sharp_model, rank, alpha)
        strengthen(sharp_model, 2)
        update = x.double() @ linear.lora.A.weight.double().T @ linear.lora.B.weight.double().T
        torch.testing.assert_close(linear(x), plain + scale * update.float(), atol=1e-5, rtol=1e-5)
        remove_lora(sharp_model)


def test_only_lora_receives_gradients(sharp_model):
    apply_lora(sharp_model, 4)
    strengthen(sharp_model, 3)
    sharp_model(IDS, labels=IDS).loss.backward()
    for name, parameter in sharp_model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (".lora." in name), (
            name
        )


def test_a_deepcopy_is_independent(sharp_model):
    apply_lora(sharp_model, 4)
    strengthen(sharp_model, 4)
    before = logits_of(sharp_model)
    twin = copy.deepcopy(sharp_model)
    assert torch.equal(logits_of(twin), before)
    strengthen(twin, 5)
    assert torch.equal(logits_of(sharp_model), before)
    assert not torch.equal(logits_of(twin), before), (
        "the copy still computes with the original's LoRA"
    )
    remove_lora(twin)
    assert torch.equal(logits_of(sharp_model), before)


def test_a_bf16_base_with_fp32_lora(sharp_model):
    apply_lora(sharp_model.bfloat16(), 4)
    strengthen(sharp_model, 6)
    assert {parameter.dtype for parameter in lora_parameters(sharp_model)} == {torch.float32}
    out = sharp_model(IDS, labels=IDS)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert {parameter.grad.dtype for parameter in lora_parameters(sharp_model)} == {torch.float32}


@pytest.mark.parametrize("init", ["minimind", "pissa"])
def test_a_linear_whose_forward_never_runs_is_reported(tmp_path, capsys, init):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "head": nn.Linear(16, 16)})
    assert apply_lora(model, 2, init_lora_weights=init) == ["attention.out_proj", "head"]
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    x = torch.randn(5, 1, 16)
    model["head"](model["attention"](x, x, x)[0]).sum().backward()
    optimizer.step()
    assert all(
        parameter.grad is None for parameter in model["attention"].out_proj.lora.parameters()
    )
    save_lora(model, tmp_path / "x.pth")
    said = capsys.readouterr().out
    assert "1 of 2 updates are zero" in said and said.rstrip().endswith(": attention.out_proj")


def test_a_model_of_another_kind_can_carry_lora(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    twin = copy.deepcopy(model)
    apply_lora(model, 2, target_modules="all-linear")
    strengthen(model, 7)
    save_lora(model, tmp_path / "any.pth")
    apply_lora(twin, 2, target_modules="all-linear")
    load_lora(twin, tmp_path / "any.pth")
    assert torch.equal(twin(torch.ones(1, 6)), model(torch.ones(1, 6)))


def test_compiled_whole_and_new_weights_need_no_recompile(tmp_path):
    torch.manual_seed(0)
    model = MiniMindLM(
        LMConfig(dim=32, n_layers=1, n_heads=2, vocab_size=64, multiple_of=16, max_seq_len=32)
    ).eval()
    base = logits_of(model)
    apply_lora(model, 4)
    strengthen(model, 8)
    save_lora(model, tmp_path / "a.pth")
    strengthen(model, 9)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    first = logits_of(compiled)
    torch.testing.assert_close(first, logits_of(model), atol=1e-5, rtol=0)
    load_lora(model, tmp_path / "a.pth")
    second = logits_of(compiled)
    assert counter.frame_count == 1
    torch.testing.assert_close(second, logits_of(model), atol=1e-5, rtol=0)
    assert (
        min((first - base).abs().max(), (second - base).abs().max(), (first - second).abs().max())
        > 1e-3
    )


def test_compiled_blocks_serve_all_lengths_and_validation_runs_uncompiled(tiny_model):
    counter = CompileCounterWithBackend("eager")
    apply_lora(tiny_model.train(), 4)
    tiny_model.compile(backend=counter)
    batches = [ragged_batch(3, seed=length, length=length) for length in (10, 12, 17)]
    causal_loss_sum(tiny_model, batches[0]).backward()
    programs = counter.frame_count
    assert programs > 0
    for batch in batches:
        causal_loss_sum(tiny_model, batch).backward()
    evaluate(tiny_model, [ragged_batch(1, seed=9, length=9)], Runtime.start("cpu"), set())
    assert counter.frame_count == programs


# an independent implementation


@pytest.mark.parametrize("alpha", [4.0, 10.0])
def test_peft_computes_the_same(sharp_model, alpha):
    peft = pytest.importorskip("peft")
    ours, other = sharp_model, copy.deepcopy(sharp_model)
    apply_lora(ours, 4, alpha)
    strengthen(ours, 10)
    settings = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["wq", "wo"], lora_dropout=0.0)
    theirs = peft.get_peft_model(other, settings).eval()
    pairs = []
    for target in SQUARE:
        lora, layer = ours.get_submodule(target).lora, other.get_submodule(target)
        pairs += [
            (lora.A.weight, layer.lora_A["default"].weight),
            (lora.B.weight, layer.lora_B["default"].weight),
        ]
    with torch.no_grad():
        for mine, peft_s in pairs:
            peft_s.copy_(mine)
    assert (
        sum(p.requires_grad for p in theirs.parameters())
        == len(pairs)
        == len(lora_parameters(ours))
    )
    outputs = [model(input_ids=IDS, labels=IDS) for model in (ours, theirs)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-6, rtol=1e-6)
    for output in outputs:
        output.loss.backward()
    for mine, peft_s in pairs:
        assert mine.grad.abs().max() > 1e-3
        torch.testing.assert_close(mine.grad, peft_s.grad, atol=1e-6, rtol=1e-6)
