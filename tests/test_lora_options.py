"""Every option of LoRA means what it means in PEFT, which is the judge here, and impossible ones
are named.
"""

import copy
import math

import pytest
import torch
from conftest import IDS, Source, logits_of, ragged_batch, run_training, strengthen
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from benchmarks.seeded_model import fill
from core.errors import UserError
from model.lora.layer import adapted, lora_parameters, output_parameters
from model.lora.library import merge_lora, unmerge_lora
from model.lora.targets import table_of
from model.model_lora import LoRA, apply_lora, attach_lora, remove_lora, save_lora
from trainer.optimizer import param_groups

BOTH = {"target_modules": ["wq", "w2"]}
# our options -> PEFT's
OPTIONS = {
    "alpha": ({"alpha": 10.0}, {"lora_alpha": 10}),
    "rslora": ({"alpha": 10.0, "use_rslora": True}, {"lora_alpha": 10, "use_rslora": True}),
    "dora": ({"alpha": 6.0, "use_dora": True}, {"lora_alpha": 6, "use_dora": True}),
    "dropout": ({"alpha": 4.0, "lora_dropout": 0.3}, {"lora_alpha": 4, "lora_dropout": 0.3}),
    "dora and dropout": (
        {"alpha": 4.0, "lora_dropout": 0.3, "use_dora": True},
        {"lora_alpha": 4, "lora_dropout": 0.3, "use_dora": True},
    ),
    "pissa": (
        {"alpha": 10.0, "init_lora_weights": "pissa"},
        {"lora_alpha": 10, "init_lora_weights": "pissa"},
    ),
    "all-linear": (
        {"alpha": 4.0, "target_modules": "all-linear"},
        {"lora_alpha": 4, "target_modules": "all-linear"},
    ),
    "regular expression": (
        {"alpha": 4.0, "target_modules": r".*\.1\..*\.(wk|w1)"},
        {"lora_alpha": 4, "target_modules": r".*\.1\..*\.(wk|w1)"},
    ),
    "exclusion": (
        {
            "alpha": 4.0,
            "target_modules": "all-linear",
            "exclude_modules": ["wv", "layers.0.attention.wq"],
        },
        {
            "lora_alpha": 4,
            "target_modules": "all-linear",
            "exclude_modules": ["wv", "layers.0.attention.wq"],
        },
    ),
    "excluding expression": (
        {"alpha": 4.0, "exclude_modules": r".*\.0\..*"},
        {"lora_alpha": 4, "exclude_modules": r".*\.0\..*"},
    ),
    "layers": (
        {"alpha": 4.0, "layers_to_transform": [1]},
        {"lora_alpha": 4, "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "patterns": (
        {
            "alpha": 8.0,
            "rank_pattern": {"w2": 2, r"layers\.\d+\.attention\.wq": 6, "wq": 3},
            "alpha_pattern": {"0.feed_forward.w2": 5.0},
        },
        {
            "lora_alpha": 8,
            "rank_pattern": {"w2": 2, r"layers\.\d+\.attention\.wq": 6, "wq": 3},
            "alpha_pattern": {"0.feed_forward.w2": 5.0},
        },
    ),
}


def pairs_of(ours, theirs) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Our parameters and PEFT's, of the same targets."""
    found = dict(adapted(ours))
    layers = {name: module for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert found.keys() == layers.keys()
    pairs = []
    for name, linear in found.items():
        lora, layer = linear.lora, layers[name]
        assert lora.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
        pairs += [
            (lora.A.weight, layer.lora_A["default"].weight),
            (lora.B.weight, layer.lora_B["default"].weight),
        ]
        if "default" in getattr(layer, "lora_magnitude_vector", {}):
            pairs.append((lora.magnitude, layer.lora_magnitude_vector["default"].weight))
    return pairs


def assert_same(ours, theirs, pairs, **inputs):
    """Equal output, loss and gradients, also of a training pass with its dropout; fp64 shows what
    is no rounding.
    """
    ours.double(), theirs.double()
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(7)
        outputs.append(model(**inputs))
        outputs[-1].loss.backward()
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, atol=1e-6, rtol=1e-6)
    if outputs[0].logits is not None:
        torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-6, rtol=1e-6)
    for mine, peft_s in pairs:
        assert mine.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, peft_s.grad, atol=1e-6, rtol=1e-6)
        mine.grad = peft_s.grad = None


