"""MiniMind's files, both ways; later versions are judged by a Llama, which computes the same."""

import pytest
import torch
from conftest import flags, strengthen
from transformers import LlamaConfig, LlamaForCausalLM

from core.errors import UserError
from core.paths import TOKENIZER_DIR, lora_path
from interop import minimind
from interop.check import EXACT, difference, logits_of
from interop.rounding import rounded
from model.lora.skill_file import attach_lora, read_lora, save_lora
from model.lora.targets import linears
from model.model_lora import apply_lora, load_lora
from model.weights import load_base
from scripts import convert_model

BASE = "full_sft_64.pth"
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 192, "vocab_size": 6400}
SIZES |= {"max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def later(tmp_path_factory):
    """A base file as later versions save it, and a model that computes what it does."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope, initializer_range=0.2))
    path = tmp_path_factory.mktemp("later") / "full_sft_64.pth"
    tensors = dict(model.state_dict()) | {"model.freqs_cos": torch.ones(4, 4)}
    torch.save(tensors, path)
    return path, model.eval()


@pytest.fixture(scope="module")
def converted(later, tmp_path_factory):
    """The later base as ours."""
    output = tmp_path_factory.mktemp("ours") / BASE
    convert_model.main(flags(**{"from": "minimind"}, source=later[0], output=output))
    return output


def refused(reason, **values):
    with pytest.raises(UserError, match=reason):
        convert_model.main(flags(**values))


def square_skill(trained, tmp_path, **settings):
    """A skill on square Linears in a folder of its own, and the logits of the base with it."""
    model, _ = load_base(trained.out / BASE)
    apply_lora(model, **settings)
    strengthen(model, 3)
    path = lora_path(tmp_path, "square", 64)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_lora(model, path)
    return path, logits_of(model)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_base_goes_out_and_comes_back(trained, tmp_path, dtype):
    there, back = tmp_path / "theirs.pth", tmp_path / "back" / BASE
    convert_model.main(flags(to="minimind", base=trained.out / BASE, output=there, dtype=dtype))
    tensors = torch.load(there, weights_only=True)
    model, _ = load_base(trained.out / BASE)
    assert tensors.keys() == model.state_dict().keys() and not there.with_suffix(".json").exists()
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    tensors["pos_cis"] = torch.ones(3)
    torch.save({f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}, there)
    convert_model.main(flags(**{"from": "minimind"}, source=there, output=back))
    expected = rounded(model, getattr(torch, dtype)).state_dict()
    found = load_base(back)[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    refused("exists", to="minimind", base=trained.out / BASE, output=there)


def test_a_later_base_computes_what_a_llama_does(later, converted):
    assert difference(logits_of(load_base(converted)[0]), logits_of(later[1])) < EXACT


def test_a_forgotten_rotation_is_caught_and_leaves_nothing(later, tmp_path, monkeypatch):
    monkeypatch.setattr("interop.llama.to_pairs", lambda rows, heads: rows)
    output = tmp_path / "out" / BASE
    flag = {"from": "minimind"}
    refused("computes something else", **flag, source=later[0], output=output)
    assert list(tmp_path.iterdir()) == []


def test_a_later_lora_computes_what_a_llama_does_with_it(later, converted, tmp_path, monkeypatch):
    _, model = later
    torch.manual_seed(1)
    names = [f"model.layers.{n}.self_attn.{x}_proj" for n in (0, 1) for x in "qo"]
    parts = {f"{name}.lora.{x}.weight": torch.randn(64, 64) / 9 for name in names for x in "AB"}
    parts = {n: t[:16] if ".A." in n else t[:, :16].contiguous() for n, t in parts.items()}
    torch.save(parts, tmp_path / "lora.pth")
    flag = {"from": "minimind", "source": tmp_path / "lora.pth", "base": converted}
    flag |= {"lora_name": "theirs", "out_dir": tmp_path, "tokenizer_path": TOKENIZER_DIR}
    with monkeypatch.context() as patch:
        patch.setattr(minimind, "to_pairs", lambda rows, heads: rows)
        refused("computes something else", **flag)
    convert_model.main(flags(**flag))
    ours, _ = load_base(converted)
    alone = logits_of(ours)
    attach_lora(ours, lora_path(tmp_path, "theirs", 64))
    before = {name: model.get_parameter(f"{name}.weight").clone() for name in names}
    with torch.no_grad():
        for name in names:
            update = parts[f"{name}.lora.B.weight"] @ parts[f"{name}.lora.A.weight"]
            model.get_parameter(f"{name}.weight").add_(update)
        expected = logits_of(model)
        for name, weight in before.items():
            model.get_parameter(f"{name}.weight").copy_(weight)
    assert difference(logits_of(ours), expected) < EXACT < difference(alone, expected)


def test_a_skill_goes_out_for_square_linears_with_its_scale_folded(trained, tmp_path):
    settings = {"rank": 4, "alpha": 16, "target_modules": ["wq"]}
    _, expected = square_skill(trained, tmp_path, **settings)
    there = tmp_path / "theirs.pth"
    flag = {"lora_name": "square", "base": trained.out / BASE, "out_dir": tmp_path}
    convert_model.main(flags(to="minimind", **flag, output=there))
    tensors, meta = read_lora(there)
    model, _ = load_base(trained.out / BASE)
    square = [n for n, m in linears(model).items() if m.in_features == m.out_features]
    assert sorted(meta.targets) == sorted(square) and set(meta.scaling.values()) == {1.0}
    assert set(meta.ranks.values()) == {minimind.RANK}, "its apply_lora makes this rank"
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    apply_lora(model, rank=minimind.RANK)
    load_lora(model, there)
    assert difference(logits_of(model), expected) < EXACT
    back = tmp_path / "back"
    torch.save({f"module.{n}": t.half() for n, t in tensors.items()}, there)
    flag = flag | {"out_dir": back, "tokenizer_path": TOKENIZER_DIR}
    convert_model.main(flags(**{"from": "minimind"}, **flag, source=there))
    model, _ = load_base(trained.out / BASE)
    attach_lora(model, lora_path(back, "square", 64))
    assert difference(logits_of(model), expected) < 1e-2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"use_dora": True}, "DoRA"), ({"target_modules": ["wk"]}, "square Linears only")],
)
def test_what_minimind_cannot_compute_is_refused(trained, tmp_path, settings, reason):
    square_skill(trained, tmp_path, rank=2, **settings)
    flag = {"lora_name": "square", "base": trained.out / BASE, "out_dir": tmp_path}
    refused(reason, to="minimind", **flag, output=tmp_path / "theirs.pth")
    assert not (tmp_path / "theirs.pth").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: {**t, "model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, "q_norm"),
        (lambda t: {**t, "model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(8, 8)}, "exper"),
        (lambda t: {**t, "module.model.norm.weight": torch.ones(64)}, "two names"),
        (lambda t: {n: x for n, x in t.items() if "layers.1.mlp.up" not in n}, "missing layers.1"),
        (lambda t: {"model.norm.weight": t["model.norm.weight"]}, "no MiniMindLM"),
        (lambda t: {**t, "layers.900000.x": torch.ones(1)}, "a layer 900000, but only"),
        (lambda t: {**t, "lm_head.weight": t["lm_head.weight"] * 2}, "ties"),
    ],
)
def test_other_models_are_refused_by_name(later, tmp_path, change, reason):
    path, output = tmp_path / "theirs.pth", tmp_path / "out" / BASE
    torch.save(change(torch.load(later[0], weights_only=True)), path)
    refused(reason, **{"from": "minimind"}, source=path, output=output)
    refused("is a folder", **{"from": "minimind"}, source=tmp_path, output=output)
    assert not output.parent.exists()
