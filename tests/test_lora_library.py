"""Skills beside a model: swaps leave no trace, mixes are exact sums, merging is undone bit for
bit.
"""

import copy
import hashlib
import math
import random

import pytest
import torch
from conftest import logits_of, strengthen
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from core.errors import UserError
from model.lora.layer import adapted, dense_weight
from model.lora.library import SkillLibrary, factors_of, merge_lora, mixed, truncated, unmerge_lora
from model.lora.skill_file import adapters_in
from model.model_lora import apply_lora, attach_lora, remove_lora, save_lora

SKILLS = {
    "a": {"rank": 4},
    "b": {"rank": 4, "alpha": 10.0},
    "wide": {"rank": 8, "alpha": 20.0, "target_modules": "all-linear", "rank_pattern": {"wk": 2}},
    "dora": {"rank": 4, "use_dora": True, "target_modules": ["wq", "w1"]},
    "pissa": {"rank": 4, "init_lora_weights": "pissa"},
}


def sha256(model):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def files(sharp_model, tmp_path):
    """A file of each of ``SKILLS`` for ``sharp_model``, which is left bare."""
    sharp_model.eval()
    for seed, (name, settings) in enumerate(SKILLS.items()):
        apply_lora(sharp_model, **settings)
        strengthen(sharp_model, seed)
        save_lora(sharp_model, tmp_path / f"{name}.pth")
        remove_lora(sharp_model)
    return {name: tmp_path / f"{name}.pth" for name in SKILLS}


@pytest.fixture
def library(sharp_model, files):
    skills = SkillLibrary(sharp_model)
    for name, path in files.items():
        skills.add(name, path)
    return skills


def test_a_thousand_swaps_leave_no_trace(sharp_model, files, library):
    mark, base, keys = sha256(sharp_model), logits_of(sharp_model), list(sharp_model.state_dict())
    expected = {None: base}
    for name in SKILLS:
        library.use(name)
        expected[name] = logits_of(sharp_model)
    rng = random.Random(0)
    for turn in range(1000):
        name = rng.choice([*expected, "mix"])
        library.use(
            {"a": rng.uniform(-1, 1), "wide": rng.uniform(-1, 1)} if name == "mix" else name
        )
        if turn % 50 == 0 and name != "mix":
            assert torch.equal(logits_of(sharp_model), expected[name])
    library.use(None)
    assert torch.equal(logits_of(sharp_model), base)
    assert sha256(sharp_model) == mark and list(sharp_model.state_dict()) == keys
    assert not any("forward" in vars(module) for module in sharp_model.modules()), (
        "the hot path is not the base's own"
    )
    assert min((expected[name] - base).abs().max() for name in SKILLS) > 1e-2


def test_the_library_computes_what_the_file_says(sharp_model, files, library):
    for name, path in files.items():
        library.use(name)
        found = logits_of(sharp_model)
        library.use(None)
        attach_lora(sharp_model, path)
        torch.testing.assert_close(found, logits_of(sharp_model), atol=1e-5, rtol=1e-5)
        remove_lora(sharp_model)


def test_a_skill_takes_the_mode_and_device_that_the_model_has_by_then(sharp_model, library):
    library.use("dora")
    assert not any(module.training for module in sharp_model.modules())
    library.use(None)
    sharp_model.train().to("meta")  # the second device that every machine has
    library.use("dora")
    assert all(module.training for module in sharp_model.modules())
    assert all(parameter.is_meta for parameter in sharp_model.parameters())


def test_a_mix_is_the_exact_weighted_sum(sharp_model, library):
    weights = {"a": 0.75, "b": -0.5, "wide": 1.5, "pissa": 0.3}
    expected = copy.deepcopy(sharp_model).double()
    for name, weight in weights.items():
        library.use(name)
        for target, linear in adapted(sharp_model):
            update = linear.lora.merged(torch.zeros_like(dense_weight(linear)).double())
            expected.get_submodule(target).weight.data.add_(weight * update)
    library.use(weights)
    assert library.active == weights
    torch.testing.assert_close(
        logits_of(sharp_model).double(), logits_of(expected), atol=1e-5, rtol=1e-5
    )
    library.use({"a": 1.0, "b": 0.0})
    once = logits_of(sharp_model)
    library.use("a")
    torch.testing.assert_close(once, logits_of(sharp_model), atol=1e-6, rtol=1e-6)