@pytest.mark.parametrize("option", OPTIONS)
def test_peft_computes_the_same_and_draws_the_same_targets(sharp_model, option):
    peft = pytest.importorskip("peft")
    mine, peft_s = OPTIONS[option]
    ours, other = sharp_model, copy.deepcopy(sharp_model)
    apply_lora(ours, rank=4, **(BOTH | mine))
    theirs = peft.get_peft_model(other, peft.LoraConfig(r=4, **(BOTH | peft_s)))
    pairs = pairs_of(ours, other)
    if option == "pissa":
        for left, right in pairs:
            torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-6)
    strengthen(ours, 1)
    with torch.no_grad():
        for left, right in pairs:
            right.copy_(left)
    for training in (False, True):
        ours.train(training), theirs.train(training)
        assert_same(ours, theirs, pairs, input_ids=IDS, labels=IDS)


@pytest.mark.parametrize(("init", "peft_s"), [("kaiming", True), ("gaussian", "gaussian")])
def test_a_starts_as_peft_draws_it(init, peft_s):
    peft = pytest.importorskip("peft")

    def start(draw):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(64, 48))
        torch.manual_seed(4)
        draw(model)
        (weight,) = [p for name, p in model.named_parameters() if "A." in name]
        return weight

    mine = start(lambda model: apply_lora(model, 8, target_modules=["0"], init_lora_weights=init))
    settings = peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights=peft_s)
    theirs = start(lambda model: peft.inject_adapter_in_model(settings, model))
    assert mine.std().item() == pytest.approx(theirs.std().item(), rel=0.1)
    assert mine.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.5)
    if init == "kaiming":
        assert mine.abs().max() <= 1 / math.sqrt(64)


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_dropout": 0.5}]
)
def test_every_kind_starts_from_the_base_exactly_and_leaves_it_bit_for_bit(sharp_model, options):
    with torch.no_grad():
        before = sharp_model.eval()(IDS).logits
        weights = copy.deepcopy(sharp_model.state_dict())
        apply_lora(sharp_model, 4, 12.0, "all-linear", **options)
        started = sharp_model(IDS).logits
        if "use_dora" in options:  # the magnitude is divided by the norm that it is
            torch.testing.assert_close(started, before, atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(started, before)
        strengthen(sharp_model, 2)
        assert (sharp_model(IDS).logits - before).abs().max() > 1e-2
        remove_lora(sharp_model)
        assert torch.equal(sharp_model(IDS).logits, before)
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in sharp_model.state_dict().items()
    )


