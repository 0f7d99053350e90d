"""Invariants of skill files: what they hold, what is refused and in which words, and swapping
without a trace.
"""

import copy
import json
import textwrap

import pytest
import torch
from conftest import logits_of, strengthen
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from benchmarks.seeded_model import fill
from core.errors import UserError
from model.LMConfig import LMConfig
from model.lora.layer import adapted, lora_parameters
from model.lora.library import SkillLibrary, merge_lora, unmerge_lora
from model.lora.skill_file import META_KEY, SkillMeta, base_fingerprint, read_lora
from model.model import MiniMindLM
from model.model_lora import apply_lora, attach_lora, load_lora, remove_lora, save_lora
from model.weights import fingerprint, save_base

WQ = "layers.0.attention.wq"


def add_lora(model, rank=4, alpha=None, target_modules="square", seed=0):
    """LoRA with weights that matter, B included."""
    apply_lora(model, rank, alpha, target_modules)
    strengthen(model, seed)


def written(model, path, meta=None, **settings):
    """A skill file for ``model``, which is left bare; and the logits with that skill."""
    add_lora(model, **settings)
    save_lora(model, path, meta)
    logits = logits_of(model)
    remove_lora(model)
    return logits


@pytest.fixture
def skill(sharp_model, tmp_path):
    """A skill of rank 4 on the square Linears of ``sharp_model``, which carries no LoRA."""
    path = tmp_path / "lora_medical_64.pth"
    written(sharp_model, path, SkillMeta(base={"file": "full_sft_64.pth"}))
    return path


def meta_of(path):
    return json.loads(bytes(torch.load(path, weights_only=True)[META_KEY].tolist()))


def edited(path, meta=None, **tensors):
    """The skill file with other tensors (None: without that one) and other ``_meta`` entries
    (False: no _meta).
    """
    content = torch.load(path, weights_only=True) | tensors
    record = meta_of(path) | (meta or {})
    content[META_KEY] = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
    if meta is False:
        del content[META_KEY]
    torch.save({name: tensor for name, tensor in content.items() if tensor is not None}, path)
    return path


def refusal(action, model, path):
    with pytest.raises(UserError) as caught:
        action(model, path)
    return str(caught.value)


# what a file holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_are_minimind_s_and_one_meta(sharp_model, tmp_path, dtype):
    add_lora(sharp_model)
    save_lora(sharp_model.to(dtype), tmp_path / "x.pth")
    tensors = torch.load(tmp_path / "x.pth", weights_only=True)
    targets = [f"layers.{n}.attention.{name}" for n in range(2) for name in ("wq", "wo")]
    assert set(tensors) == {
        f"{target}.lora.{matrix}.weight" for target in targets for matrix in "AB"
    } | {"_meta"}
    assert tensors.pop("_meta").dtype == torch.uint8
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert tensors[f"{WQ}.lora.A.weight"].shape == (4, 64)
    assert tensors[f"{WQ}.lora.B.weight"].shape == (64, 4)


def test_meta_explains_the_file(sharp_model, tmp_path):
    written(
        sharp_model,
        tmp_path / "x.pth",
        SkillMeta(base={"file": "b.pth"}, rank=99, more={"note": "中"}),
        alpha=10.0,
        rank=4,
    )
    meta = meta_of(tmp_path / "x.pth")
    assert (meta["format"], meta["rank"], meta["alpha"], meta["note"]) == (1, 4, 10.0, "中")
    assert meta["base"] == {"file": "b.pth", "fingerprint": base_fingerprint(sharp_model)}
    assert meta["scaling"] == dict.fromkeys(meta["targets"], 2.5)


def test_a_model_without_lora_has_nothing_to_save(tiny_model, tmp_path):
    with pytest.raises(UserError, match="call apply_lora"):
        save_lora(tiny_model, tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())


# loading