def test_disabled_is_the_base_alone_even_after_an_error(sharp_model, library):
    base = logits_of(sharp_model)
    library.use("wide")
    skilled = logits_of(sharp_model)
    with pytest.raises(ZeroDivisionError), library.disabled():
        assert torch.equal(logits_of(sharp_model), base)
        raise ZeroDivisionError
    assert torch.equal(logits_of(sharp_model), skilled)
    merge_lora(sharp_model)
    with pytest.raises(UserError, match=r"call unmerge_lora\(model\) first"), library.disabled():
        pass
    unmerge_lora(sharp_model)
    with library.disabled():
        library.use("a")
    assert torch.equal(logits_of(sharp_model), skilled) and library.active == {"wide": 1.0}


def test_disabled_undoes_what_was_merged_inside(sharp_model, library):
    library.use("a")
    before = logits_of(sharp_model)
    with library.disabled():
        library.use("b")
        merge_lora(sharp_model)
    assert torch.equal(logits_of(sharp_model), before) and library.active == {"a": 1.0}


def test_what_is_refused_changes_nothing(sharp_model, files, library, tmp_path):
    library.use("a")
    before = logits_of(sharp_model)
    for action, said in (
        (
            lambda: library.use("nobody"),
            "no skill 'nobody' in the library; there are a, b, wide, dora, pissa",
        ),
        (lambda: library.use({"a": 1.0, "nobody": 1.0}), "no skill 'nobody'"),
        (lambda: library.use({"a": math.nan}), "must be a number, not nan"),
        (lambda: library.use({"a": 0.5, "dora": 0.5}), "dora is a DoRA"),
        (lambda: library.use({"a": "x"}), "a skill's weight must be a number, not x"),
        (
            lambda: library.use({"a": 1e39}),
            "the weights 1e\\+39 are too large for layers.0.attention.wq",
        ),
        (lambda: library.add("c", tmp_path / "none.pth"), "does not exist"),
    ):
        with pytest.raises(UserError, match=said):
            action()
        assert torch.equal(logits_of(sharp_model), before) and library.active == {"a": 1.0}


def test_a_skill_read_again_changes_the_model_at_the_next_use(sharp_model, files, library):
    library.use("b")
    other = logits_of(sharp_model)
    library.use("a")
    before = logits_of(sharp_model)
    library.add("a", files["b"])
    assert torch.equal(logits_of(sharp_model), before)
    library.use("a")
    assert torch.equal(logits_of(sharp_model), other)


def test_a_compiled_model_swaps_skills_of_like_rank_without_a_new_program(sharp_model, library):
    library.use("a")
    logits_of(sharp_model)  # the rotary table is made at the first call
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(sharp_model, backend=counter)
    outputs = []
    for name in ("a", "b", "a"):
        library.use(name)
        outputs.append(logits_of(compiled))
        torch.testing.assert_close(outputs[-1], logits_of(sharp_model), atol=1e-6, rtol=1e-6)
    assert counter.frame_count == 1
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


# merging


@pytest.mark.parametrize("name", SKILLS)
def test_merged_equals_attached_and_is_undone_bit_for_bit(sharp_model, files, name):
    mark, keys = sha256(sharp_model), list(sharp_model.state_dict())
    attach_lora(sharp_model, files[name])
    attached = logits_of(sharp_model)
    merge_lora(sharp_model)
    assert list(sharp_model.state_dict()) == keys
    assert not any("forward" in vars(module) for module in sharp_model.modules())
    torch.testing.assert_close(logits_of(sharp_model), attached, atol=1e-5, rtol=1e-5)
    for action in (
        lambda: merge_lora(sharp_model),
        lambda: apply_lora(sharp_model),
        lambda: attach_lora(sharp_model, files["b"], allow_base_mismatch=True),
        lambda: save_lora(sharp_model, files["b"]),
        lambda: SkillLibrary(sharp_model).use(None),
    ):
        with pytest.raises(
            UserError, match=r"merged into this model; call unmerge_lora\(model\) first"
        ):
            action()
    unmerge_lora(sharp_model)
    assert torch.equal(logits_of(sharp_model), attached)
    remove_lora(sharp_model)
    assert sha256(sharp_model) == mark
    with pytest.raises(UserError, match="no LoRA is merged"):
        unmerge_lora(sharp_model)
    with pytest.raises(UserError, match="no LoRA on this model to merge"):
        merge_lora(sharp_model)


