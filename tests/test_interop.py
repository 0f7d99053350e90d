"""Bases and skills in other tools' formats, judged by those tools."""

import json
import shutil
import warnings

import peft
import pytest
import torch
from conftest import flags, strengthen
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import train_lora
from core.errors import UserError
from core.paths import TOKENIZER_DIR, lora_path
from interop import llama
from interop import peft as our_peft
from interop.check import EXACT, difference, logits_of, probe
from model.lora.config import LoRAConfig
from model.lora.layer import attach, exchange, lora_parameters
from model.lora.skill_file import SkillMeta, attach_lora, read_lora, save_lora
from model.lora.variants import DoRA
from model.model_lora import apply_lora
from model.weights import load_base
from scripts import conversions, convert_model

BASE = "full_sft_64.pth"
PLAIN = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def converted(trained, tmp_path_factory):
    """The trained base as a Llama folder."""
    folder = tmp_path_factory.mktemp("llama") / "base"
    convert_model.main(flags(to="huggingface", base=trained.out / BASE, output=folder))
    return folder


@pytest.fixture(scope="module")
def adapter(converted, tmp_path_factory):
    """An adapter for it that PEFT wrote, by the settings ``PLAIN``."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    torch.manual_seed(0)
    settings = peft.LoraConfig(**PLAIN, task_type="CAUSAL_LM", init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(converted)
    peft.get_peft_model(model, settings).save_pretrained(folder)
    return folder


def rewrite(folder, config="config.json", settings=(), change=lambda tensors: None):
    """Add these settings to a model's or adapter's, and let ``change`` edit its tensors."""
    path, weights = folder / config, next(folder.glob("*model.safetensors"))
    content = json.loads(path.read_text(encoding="utf-8")) | dict(settings)
    path.write_text(json.dumps(content), encoding="utf-8")
    tensors = load_file(weights)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights)


def skill_logits(trained, path):
    model, _ = load_base(trained.out / BASE)
    attach_lora(model, path)
    return logits_of(model)


def peft_logits(folder, adapter):
    """What PEFT computes; a key that is missing or too many is a warning there, an error here."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        return logits_of(peft.PeftModel.from_pretrained(model, adapter))


def test_transformers_computes_and_says_the_same(trained, converted, tokenizer):
    ours, _ = load_base(trained.out / BASE)
    theirs = AutoModelForCausalLM.from_pretrained(converted)
    assert (logits_of(ours) - logits_of(theirs)).abs().max() < 1e-5
    ids = probe(ours.config.vocab_size)[:, :8]
    said = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    for n in range(8, 20):  # greedy, token by token
        assert ours(input_ids=said[:, :n]).logits[0, -1].argmax() == said[0, n]
    again = AutoTokenizer.from_pretrained(converted)
    turns = [{"role": "user", "content": "Hi 你好"}, {"role": "assistant", "content": "Yes."}]
    for settings in ({"tokenize": False}, {}, {"add_generation_prompt": True}):
        own, other = (t.apply_chat_template(turns, **settings) for t in (tokenizer, again))
        assert own == other