def test_round_trip_is_bit_exact_and_takes_the_file_s_alpha(sharp_model, tmp_path):
    expected = written(sharp_model, tmp_path / "x.pth", alpha=10.0)
    apply_lora(sharp_model, 4)
    meta = load_lora(sharp_model, tmp_path / "x.pth")
    assert meta.alpha == 10.0
    assert torch.equal(logits_of(sharp_model), expected)
    assert all(parameter.requires_grad for parameter in lora_parameters(sharp_model))


def test_loading_never_changes_the_dtype(sharp_model, skill):
    apply_lora(sharp_model, 4)
    load_lora(sharp_model.bfloat16(), skill)
    assert {parameter.dtype for parameter in sharp_model.parameters()} == {torch.bfloat16}


def test_a_minimind_file_loads_at_scale_1_with_a_note(sharp_model, tmp_path, capsys):
    expected = written(sharp_model, tmp_path / "x.pth")
    edited(tmp_path / "x.pth", meta=False)
    apply_lora(sharp_model, 4, alpha=32.0)
    assert load_lora(sharp_model, tmp_path / "x.pth").alpha == 4
    assert torch.equal(logits_of(sharp_model), expected)
    assert "does not say which base" in capsys.readouterr().out


def test_another_base_is_refused_with_both_names_unless_allowed(sharp_model, skill):
    first = base_fingerprint(sharp_model)
    with torch.no_grad():
        sharp_model.norm.weight.mul_(1.1)
    second = base_fingerprint(sharp_model)
    add_lora(sharp_model, seed=1)
    before = logits_of(sharp_model)
    for action in (load_lora, attach_lora):
        message = refusal(action, sharp_model, skill)
        assert all(
            part in message
            for part in ("full_sft_64.pth", first[:12], second[:12], "allow_base_mismatch")
        )
        assert torch.equal(logits_of(sharp_model), before)
    load_lora(sharp_model, skill, allow_base_mismatch=True)
    assert not torch.equal(logits_of(sharp_model), before)


def test_a_bf16_copy_of_the_base_is_the_same_base(sharp_model, skill):
    attach_lora(sharp_model.bfloat16(), skill)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "LoRA of rank 4 on 4 Linears (wo, wq)"),
        ({"rank": 8, "target_modules": "all-linear"}, "LoRA of rank 8 on 14 Linears (w1, w2, w3,"),
        ({"target_modules": ["wk", "w2"]}, "LoRA of rank 4 on 4 Linears (w2, wk)"),
    ],
)
@pytest.mark.parametrize(
    ("applied", "has"),
    [
        ({"rank": 2}, "LoRA of rank 2 on 4 Linears (wo, wq)"),
        ({"rank": 4, "target_modules": ["wv"]}, "LoRA of rank 4 on 2 Linears (wv)"),
        (None, "no LoRA"),
    ],
)
def test_a_mismatch_names_rank_and_targets_of_both_and_attaching_takes_it(
    sharp_model, tmp_path, settings, said, applied, has
):
    expected = written(sharp_model, tmp_path / "x.pth", **settings)
    if applied:
        add_lora(sharp_model, **applied)
    before = logits_of(sharp_model)
    message = refusal(load_lora, sharp_model, tmp_path / "x.pth")
    assert torch.equal(logits_of(sharp_model), before)
    assert f"has {said}" in message and f"the model {has}; use attach_lora" in message
    attach_lora(sharp_model, tmp_path / "x.pth")
    assert torch.equal(logits_of(sharp_model), expected)


def test_dora_is_no_lora(sharp_model, tmp_path):
    apply_lora(sharp_model, 4, use_dora=True)
    save_lora(sharp_model, tmp_path / "x.pth")
    remove_lora(sharp_model)
    add_lora(sharp_model, rank=4)
    message = refusal(load_lora, sharp_model, tmp_path / "x.pth")
    assert "has DoRA of rank 4" in message and "the model LoRA of rank 4" in message


