"""Bases in 4 bits: what they cost and compute, PEFT and transformers on the same library beside,
skills, merging.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
from conftest import IDS, SMALL, flags, logits_of, strengthen
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import eval_model
import train_lora
from core.errors import UserError
from model.LMConfig import LMConfig
from model.lora.layer import adapted, dense_weight, is_quantized, lora_parameters
from model.lora.library import merge_lora
from model.lora.skill_file import base_fingerprint, read_lora
from model.model import MiniMindLM
from model.model_lora import apply_lora, attach_lora, remove_lora, save_lora
from model.quantized import bits_per_parameter, dequantize, quantize
from model.weights import load_base
from scripts.merge_lora import main as merge

EMBEDDED = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))

pytest.importorskip("bitsandbytes", reason="pip install -r requirements-4bit.txt")


def test_the_default_model_costs_little_more_than_four_bits(capsys):
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    quantize(model)
    linear_bits, all_bits = bits_per_parameter(model)
    assert 4.12 < linear_bits <= 4.2 and 4.2 < all_bits < 32
    assert f"56 Linears in NF4: {linear_bits:.3f} bits" in capsys.readouterr().out
    small = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_quantized(module)
    }
    assert len(small) == 8 * 7 and "output" not in small
    kept = {
        name: p for name, p in model.named_parameters() if name.removesuffix(".weight") not in small
    }
    assert (
        all(torch.equal(parameter, before[name]) for name, parameter in kept.items())
        and len(kept) == 1 + 2 * 8 + 1
    )
    for name in small:
        error = dense_weight(model.get_submodule(name)) - before[f"{name}.weight"]
        assert float(
            error.square().mean().sqrt() / before[f"{name}.weight"].std()
        ) == pytest.approx(0.092, abs=0.004)
    apply_lora(model, 16)
    assert bits_per_parameter(model) == (linear_bits, all_bits), "the update is no part of the base"


def test_it_is_what_transformers_and_peft_make_with_the_same_library(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, intermediate_size=128, vocab_size=320, initializer_range=0.2)
    ).eval()
    model.save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, dtype=torch.float32
    )
    quantize(model)
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and is_quantized(linear):
            assert torch.equal(dense_weight(linear), dense_weight(theirs.get_submodule(name))), name
    apply_lora(model, 4, 8.0, "all-linear")
    wrapped = peft.get_peft_model(
        theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    )
    strengthen(model, 0)
    pairs = []
    for name, linear in adapted(model):
        layer = theirs.get_submodule(name)
        pairs += [(linear.lora.A.weight, layer.lora_A["default"].weight)]
        pairs += [(linear.lora.B.weight, layer.lora_B["default"].weight)]
    with torch.no_grad():
        for mine, peft_s in pairs:
            peft_s.copy_(mine)
    outputs = [one.train()(input_ids=IDS, labels=IDS) for one in (model, wrapped)]
    for output in outputs:
        output.loss.backward()
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-5, rtol=1e-5)
    for mine, peft_s in pairs:
        assert mine.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, peft_s.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_a_quantised_base_computes_as_its_weights_say_and_never_changes(sharp_model, options):
    mark = base_fingerprint(sharp_model)
    quantize(sharp_model)
    assert base_fingerprint(sharp_model) == mark
    base = logits_of(sharp_model.eval())
    apply_lora(sharp_model, 4, target_modules="all-linear", **options)
    torch.testing.assert_close(logits_of(sharp_model), base, atol=1e-5, rtol=1e-5)
    strengthen(sharp_model, 0)
    skilled = logits_of(sharp_model)
    with pytest.raises(UserError, match=r"call dequantize\(model\) first"):
        merge_lora(sharp_model)
    twin = copy.deepcopy(sharp_model)
    dequantize(twin)
    assert not any(
        is_quantized(module) for module in twin.modules() if isinstance(module, nn.Linear)
    )
    torch.testing.assert_close(logits_of(twin), skilled, atol=1e-5, rtol=1e-5)
    merge_lora(twin)
    torch.testing.assert_close(logits_of(twin), skilled, atol=2e-5, rtol=1e-5)
    sharp_model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in lora_parameters(sharp_model))
    remove_lora(sharp_model)
    assert torch.equal(logits_of(sharp_model.eval()), base), "an evaluation repacked the weights"


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_what_others_read_as_numbers_stays_numbers(feed_forward):
    """T5 casts its activations to the type of ``wo``, and PyTorch's attention multiplies by
    ``out_proj`` itself.
    """
    torch.manual_seed(0)
    sizes = {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 1,
        "num_heads": 4,
        "vocab_size": 320,
    }
    t5 = T5ForConditionalGeneration(
        T5Config(**sizes, feed_forward_proj=feed_forward, decoder_start_token_id=0)
    ).eval()
    attention = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    calls = {
        t5: lambda model: model(input_ids=IDS, labels=IDS).logits,
        attention: lambda model: model(EMBEDDED),
    }
    for model, call in calls.items():
        with torch.no_grad():
            exact = call(model)
            quantize(model)
            twin = copy.deepcopy(model)
            dequantize(twin)
            assert 0 < (call(model) - exact).abs().max() < 0.5 * exact.abs().max()
            torch.testing.assert_close(call(twin), call(model), atol=1e-5, rtol=1e-5)
    kept = [
        name
        for name, module in t5.named_modules()
        if isinstance(module, nn.Linear) and not is_quantized(module)
    ]
    assert {name for name in kept if name != "lm_head"} == {
        "decoder.block.0.layer.2.DenseReluDense.wo",
        "encoder.block.0.layer.1.DenseReluDense.wo",
    }


def test_the_compute_dtype_is_that_of_the_products_and_a_bias_comes_back():
    torch.manual_seed(0)
    x, model = torch.randn(3, 64), nn.Sequential(nn.Linear(64, 64))
    exact = model(x)
    quantize(model, torch.bfloat16)
    coarse = model(x)
    assert coarse.dtype == torch.float32 and torch.equal(coarse, coarse.bfloat16().float())
    dequantize(model)
    fine = model(x)
    assert not torch.equal(fine, fine.bfloat16().float())
    assert 0 < (coarse - fine).abs().max() < 0.05 and (fine - exact).abs().max() < 0.5


@pytest.mark.skipif(
    not Path("/proc/self/maps").is_file(), reason="asks Linux what a process holds in memory"
)
def test_the_file_that_a_base_was_read_from_is_let_go(tmp_path):
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=128, vocab_size=512)).save_pretrained(
        tmp_path
    )
    model = load_base(tmp_path)[0]
    held = [str(tmp_path) in Path("/proc/self/maps").read_text()]
    before = model.get_input_embeddings().weight.clone()
    quantize(model)
    held.append(str(tmp_path) in Path("/proc/self/maps").read_text())
    assert held == [True, False] and torch.equal(model.get_input_embeddings().weight, before)


def test_without_the_library_the_way_to_it_is_named(sharp_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-4bit\.txt"):
        quantize(sharp_model)
    assert not any(
        is_quantized(module) for module in sharp_model.modules() if isinstance(module, nn.Linear)
    )


def test_wrong_order_is_named(sharp_model):
    apply_lora(sharp_model, 4)
    with pytest.raises(UserError, match="quantize before LoRA"):
        quantize(sharp_model)
    merge_lora(sharp_model)
    with pytest.raises(UserError, match="a LoRA is merged into this model"):
        quantize(sharp_model)
    with pytest.raises(UserError, match="no Linear here can go into 4 bits"):
        quantize(nn.Sequential(nn.Embedding(3, 4)))


def test_the_doors_train_chat_and_merge_in_four_bits(trained, tmp_path, capsys):
    out, base = tmp_path / "out", trained.out / "full_sft_64.pth"
    argv = flags(
        out_dir=out,
        base=base,
        data_path=trained.chats,
        general_data=trained.general,
        lora_name="q",
        **SMALL,
    )
    path = train_lora.main(
        [*argv, "--load_in_4bit", "--learning_rate", "0.05", "--optimizer", "paged_adamw"]
    )
    printed = capsys.readouterr().out
    assert "14 Linears in NF4: " in printed and "only NVIDIA GPUs page" in printed
    every = sum(parameter.numel() for parameter in load_base(base)[0].parameters())
    assert f"training 8,192 of {every + 8192:,} parameters" in printed, (
        "4 bits count as what they stand for"
    )
    assert read_lora(path)[1].base == read_lora(trained.out / "lora" / "lora_a_64.pth")[1].base
    words = {
        "out_dir": out,
        "base": base,
        "lora_name": "q",
        "prompt": "hi",
        "temperature": 0,
        "device": "cpu",
    }
    eval_model.main([*flags(**words, max_new_tokens=8), "--load_in_4bit"])
    said = capsys.readouterr().out
    merge(["q", *flags(out_dir=out, base=base, output=tmp_path / "other_64.pth")])
    assert "note: q was trained on 4 bits; --load_in_4bit merges into" in capsys.readouterr().out
    merged = merge(
        ["q", *flags(out_dir=out, base=base, output=tmp_path / "merged_64.pth"), "--load_in_4bit"]
    )
    assert "note" not in capsys.readouterr().out
    model, _ = load_base(base)
    quantize(model)
    attach_lora(model, path)
    torch.testing.assert_close(
        logits_of(load_base(merged)[0]), logits_of(model), atol=1e-5, rtol=1e-5
    )
    assert said
    save_lora(model, tmp_path / "again.pth")
    assert (
        read_lora(tmp_path / "again.pth")[1].base["fingerprint"]
        == read_lora(path)[1].base["fingerprint"]
    )