def test_a_bf16_base_is_merged_in_fp32_and_rounded_once(sharp_model, files):
    sharp_model.bfloat16()
    attach_lora(sharp_model, files["wide"])
    linear = sharp_model.layers[0].attention.wq
    expected = linear.lora.merged(linear.weight.float()).bfloat16()
    merge_lora(sharp_model)
    assert torch.equal(linear.weight, expected)


def test_a_weight_that_two_linears_share_is_adapted_but_not_merged():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    model[2].weight = model[0].weight
    mark = sha256(model)
    apply_lora(model, 2, target_modules=["0", "1"])
    strengthen(model, 0)
    with pytest.raises(UserError, match="0 shares its weight"):
        merge_lora(model)
    remove_lora(model)
    assert sha256(model) == mark
    apply_lora(model, 2, target_modules=["1"])
    merge_lora(model)


def test_a_wrapper_of_the_model_is_refused_by_name(sharp_model, files, tmp_path):
    wrapper = torch.compile(sharp_model, backend="eager")
    for action in (lambda: attach_lora(wrapper, files["a"]), lambda: apply_lora(wrapper, 4)):
        with pytest.raises(UserError, match="OptimizedModule"):
            action()
    apply_lora(wrapper._orig_mod, 4)
    with pytest.raises(UserError, match="OptimizedModule"):
        save_lora(wrapper, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


def test_a_merge_that_would_not_be_finite_changes_nothing(sharp_model, files):
    attach_lora(sharp_model, files["a"])
    mark = sha256(sharp_model)
    with torch.no_grad():
        sharp_model.layers[1].attention.wo.lora.B.weight[0, 0] = math.inf
    changed = sha256(sharp_model)
    with pytest.raises(UserError, match=r"NaN or infinity into layers\.1\.attention\.wo"):
        merge_lora(sharp_model)
    assert sha256(sharp_model) == changed != mark


# fused skills


def test_a_fused_skill_is_the_sum_and_a_cut_one_the_nearest_of_its_rank(sharp_model, files):
    parts = [
        (factors_of(adapters_in(sharp_model, files[name])[0], name), w)
        for name, w in (("a", 1.0), ("wide", -0.5))
    ]
    sums = mixed(parts)
    A, B = sums["layers.0.attention.wq"]
    assert A.shape == (12, 64) and B.shape == (64, 12)
    for rank in (3, 12, 40):
        cut, error = truncated(sums, rank)
        lost = whole = 0.0
        for target, (A, B) in sums.items():
            product = B.double() @ A.double()
            values = torch.linalg.svdvals(product)
            found = cut[target][1].double() @ cut[target][0].double()
            assert cut[target][0].size(0) == min(rank, A.size(0))
            torch.testing.assert_close(
                (product - found).norm(), values[rank:].norm(), atol=1e-5, rtol=1e-4
            )
            lost, whole = (
                lost + float(values[rank:].square().sum()),
                whole + float(values.square().sum()),
            )
        assert error == pytest.approx(math.sqrt(lost / whole), abs=1e-6)
    assert truncated(mixed([(parts[0][0], 0.0)]), 2)[1] == 0.0


@pytest.mark.parametrize("weights", [{"a": 1.0, "wide": 1.0}, {"a": 0.7, "wide": -0.4}])
def test_peft_sums_the_same(sharp_model, files, library, weights):
    peft = pytest.importorskip("peft")
    other, theirs = copy.deepcopy(sharp_model), None
    for name in weights:
        loras, _ = adapters_in(sharp_model, files[name])
        settings = peft.LoraConfig(
            r=8,
            lora_alpha=1,
            target_modules=list(loras),
            rank_pattern={target: lora.rank for target, lora in loras.items()},
            alpha_pattern={target: lora.rank * lora.scaling for target, lora in loras.items()},
        )
        if theirs is None:
            theirs = peft.get_peft_model(other, settings, adapter_name=name)
        else:
            theirs.add_adapter(name, settings)
        for target, lora in loras.items():
            layer = other.get_submodule(target)
            layer.lora_A[name].weight.data.copy_(lora.A.weight)
            layer.lora_B[name].weight.data.copy_(lora.B.weight)
    for name, weight in weights.items():
        for module in theirs.modules():
            if name in getattr(module, "lora_A", {}):
                module.set_scale(name, weight)
    theirs.base_model.set_adapter(list(weights))
    library.use(weights)
    torch.testing.assert_close(logits_of(sharp_model), logits_of(theirs), atol=1e-5, rtol=1e-5)