def test_a_file_is_not_loaded_into_pissa_which_would_subtract_its_start(sharp_model, tmp_path):
    written(sharp_model, tmp_path / "x.pth", rank=4)
    apply_lora(sharp_model, 4, init_lora_weights="pissa")
    before = logits_of(sharp_model)
    assert "the model PiSSA of rank 4" in refusal(load_lora, sharp_model, tmp_path / "x.pth")
    assert torch.equal(logits_of(sharp_model), before)


@pytest.mark.parametrize(
    ("meta", "tensors", "words"),
    [
        (None, {f"{WQ}.lora.A.weight": None}, "is no LoRA file"),
        (False, {f"{WQ}.lora.B.weight": None}, "is no LoRA file"),
        (None, {f"{WQ}.lora.A.weight": None, f"{WQ}.lora.B.weight": None}, "is no LoRA file"),
        (
            False,
            {f"{WQ}.lora.A.weight": None, f"{WQ}.lora.B.weight": None},
            "use attach_lora",
        ),
        (None, {"norm.weight": torch.ones(64)}, "is no LoRA file"),
        (None, {f"{WQ}.lora.A.weight": torch.ones(5, 64)}, "is no LoRA file"),
        (None, {f"{WQ}.lora.A.weight": torch.ones(4)}, "is no LoRA file"),
        (None, {f"{WQ}.lora.A.weight": torch.ones(4, 64, 1)}, "is no LoRA file"),
        (None, {f"{WQ}.lora.A.weight": torch.ones(4, 65)}, f"{WQ} is (64, 64), not (64, 65)"),
        (None, {f"{WQ}.lora.B.weight": torch.ones(9, 4)}, f"{WQ} is (64, 64), not (9, 64)"),
        (None, {f"{WQ}.lora.B.weight": torch.full((64, 4), torch.nan)}, "NaN"),
        ({"rank": 5}, {}, "is no LoRA file"),
        ({"alpha": 0}, {}, "is no LoRA file"),
        ({"alpha": float("inf")}, {}, "is no LoRA file"),
        ({"alpha": [4]}, {}, "is no LoRA file"),
        ({"targets": [WQ]}, {}, "is no LoRA file"),
        ({"format": 2}, {}, "is no LoRA file"),
        ({"base": "full_sft"}, {}, "is no LoRA file"),
        ({"base": {"fingerprint": 5}}, {}, "was trained on a base (5)"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(sharp_model, skill, meta, tensors, words):
    edited(skill, meta, **tensors)
    add_lora(sharp_model, seed=1)
    before = logits_of(sharp_model)
    message = refusal(load_lora, sharp_model, skill)
    assert words in message and "lora_medical_64.pth" in message and "\n" not in message
    assert torch.equal(logits_of(sharp_model), before)
    if "attach_lora" not in words:
        assert words in refusal(attach_lora, sharp_model, skill)
        assert torch.equal(logits_of(sharp_model), before)


def test_every_target_that_does_not_fit_stands_in_one_error(skill, sharp_model):
    config = LMConfig(dim=32, n_layers=1, n_heads=4, vocab_size=320)
    message = refusal(
        lambda model, path: attach_lora(model, path, allow_base_mismatch=True),
        MiniMindLM(config),
        skill,
    )
    for part in (
        f"{WQ} is (32, 32), not (64, 64)",
        "0.attention.wo is (32, 32)",
        "1.attention.wo is missing",
    ):
        assert part in message


@pytest.mark.parametrize(
    "wrap", [lambda part: torch.compile(part, backend="eager"), checkpoint_wrapper]
)
def test_layers_wrapped_one_by_one_make_and_take_the_skills_of_a_plain_base(
    sharp_model, tmp_path, wrap
):
    plain, wrapped = sharp_model, copy.deepcopy(sharp_model)
    for n, layer in enumerate(wrapped.layers):
        layer.feed_forward.w1 = wrap(layer.feed_forward.w1)
        wrapped.layers[n] = wrap(layer)
    bare = logits_of(plain)
    for maker, taker in ((wrapped, plain), (plain, wrapped)):
        expected = written(maker, tmp_path / "x.pth", target_modules="all-linear")
        tensors, meta = read_lora(tmp_path / "x.pth")
        assert not any(
            "_orig_mod" in name or "_wrapped" in name for name in (*tensors, *meta.ranks)
        )
        library = SkillLibrary(taker)
        library.add("x", tmp_path / "x.pth")
        library.use({"x": 1.0})
        torch.testing.assert_close(logits_of(taker), expected, atol=1e-5, rtol=1e-5)
        merge_lora(taker)
        torch.testing.assert_close(logits_of(taker), expected, atol=1e-5, rtol=1e-5)
        unmerge_lora(taker)
        apply_lora_again(taker, tmp_path / "x.pth", expected)
        assert torch.equal(logits_of(taker), bare)


def apply_lora_again(model, path, expected):
    """``load_lora`` into LoRA applied by name, and its removal."""
    remove_lora(model)
    apply_lora(model, 4, target_modules="all-linear")
    load_lora(model, path)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
    remove_lora(model)


def test_files_with_the_names_of_wrappers_still_load(sharp_model, tmp_path):
    expected = written(sharp_model, tmp_path / "x.pth")
    meta, content = meta_of(tmp_path / "x.pth"), torch.load(tmp_path / "x.pth")

    def wrapped(name):
        return name.replace("layers.0.", "layers.0._orig_mod.")

    meta["targets"] = [wrapped(name) for name in meta["targets"]]
    meta["scaling"] = {wrapped(name): scale for name, scale in meta["scaling"].items()}
    torch.save({wrapped(name): tensor for name, tensor in content.items()}, tmp_path / "x.pth")
    attach_lora(sharp_model, edited(tmp_path / "x.pth", meta))
    assert torch.equal(logits_of(sharp_model), expected)


def test_a_file_that_keeps_its_answers_among_the_options_loads(sharp_model, skill):
    """As files were written before these entries had names of their own."""
    options = {"prompt_template": "Q: {user}", "load_in_4bit": True, "max_seq_len": 64}
    meta = read_lora(edited(skill, dict.fromkeys(options) | {"options": options}))[1]
    assert (meta.prompt_template, meta.load_in_4bit, meta.max_seq_len) == ("Q: {user}", True, 64)
    assert meta.options == options


def test_tensors_beside_the_lora_come_back_and_are_not_left_out_by_mistake(sharp_model, tmp_path):
    add_lora(sharp_model)
    save_lora(sharp_model, tmp_path / "x.pth", None, {"_head.weight": torch.ones(2, 3)})
    remove_lora(sharp_model)
    assert torch.equal(read_lora(tmp_path / "x.pth")[0]["_head.weight"], torch.ones(2, 3))
    for action in (attach_lora, load_lora):
        assert "_head.weight" in refusal(action, sharp_model, tmp_path / "x.pth")
    attach_lora(sharp_model, tmp_path / "x.pth", with_extra=True)
    assert len(list(adapted(sharp_model))) == 4


# swapping


def test_swapping_is_bit_exact_and_leaves_no_trace(sharp_model, tmp_path):
    base, keys = logits_of(sharp_model), list(sharp_model.state_dict())
    weights = {name: tensor.clone() for name, tensor in sharp_model.state_dict().items()}
    mark = base_fingerprint(sharp_model)
    a = written(sharp_model, tmp_path / "a.pth", seed=1)
    b = written(
        sharp_model, tmp_path / "b.pth", rank=8, alpha=20.0, target_modules="all-linear", seed=2
    )
    c = written(
        sharp_model, tmp_path / "c.pth", rank=2, target_modules=r"layers\.1\..*\.w1", seed=3
    )
    for name, logits in (("a", a), ("b", b), ("a", a), ("c", c), ("b", b), ("a", a)):
        attach_lora(sharp_model, tmp_path / f"{name}.pth")
        assert torch.equal(logits_of(sharp_model), logits), name
        assert base_fingerprint(sharp_model) == mark
    assert (
        min(
            (x - y).abs().max()
            for x, y in ((a, b), (a, c), (b, c), (a, base), (b, base), (c, base))
        )
        > 1e-3
    )
    remove_lora(sharp_model)
    assert torch.equal(logits_of(sharp_model), base)
    assert list(sharp_model.state_dict()) == keys
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in sharp_model.state_dict().items()
    )
    assert fingerprint(sharp_model.named_parameters(), sharp_model.config) == mark


def test_the_fingerprint_notices_when_the_base_itself_changes(sharp_model):
    mark = base_fingerprint(sharp_model)
    with torch.no_grad():
        sharp_model.layers[0].ffn_norm.weight.add_(0.1)
    changed = base_fingerprint(sharp_model)
    assert changed != mark
    add_lora(sharp_model, target_modules="all-linear")
    assert base_fingerprint(sharp_model) == changed == fingerprint_without_lora(sharp_model)


def fingerprint_without_lora(model):
    remove_lora(model)
    return fingerprint(model.named_parameters(), model.config)


def test_the_fingerprint_notices_a_changed_config(sharp_model):
    before = base_fingerprint(sharp_model)
    sharp_model.config.rope_theta = 10.0
    assert base_fingerprint(sharp_model) != before


def test_each_module_gets_the_scale_that_the_file_gives_it(sharp_model, skill):
    tensors = torch.load(skill, weights_only=True)
    record = json.loads(bytes(tensors["_meta"].tolist()))
    first = record["targets"][0]
    record["scaling"][first] = 5.0
    tensors["_meta"] = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)
    torch.save(tensors, skill)
    remove_lora(sharp_model)
    attach_lora(sharp_model, skill)
    scales = {name: sharp_model.get_submodule(name).lora.scaling for name in record["targets"]}
    assert scales == record["scaling"] and scales[first] == 5.0 != scales[record["targets"][1]]


def test_a_rank_beyond_the_width_is_refused(sharp_model):
    remove_lora(sharp_model)
    with pytest.raises(UserError, match="exceeds the 64 features"):
        apply_lora(sharp_model, rank=65)


def test_attaching_takes_no_longer_name_that_ends_alike(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    assert apply_lora(model, 2, target_modules="0") == ["0"]
    save_lora(model, tmp_path / "x.pth")
    remove_lora(model)
    attach_lora(model, tmp_path / "x.pth")
    assert [name for name, _ in adapted(model)] == ["0"]


def test_a_sum_of_skills_attaches_with_a_rank_that_cannot_be_trained(sharp_model, tmp_path):
    written(sharp_model, tmp_path / "x.pth", rank=40)
    library = SkillLibrary(sharp_model)
    for name in "ab":
        library.add(name, tmp_path / "x.pth")
    library.use({"a": 1.0, "b": 0.5})
    save_lora(sharp_model, tmp_path / "sum.pth")
    attach_lora(sharp_model, tmp_path / "sum.pth")
    assert {linear.lora.rank for _, linear in adapted(sharp_model)} == {80}


# MiniMind's own lines

USAGE = """\
    import torch
    from model.model import MiniMindLM
    from model.LMConfig import LMConfig
    from model.model_lora import apply_lora, load_lora
    model = MiniMindLM(LMConfig(dim=512, n_layers=8))
    model.load_state_dict(torch.load("./out/full_sft_512.pth"))
    apply_lora(model, rank=16)
    load_lora(model, "./out/lora/lora_medical_512.pth")
"""


def test_the_usage_lines_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = MiniMindLM(LMConfig()).eval()
    fill(model.named_parameters())
    save_base("out/full_sft_512.pth", model)
    expected = written(model, "out/lora/lora_medical_512.pth", rank=16)
    assert (tmp_path / "out" / "full_sft_512.json").is_file()
    names = {}
    exec(textwrap.dedent(USAGE), names)
    assert torch.equal(logits_of(names["model"].eval()), expected)