@pytest.mark.parametrize("value", [0.0, 1e-30])
@pytest.mark.parametrize("in_fp16", [False, True])
def test_dora_learns_on_a_row_without_length(value, in_fp16):
    """Under fp16 autocast also a product B A may vanish: nothing is divided by a norm of 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[0] = value
    apply_lora(model, 2, use_dora=True)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.01)
    x = torch.randn(4, 8)
    for _ in range(3):
        with torch.autocast("cpu", torch.float16, enabled=in_fp16):
            y = model(x)
        y.float().square().mean().backward()
        numbers = [y, *(p.grad for p in lora_parameters(model))]
        assert all(tensor.isfinite().all() for tensor in numbers)
        optimizer.step()
        optimizer.zero_grad()
    merge_lora(model)
    torch.testing.assert_close(model(x), y.float(), atol=0.05, rtol=0.05)


def test_dropout_is_for_training_alone(sharp_model):
    apply_lora(sharp_model.eval(), 4, lora_dropout=0.5)
    strengthen(sharp_model, 2)
    assert torch.equal(logits_of(sharp_model), logits_of(sharp_model))
    sharp_model.train()
    assert not torch.equal(logits_of(sharp_model), logits_of(sharp_model))


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True, "alpha": 6.0},
        {"init_lora_weights": "pissa", "alpha": 6.0},
        {"alpha": 6.0, "use_rslora": True, "rank_pattern": {"wk": 2}, "alpha_pattern": {"wq": 3.0}},
    ],
)
def test_a_file_gives_every_kind_back(sharp_model, tmp_path, options):
    apply_lora(sharp_model.eval(), 4, target_modules="all-linear", **options)
    strengthen(sharp_model, 3)
    with torch.no_grad():
        expected = sharp_model(IDS).logits
        save_lora(sharp_model, tmp_path / "x.pth")
        remove_lora(sharp_model)
        attach_lora(sharp_model, tmp_path / "x.pth")
        found = sharp_model(IDS).logits
    if "init_lora_weights" in options:  # the file has one product where training had two
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"rank_pattern": {"wq": 0}}, "rank_pattern 'wq=0' must be NAME=NUMBER above 0"),
        ({"alpha": 0.0}, "alpha=0.0 must be"),
        ({"alpha": -2.0}, "alpha=-2.0 must be"),
        ({"alpha": math.nan}, "alpha=nan must be"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0 must be"),
        ({"rank_pattern": ["wq"]}, "rank_pattern 'wq' must be NAME=NUMBER"),
        ({"rank_pattern": ["wq=x"]}, "rank_pattern 'wq=x' must be NAME=NUMBER"),
        ({"rank_pattern": {"w9": 2}}, "rank_pattern 'w9' matches nothing; there are wo, wq"),
        ({"alpha_pattern": {"w1": 2}}, "alpha_pattern 'w1' matches nothing; there are wo, wq"),
        ({"target_modules": "("}, r"'\(' is no regular expression"),
        (
            {"target_modules": ["wq", "w9"]},
            "target_modules='w9' matches nothing; there are w1, w2, w3, wk, wo, wq",
        ),
        ({"exclude_modules": "w1"}, "exclude_modules='w1' matches nothing; there are wo, wq"),
        (
            {"exclude_modules": ["wo", "w1", "w9"]},
            "exclude_modules='w1', 'w9' matches nothing; there are wo, wq",
        ),
        ({"exclude_modules": ["wq", "wo"]}, "leaves no target"),
        (
            {"layers_to_transform": [0, 7]},
            r"layers_to_transform \[7\] match no target; there are layers 0, 1",
        ),
        ({"rank_pattern": {"wq": 65}}, "rank=65 exceeds the 64 features of layers.0.attention.wq"),
        ({"use_dora": True, "init_lora_weights": "pissa"}, "exclude each other"),
        ({"rank": 2.5}, "rank=2.5 must be a whole number"),
        ({"rank": True}, "rank=True must be a whole number"),
        ({"alpha": "x"}, "alpha='x' must be"),
        ({"lora_dropout": "a"}, "lora_dropout='a' must be"),
        ({"rank_pattern": {"wq": 2.7}}, "rank_pattern 'wq=2.7' must be NAME=NUMBER"),
        ({"rank_pattern": {"(": 2}}, r"'\(' is no regular expression"),
        ({"rank_pattern": ["wo=4", "wo=8"]}, "rank_pattern has 'wo' twice"),
        ({"target_modules": None}, r"target_modules=\(\) matches nothing"),
        ({"exclude_modules": "Square"}, "exclude_modules=square is no name of a module"),
        ({"exclude_modules": ["wq", "("]}, r"'\(' is no regular expression"),
        ({"target_modules": ["wq", "("]}, r"'\(' is no regular expression"),
        ({"target_modules": ["wq", "wk"], "rank": 33}, "rank=33 exceeds the 32 features of"),
        ({"rank": 65}, "rank=65 exceeds the 64 features of layers.0.attention.wq"),
        ({"target_modules": "all-linear", "rank_pattern": "wk=33"}, "rank=33 exceeds the 32 feat"),
        (
            {"init_lora_weights": "none"},
            "init_lora_weights='none' must be one of minimind, kaiming, gaussian, pissa",
        ),
        ({"init_lora_weights": True}, "init_lora_weights=True must be one of"),
        ({"use_rslora": True}, "use_rslora changes what alpha is divided by: give an alpha"),
    ],
)
def test_impossible_options_are_refused_and_change_nothing(tiny_model, options, said):
    with pytest.raises(UserError, match=said):
        apply_lora(tiny_model, **options)
    assert not list(adapted(tiny_model)) and all(
        parameter.requires_grad for parameter in tiny_model.parameters()
    )


def test_the_words_of_a_command_line_mean_what_python_values_mean(tiny_model):
    apply_lora(
        tiny_model,
        4,
        target_modules=("all-linear",),
        rank_pattern=("w[12]=2", "wq=3"),
        exclude_modules=("wv",),
    )
    assert ranks_of(tiny_model) == {"wq": 3, "wk": 4, "wo": 4, "w1": 2, "w2": 2, "w3": 4}


def test_one_pattern_may_be_a_string(tiny_model):
    for pattern in ("wq=3", "(?i)WQ=3", r"w(q)(?<=\1)=3"):
        apply_lora(tiny_model, 4, rank_pattern=pattern, alpha_pattern="wo=8")
        assert ranks_of(tiny_model) == {"wq": 3, "wo": 4}
        assert tiny_model.layers[0].attention.wo.lora.scaling == 2.0
        remove_lora(tiny_model)


def ranks_of(model) -> dict[str, int]:
    return {name.rpartition(".")[2]: linear.lora.rank for name, linear in adapted(model)}


def test_the_table_names_shapes_ranks_and_parameters(tiny_model):
    apply_lora(tiny_model, 4, target_modules=["wq", "wk"], rank_pattern={"1.attention.wk": 2})
    assert [line.split() for line in table_of(tiny_model).splitlines()] == [
        ["2", "x", "layers.N.attention.wq", "64", "x", "64", "rank", "4", "1,024"],
        ["1", "x", "layers.N.attention.wk", "32", "x", "64", "rank", "4", "384"],
        ["1", "x", "layers.N.attention.wk", "32", "x", "64", "rank", "2", "192"],
        ["4", "modules", "1,600", "parameters"],
    ]


# models of other makers

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
MODELS = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1)),
    "Llama, tied": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=True)
    ),
    "Qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=1)),
    "BERT": lambda: BertForSequenceClassification(BertConfig(**SMALL)),
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)),
    "T5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=64,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        )
    ),
    "BART": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=64,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
        )
    ),
}


MIXTURES = {  # PEFT gives their experts another kind of LoRA
    "Mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=4)
    ),
    "Qwen2Moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SMALL,
            num_key_value_heads=1,
            num_experts=4,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=24,
        )
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_models_of_other_makers_carry_what_peft_gives_them(tmp_path, name, options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = MODELS[name]()
    fill(model.named_parameters())
    model.eval()
    other = copy.deepcopy(model)
    task = "SEQ_CLS" if name == "BERT" else None  # so PEFT leaves the classifier out, and trains it
    left_out = {"exclude_modules": ["classifier"]} if name == "BERT" else {}
    apply_lora(model, 4, 6.0, "all-linear", **left_out, **options)
    theirs = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", task_type=task, **options
    )
    theirs = peft.get_peft_model(other, theirs).eval()
    pairs = pairs_of(model, other)
    strengthen(model, 5)
    with torch.no_grad():
        for left, right in pairs:
            right.copy_(left)
    ids = IDS[:, :12].clone()
    labels = torch.tensor([0, 1]) if name == "BERT" else ids
    assert_same(model, theirs, pairs, input_ids=ids, labels=labels)
    model.float()
    with torch.no_grad():
        expected = (
            model(input_ids=ids).logits
            if name == "BERT"
            else model(input_ids=ids, labels=ids).logits
        )
        save_lora(model, tmp_path / "any.pth")
        remove_lora(model)
        attach_lora(model, tmp_path / "any.pth")
        found = (
            model(input_ids=ids).logits
            if name == "BERT"
            else model(input_ids=ids, labels=ids).logits
        )
    assert torch.equal(found, expected)
    weights = copy.deepcopy(model.state_dict())
    merge_lora(model)
    with torch.no_grad():
        alone = (
            model(input_ids=ids).logits
            if name == "BERT"
            else model(input_ids=ids, labels=ids).logits
        )
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)
    unmerge_lora(model)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())


def test_square_targets_of_an_untied_model_leave_the_head_out():
    config = LlamaConfig(**SMALL | {"vocab_size": 16}, num_key_value_heads=1)
    targets = apply_lora(LlamaForCausalLM(config), 2)
    assert {name.rpartition(".")[2] for name in targets} == {"q_proj", "o_proj"}
    assert apply_lora(LlamaForCausalLM(config), 2, target_modules=["lm_head"]) == ["lm_head"]


@pytest.mark.parametrize("shorthand", ["all-linear", "square"])
def test_shorthands_leave_out_what_has_fewer_features_than_the_rank(shorthand, capsys):
    wide, gate = nn.Linear(8, 8), nn.Linear(2, 2)
    assert apply_lora(nn.ModuleList([wide, gate]), 2, target_modules=shorthand) == ["0", "1"]
    assert not capsys.readouterr().out
    model = nn.ModuleDict({"wide": nn.Linear(8, 8), "0": nn.ModuleDict({"gate": gate})})
    remove_lora(model)
    assert apply_lora(model, 4, target_modules=shorthand) == ["wide"]
    assert "rank=4 exceeds the features of N.gate: left out" in capsys.readouterr().out
    remove_lora(model)
    assert len(apply_lora(model, 4, target_modules=shorthand, rank_pattern="gate=1")) == 2


@pytest.mark.parametrize(
    ("name", "options", "expert", "can"),
    [
        ("Llama", {}, 0, ""),
        ("Mixtral", {"target_modules": ["q_proj"]}, 0, ""),
        ("Mixtral", {}, 32, "k_proj, lm_head, o_proj, q_proj, v_proj"),
        ("Mixtral", {"exclude_modules": ["q_proj"]}, 32, "k_proj, lm_head, o_proj, q_proj, v_proj"),
        ("Qwen2Moe", {}, 8, "down_proj, gate_proj, k_proj, lm_head, o_proj"),
    ],
)
def test_all_linear_says_which_matrices_it_cannot_reach(capsys, name, options, expert, can):
    model = (MODELS | MIXTURES)[name]()
    every = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)]
    apply_lora(model, 4, **({"target_modules": "all-linear"} | options))
    covered = sum(linear.weight.numel() for _, linear in adapted(model))
    bare = 2 * 4 * (3 * 16 * expert + 16)  # layers x experts x (matrices + row of the router)
    notes = [line for line in capsys.readouterr().out.splitlines() if "no Linear holds" in line]
    assert len(notes) == bool(expert)
    for note in notes:
        assert f"cover {covered / (sum(every) + bare):.1%} of the weights in matrices" in note
        mlp = "model.layers.N.mlp."
        assert f"{mlp}gate.weight, {mlp}experts.gate_up_proj, {mlp}experts.down_proj, so" in note
        assert f"target_modules can name {can}" in note


def test_layers_select_among_targets_in_layers_alone():
    model = MODELS["Llama"]()
    targets = apply_lora(model, 4, target_modules=["q_proj", "lm_head"], layers_to_transform=[1])
    assert targets == ["model.layers.1.self_attn.q_proj", "lm_head"]


def test_all_adapters_are_lora(tiny_model):
    apply_lora(tiny_model, 2, use_dora=True)
    assert all(isinstance(linear.lora, LoRA) for _, linear in adapted(tiny_model))


# LoRA+


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_lora_plus_gives_the_rates_that_peft_gives(tiny_model, options):
    peft = pytest.importorskip("peft")
    other = copy.deepcopy(tiny_model)
    apply_lora(tiny_model, 4, **options)
    groups = param_groups(tiny_model, 0.0, "adamw", output_parameters(tiny_model), 16.0)
    rates = {id(p): 1e-3 * group["lr_ratio"] for group in groups for p in group["params"]}
    mine = {name: rates[id(p)] for name, p in tiny_model.named_parameters() if p.requires_grad}
    theirs = peft.get_peft_model(
        other, peft.LoraConfig(r=4, target_modules=["wq", "wo"], **options)
    )
    from peft.optimizers import create_loraplus_optimizer

    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0
    )
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = {"lora_A.default.weight": "lora.A.weight", "lora_B.default.weight": "lora.B.weight"}
    names["lora_magnitude_vector.default.weight"] = "lora.magnitude"
    found = {}
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            (old,) = [old for old in names if name.endswith(old)]
            found[name.removeprefix("base_model.model.").replace(old, names[old])] = rates[id(p)]
    assert found == pytest.approx(mine) and len(set(mine.values())) == 2


def test_the_loop_gives_each_parameter_its_own_rate(tiny_model, tmp_path):
    apply_lora(tiny_model, 4)
    with torch.no_grad():
        for parameter in lora_parameters(tiny_model):
            parameter.normal_(std=0.1)
    before = [p.detach().clone() for p in lora_parameters(tiny_model)]
    groups = param_groups(tiny_model, 0.0, "adamw", output_parameters(tiny_model), 8.0)
    run_training(tiny_model, Source([ragged_batch(2, seed=3)]), tmp_path, groups=groups, epochs=2)
    moved = [
        float((p.detach() - old).abs().max())
        for p, old in zip(lora_parameters(tiny_model), before, strict=True)
    ]
    steps = {"A": moved[0::2], "B": moved[1::2]}  # AdamW's first steps are as long as the rate
    assert min(steps["B"]) / max(steps["A"]) == pytest.approx(8.0, rel=1e-3)