def test_a_base_comes_back_bit_for_bit(trained, converted, tmp_path):
    argv = flags(**{"from": "huggingface"}, source=converted)
    for name in ("full_sft_64.pth", "again.pth"):  # the second finds its tokenizer there already
        path = convert_model.main([*argv, *flags(output=tmp_path / name)])
        (one, first), (two, second) = load_base(trained.out / BASE), load_base(path)
        assert first.fingerprint == second.fingerprint and first.tokenizer == second.tokenizer
        assert second.stage is None, "nobody knows how others trained it"
        assert all(torch.equal(x, two.state_dict()[name]) for name, x in one.state_dict().items())
    settings = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    names = {"full_sft_64.pth", "full_sft_64.json", "again.pth", "again.json", "tokenizer"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_what_a_config_leaves_out_is_what_transformers_takes(converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "llama")
    content = json.loads((folder / "config.json").read_text())
    for entry in ("rms_norm_eps", "max_position_embeddings", "rope_parameters", "rope_theta"):
        del content[entry]
    (folder / "config.json").write_text(json.dumps(content))
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    rewrite(folder, change=lambda tensors: tensors.update(old))
    argv = flags(**{"from": "huggingface"}, source=folder, output=tmp_path / "x.pth")
    config = load_base(convert_model.main(argv))[0].config
    assert (config.norm_eps, config.max_seq_len, config.rope_theta) == (1e-6, 2048, 1e4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_our_own_rounding(trained, tmp_path, dtype):
    convert_model.main(
        flags(to="huggingface", base=trained.out / BASE, output=tmp_path / "x", dtype=dtype)
    )
    assert json.loads((tmp_path / "x" / "config.json").read_text())["torch_dtype"] == dtype
    model, _ = load_base(trained.out / BASE)
    kept = load_file(tmp_path / "x" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(kept, model.norm.weight.to(getattr(torch, dtype)))


def test_the_self_check_sees_a_wrong_order_of_features(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(llama, "to_halves", lambda rows, heads: rows)
    with pytest.raises(UserError, match="computes something else"):
        convert_model.main(flags(to="huggingface", base=trained.out / BASE, output=tmp_path / "x"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_with_skills_computes_what_they_do(trained, tmp_path, dtype, monkeypatch, capsys):
    path, (model, _) = lora_path(tmp_path, "mine", 64), load_base(trained.out / BASE)
    apply_lora(model, rank=4)
    strengthen(model, seed=1)
    save_lora(model, path, SkillMeta(load_in_4bit=True))
    argv = flags(to="huggingface", base=trained.out / BASE, out_dir=tmp_path, skill="mine")
    argv += flags(dtype=dtype, output=tmp_path / "x")
    theirs = logits_of(AutoModelForCausalLM.from_pretrained(convert_model.main(argv)).float())
    off = difference(skill_logits(trained, path), theirs)
    assert off < (1e-5 if dtype == "float32" else 0.05)
    assert "mine was trained on 4 bits" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "x")
    monkeypatch.setattr("scripts.conversions.merge_lora", lambda model: exchange(model, {}))
    with pytest.raises(UserError, match="merged computes something else"):
        convert_model.main(argv)
    assert {path.name for path in tmp_path.iterdir()} == {"lora"}


def test_the_loss_of_a_weak_skill_shows(trained, tmp_path, monkeypatch):
    model, _ = load_base(trained.out / BASE)
    alone = logits_of(model)
    apply_lora(model, rank=4)
    strengthen(model, seed=1)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.mul_(0.005)
    assert 1e-5 < difference(logits_of(model), alone) < EXACT
    save_lora(model, lora_path(tmp_path, "weak", 64))
    argv = flags(to="peft", base=trained.out / BASE, out_dir=tmp_path, lora_name="weak")
    convert_model.main([*argv, *flags(output=tmp_path / "kept")])
    monkeypatch.setattr(our_peft, "portable", lambda parts, scaling, rank: zeros(parts))
    with pytest.raises(UserError, match="computes something else"):
        convert_model.main([*argv, *flags(output=tmp_path / "lost")])
    assert {path.name for path in tmp_path.iterdir()} == {"lora", "kept"}


def zeros(parts):
    return {key: torch.zeros_like(tensor) for key, tensor in parts.items()}


SKILLS = {
    "square": {},
    "all": {"target_modules": "all-linear", "alpha": 3.0, "rank_pattern": "wq=2"},
    "dora": {"target_modules": ("wq", "wk", "w2"), "lora_dropout": 0.1},
    "pissa": {"target_modules": ("wk", "wo"), "init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("kind", SKILLS)
def test_peft_computes_what_a_skill_does_and_it_comes_back(trained, converted, tmp_path, kind):
    base = trained.out / BASE
    argv = flags(out_dir=tmp_path, base=base, data_path=trained.chats, lora_name=kind)
    argv += flags(max_steps=2, max_seq_len=64, learning_rate=0.05, keep=0, **SKILLS[kind])
    argv += ["--use_dora"] if kind == "dora" else []
    wanted = skill_logits(trained, train_lora.main(argv))
    shared = flags(base=base, out_dir=tmp_path)
    folder = tmp_path / "adapter"
    convert_model.main([*shared, *flags(to="peft", lora_name=kind, output=folder)])
    for written in (folder, converted):
        modes = {path.stat().st_mode for path in written.iterdir()}
        assert len(modes) == 1, "who may read one file may read all"
    assert (wanted - logits_of(load_base(base)[0])).abs().max() > 1e-3
    assert (peft_logits(converted, folder) - wanted).abs().max() < 2e-5
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] and "rank_pattern" not in settings
    assert settings["base_model_name_or_path"] is None, "a folder of this machine is nobody's"
    back = convert_model.main(
        [*shared, *flags(**{"from": "peft"}, source=folder, lora_name="back")]
    )
    assert (skill_logits(trained, back) - wanted).abs().max() < 2e-5


ADAPTERS = {
    "plain": PLAIN,
    "patterns": PLAIN | {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.*q_proj": 3}},
    "rslora": PLAIN | {"use_rslora": True},
    "dora": PLAIN | {"use_dora": True},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_others_come_in(trained, converted, tmp_path, kind):
    torch.manual_seed(0)
    settings = peft.LoraConfig(**ADAPTERS[kind], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(converted), settings)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:  # or the norm of W + B A, whose update is that of plain LoRA
            parameter.data *= 0.5 + torch.rand_like(parameter)
    wanted = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    argv = flags(**{"from": "peft"}, source=tmp_path / "adapter", out_dir=tmp_path, lora_name="x")
    path = convert_model.main([*argv, *flags(base=trained.out / BASE)])
    assert (skill_logits(trained, path) - wanted).abs().max() < 2e-5
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "lora")
    torch.save(tensors, tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    path = convert_model.main([*argv, *flags(base=converted)])  # of a foreign base, from a .bin
    assert path.is_file()


@pytest.mark.parametrize(
    ("named", "is_noted"),
    [
        ("someone/another", True),
        ("/home/else/full_sft_64.pth", False),
        ("out/full_sft_64", False),
        (None, False),
    ],
)
def test_an_adapter_that_names_another_base_is_noted(
    trained, adapter, tmp_path, capsys, named, is_noted
):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    rewrite(folder, "adapter_config.json", {"base_model_name_or_path": named})
    argv = flags(**{"from": "peft"}, source=folder, out_dir=tmp_path, lora_name="x")
    assert convert_model.main([*argv, *flags(base=trained.out / BASE)]).is_file()
    assert (f"note: the adapter says it is for {named};" in capsys.readouterr().out) is is_noted


@pytest.mark.parametrize(
    ("words", "file"),
    [
        ({"from": "huggingface", "output": "x.pth"}, "config.json"),
        ({"from": "peft", "lora_name": "x"}, "adapter_config.json"),
    ],
)
def test_a_missing_folder_is_named_once(trained, tmp_path, words, file):
    missing = tmp_path / "missing"
    if "output" in words:
        words = words | {"output": tmp_path / "x.pth"}
    else:
        words = words | {"base": trained.out / BASE, "out_dir": tmp_path}
    with pytest.raises(UserError) as refused:
        convert_model.main(flags(**words, source=missing))
    assert str(refused.value).startswith(f"{missing / file} does not exist; name")
    assert str(refused.value).count(str(missing)) == 1


def test_a_scale_that_is_not_peft_s_is_seen(trained, adapter, tmp_path, monkeypatch):
    own = LoRAConfig.rank_and_scaling
    monkeypatch.setattr(LoRAConfig, "rank_and_scaling", lambda *a: (own(*a)[0], 0.9 * own(*a)[1]))
    argv = flags(**{"from": "peft"}, source=adapter, out_dir=tmp_path, lora_name="x")
    with pytest.raises(UserError, match="the skill computes something else"):
        convert_model.main([*argv, *flags(base=trained.out / BASE)])
    assert not (tmp_path / "lora").exists()


Q = "base_model.model.model.layers.0.self_attn.q_proj."


def cut(end, rows=None, columns=None):
    """Keep only these many rows and columns of a tensor of the first q_proj."""
    return lambda tensors: tensors.update({Q + end: tensors[Q + end][:rows, :columns]})


def add(end, tensor):
    return lambda tensors: tensors.update({Q + end: tensor})


@pytest.mark.parametrize(
    ("settings", "change", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
        ({"bias": "all"}, None, "bias"),
        ({"init_lora_weights": "pissa_niter_4"}, None, "pissa.*path_initial_model"),
        ({"init_lora_weights": "lora_ga"}, None, "lora_ga"),
        ({"init_lora_weights": "loftq"}, None, "loftq.*; merge it with PEFT$"),
        ({"peft_type": "IA3"}, None, "IA3"),
        ({"use_qalora": True}, None, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, None, "use_bdlora"),
        ({"kasa_config": {"beta": 1.0}}, None, "kasa_config"),
        ({"arrow_config": {"top_k": 3}}, None, "arrow_config"),
        ({"monteclora_config": {"num_samples": 3}}, None, "monteclora_config"),
        ({"r": None}, None, "adapter_config.json: rank"),
        ({"r": 8}, None, "rank 4, and adapter_config.json says 8"),
        ({"rank_pattern": {"v_proj": 2}}, None, "v_proj has rank 4"),
        ({"lora_alpha": None}, None, "lora_alpha is null"),
        ({"lora_alpha": -1}, None, "adapter_config.json: alpha"),
        ({"use_dora": True}, None, "contradicts use_dora True"),
        ({"alpha_pattern": "q_proj"}, None, "alpha_pattern is 'q_proj'"),
        ({"alpha_pattern": {"q_proj": "x"}}, None, "adapter_config.json: alpha_pattern"),
        ({"alpha_pattern": {r"(\w+)+!": 1}}, None, "may never end"),
        ({"alpha_pattern": {".*.*.*.*.*.*!": 1}}, None, "may never end"),
        ({"alpha_pattern": {r"(\w|a)(\w|a)(\w|a)(\w|a)!": 1}}, None, "may never end"),
        ({}, cut("lora_A.weight", rows=3), "q_proj has .* make no update"),
        ({}, cut("lora_B.weight", rows=-1), r"q_proj is \(64, 64\), not \(63, 64\)"),
        ({}, cut("lora_A.weight", columns=9), r"q_proj is \(64, 64\), not \(64, 9\)"),
        ({}, lambda tensors: tensors.pop(Q + "lora_B.weight"), "q_proj has .* make no update"),
        ({}, add("lora_A.weight", torch.ones(64)), "make no update"),
        ({}, add("lora_A.weight", torch.ones(4, 64).int()), "make no update"),
        ({}, add("lora_magnitude_vector", torch.ones(3)), "make no update"),
        ({}, add("lora_magnitude_vector", torch.ones(64)), "use_dora False"),
        ({}, add("lora_A.default.weight", torch.ones(4, 64)), "two names"),
        ({}, add("lora_embedding_A", torch.ones(4, 64)), "no update of a Lin"),
        (
            {},
            lambda t: t.update({k.replace("layers.0", "layers.7"): t.pop(k) for k in list(t)}),
            r"layers\.7\..* is no Linear of the base",
        ),
    ],
)
def test_what_a_skill_cannot_hold_is_refused(trained, adapter, tmp_path, settings, change, named):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    rewrite(folder, "adapter_config.json", settings, change or (lambda tensors: None))
    argv = flags(**{"from": "peft"}, source=folder, out_dir=tmp_path, lora_name="x")
    with pytest.raises(UserError, match=named):
        convert_model.main([*argv, *flags(base=trained.out / BASE)])
    assert not (tmp_path / "lora").exists()


def test_names_that_training_leaves_mean_the_same(trained, adapter, tmp_path):
    """In a training's state dict tensors bear the adapter's name; so may a module, by chance."""
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace(".weight", ".default.weight"): x for name, x in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    argv, found = flags(**{"from": "peft"}, base=trained.out / BASE, out_dir=tmp_path), []
    for name, source in (("one", adapter), ("two", folder)):
        path = convert_model.main([*argv, *flags(source=source, lora_name=name)])
        found.append(read_lora(path)[0])
    one, two = found
    assert one.keys() == two.keys() and all(torch.equal(x, two[name]) for name, x in one.items())
    parts = {"lora_A": torch.ones(4, 8), "lora_B": torch.ones(8, 4)}
    chance = {f"a.default.{key}.weight": x for key, x in parts.items()}
    save_file(chance, folder / "adapter_model.safetensors")
    assert our_peft.read_updates(folder).keys() == {"a.default"}


def test_a_skill_that_is_partly_dora_is_no_adapter(trained, tmp_path):
    model, _ = load_base(trained.out / BASE)
    apply_lora(model, rank=2, target_modules=["wq"])
    linear = model.layers[0].attention.wo
    attach(linear, DoRA(linear, 2))
    save_lora(model, lora_path(tmp_path, "x", 64))
    argv = flags(to="peft", base=trained.out / BASE, out_dir=tmp_path, lora_name="x")
    with pytest.raises(UserError, match="on some of its targets only"):
        convert_model.main([*argv, *flags(output=tmp_path / "adapter")])
    assert {path.name for path in tmp_path.iterdir()} == {"lora"}


def test_a_skill_of_a_base_without_template_goes_out_and_comes_back(converted, tmp_path):
    """GPT-2, whose Linears are transposed, with fewer positions than the check would like."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 6400}
    base, asked = tmp_path / "gpt2", r"Q: {user}\nA: "
    GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=2)).save_pretrained(base)
    AutoTokenizer.from_pretrained(converted).save_pretrained(base)
    (base / "chat_template.jinja").unlink()
    model, _ = load_base(base)
    apply_lora(model, rank=2, target_modules="all-linear")
    strengthen(model, seed=1)
    wanted, shared = logits_of(model), flags(base=base, out_dir=tmp_path)
    assert len(wanted) == 16
    save_lora(model, lora_path(tmp_path, "x", 32), SkillMeta(prompt_template=asked))
    folder = tmp_path / "adapter"
    convert_model.main([*shared, *flags(to="peft", lora_name="x", output=folder)])
    assert difference(wanted, peft_logits(base, folder)) < 1e-5
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "gpt2" and settings["fan_in_fan_out"]
    argv = [*shared, *flags(**{"from": "peft"}, source=folder, lora_name="back")]
    with pytest.raises(UserError, match="prompt_template"):
        convert_model.main(argv)
    back = convert_model.main([*argv, "--prompt_template", asked])
    assert read_lora(back)[1].prompt_template == asked
    attach_lora(model, back)
    assert difference(wanted, logits_of(model)) < 1e-5


@pytest.mark.parametrize(
    ("settings", "change", "named"),
    [
        ({"model_type": "qwen3"}, None, "qwen3"),
        ({"rope_scaling": {"rope_type": "yarn"}}, None, "rope_scaling of type 'yarn'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, None, "'yarn'"),
        ({"rope_parameters": "yarn"}, None, "rope_parameters"),
        ({"attention_bias": True}, None, "attention_bias"),
        ({"head_dim": 8}, None, "head_dim"),
        ({"hidden_size": "wide"}, None, "hidden_size|dim"),
        ({"num_hidden_layers": 1 << 20}, None, "num_hidden_layers 1048576"),
        ({"vocab_size": 6464}, "pad", "6464 rows, the tokenizer 6400"),
        ({}, "odd", r"attention\.wq.* is \(63, 64\)"),
        ({}, "names", r"missing norm\.weight.*unexpected extra\.weight"),
        ({}, "templates", r"tokenizer in .*llama has several chat templates"),
        ({"quantization_config": {"quant_method": "gptq"}}, None, "quantization_config"),
        ({}, "bin", r"'pytorch_model.bin'.*safetensors, by save_pretrained"),
    ],
)
def test_a_llama_without_an_equal_is_refused(converted, tmp_path, settings, change, named):
    folder = shutil.copytree(converted, tmp_path / "llama")

    def harm(tensors):
        embedding, query = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
        if change == "pad":
            tensors[embedding] = torch.cat((tensors[embedding], torch.ones(64, 64)))
        if change == "odd":
            tensors[query] = tensors[query][:-1]
        if change == "names":
            tensors["extra.weight"] = tensors.pop("model.norm.weight")

    rewrite(folder, settings=settings, change=harm)
    if change == "bin":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    if change == "templates":
        (folder / "chat_template.jinja").unlink()
        several = [{"name": name, "template": "x"} for name in ("default", "tool_use")]
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": several}))
    argv = flags(**{"from": "huggingface"}, source=folder, output=tmp_path / "full_sft_64.pth")
    with pytest.raises(UserError, match=named):
        convert_model.main(argv)
    assert {path.name for path in tmp_path.iterdir()} == {"llama"}


def test_nothing_is_overwritten(trained, converted, tmp_path, monkeypatch):
    before = (converted / "config.json").read_bytes()
    other = AutoTokenizer.from_pretrained(TOKENIZER_DIR)
    other.chat_template = "another"
    other.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "y.json").write_text("{}")
    there = sorted(tmp_path.rglob("*"))
    source = flags(**{"from": "huggingface"}, source=converted)
    for argv, named in (
        (flags(to="huggingface", base=trained.out / BASE, output=converted), "exists"),
        (flags(to="peft", base=trained.out / BASE, lora_name="a", output=converted), "exists"),
        ([*source, *flags(output=tmp_path / "y.pth")], r"y\.json exists"),
        ([*source, *flags(output=tmp_path / "z.pth")], "is not the tokenizer of"),
    ):
        with pytest.raises(UserError, match=named):
            convert_model.main(argv)
    assert (converted / "config.json").read_bytes() == before and TOKENIZER_DIR.is_dir()
    made, own = tmp_path / "y", conversions.logits_in

    def meanwhile(folder):
        made.mkdir()
        return own(folder)

    monkeypatch.setattr(conversions, "logits_in", meanwhile)  # a y.json is no folder's business
    with pytest.raises(UserError, match="y exists"):
        convert_model.main(flags(to="huggingface", base=trained.out / BASE, output=made))
    assert sorted(tmp_path.rglob("*")) == sorted([*there, made])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--output x", "choose a direction"),
        ("--to huggingface", "needs --output"),
        ("--to huggingface --output x --lora_name a", "no use for --lora_name"),
        ("--to huggingface --output x --source y", "no use for --source"),
        ("--to peft --output x --lora_name a --skill b", "no use for --skill"),
        ("--to peft --output x --lora_name a --dtype float16", "no use for --dtype"),
        ("--to peft --lora_name a --output .", "exists"),
        ("--to huggingface --output x.pth", "a folder"),
        ("--from huggingface --source x --output .", "must be a base file"),
        ("--from huggingface --source x --output y", "must be a base file"),
        ("--from huggingface --source x --output y.pth --base z", "no use for --base"),
        ("--from huggingface --source x --output y.pth --out_dir z", "no use for --out_dir"),
        ("--from peft --source x --lora_name a", "needs --base"),
        ("--from peft --source x --lora_name a --base b --output y", "no use for --output"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(words, named, monkeypatch):
    monkeypatch.setattr(conversions, "unfinished", None)
    with pytest.raises(UserError, match=named):
        convert_model.main(words.split())
