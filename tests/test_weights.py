"""Base files: round trips, records, refusals that name everything at once, and fingerprints that
tell bases apart.
"""

import copy
import json
import os
import shutil
import zipfile

import pytest
import torch

from core.errors import UserError
from model import weights
from model.LMConfig import LMConfig
from model.model import MiniMindLM
from model.model_lora import apply_lora
from model.weights import (
    ARCHITECTURE,
    RunRecord,
    check_keys,
    choose_base,
    fingerprint,
    load_base,
    read_tensors,
    save_base,
)


@pytest.fixture
def base(tmp_path, sharp_model):
    """A base file of ``sharp_model``, and its .json beside it."""
    path = tmp_path / "full_sft_64.pth"
    record = RunRecord(stage="full_sft", metrics={"val_loss": 1.5}, more={"author": "李明"})
    save_base(path, sharp_model, record)
    return path


def logits_of(model):
    with torch.no_grad():
        return model(torch.arange(40).view(2, 20)).logits


def fingerprint_of(model):
    return fingerprint(model.named_parameters(), model.config)


def refusal(path):
    with pytest.raises(UserError) as caught:
        load_base(path)
    return str(caught.value)


def rewritten(path, change):
    """The file again after ``change(state dict)``."""
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)
    return path


# round trip and record


def test_round_trip_is_bit_exact_and_the_record_says_what_it_is(base, sharp_model):
    loaded, record = load_base(base)
    assert torch.equal(logits_of(loaded), logits_of(sharp_model))
    assert not loaded.training
    assert loaded.output.weight.data_ptr() == loaded.tok_embeddings.weight.data_ptr()
    content = json.loads(base.with_suffix(".json").read_text(encoding="utf-8"))
    assert record == RunRecord.from_json(content) and content["author"] == "李明"
    assert (record.stage, record.metrics) == ("full_sft", {"val_loss": 1.5})
    assert record.config == {name: getattr(sharp_model.config, name) for name in ARCHITECTURE}
    assert record.fingerprint == fingerprint_of(sharp_model)


def test_the_file_is_a_plain_state_dict(base, sharp_model):
    tensors = torch.load(base, weights_only=True)
    assert tensors.keys() == sharp_model.state_dict().keys()
    MiniMindLM(sharp_model.config).load_state_dict(tensors, strict=True)


def test_a_minimind_file_alone_loads_and_what_was_assumed_is_printed(tmp_path, capsys):
    model = MiniMindLM(
        LMConfig(dim=64, n_layers=3, vocab_size=320, hidden_dim=100, n_kv_heads=4)
    ).eval()
    tensors = model.state_dict()
    # Older versions of MiniMind saved these as well.
    tensors |= {
        "pos_cis": torch.zeros(9, 4, dtype=torch.complex64),
        "layers.0.attention.mask": torch.zeros(1, 1, 9, 9),
    }
    torch.save(tensors, tmp_path / "full_sft_64.pth")
    loaded, record = load_base(tmp_path / "full_sft_64.pth")
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert record == RunRecord(config=record.config, fingerprint=fingerprint_of(model))
    shapes = {"dim": 64, "n_layers": 3, "vocab_size": 320, "hidden_dim": 100, "n_kv_heads": 4}
    assert record.config.items() >= shapes.items()
    printed = capsys.readouterr().out
    assert all(f"{name!r}: {value}" in printed for name, value in shapes.items())
    assert "assumed" in printed and "'rope_theta': 1000000.0" in printed


# refusals


def test_a_pair_that_disagrees_is_refused(base, tiny_model, tmp_path):
    other = tmp_path / "other.pth"
    torch.nn.init.normal_(tiny_model.layers[1].feed_forward.w2.weight)
    save_base(other, tiny_model)
    shutil.copy(other.with_suffix(".json"), base.with_suffix(".json"))
    message = refusal(base)
    assert (
        "full_sft_64.pth" in message
        and "full_sft_64.json" in message
        and "not from the same run" in message
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"config": []}', "\x00"])
def test_a_broken_record_is_refused(base, text):
    base.with_suffix(".json").write_text(text, encoding="utf-8")
    assert "full_sft_64.json" in refusal(base)


@pytest.mark.parametrize(
    "change", [{"n_heads": 5}, {"dim": None}, {"n_layers": "two"}, {"hidden_dim": -8}]
)
def test_a_record_of_an_impossible_model_is_refused(base, change):
    record = json.loads(base.with_suffix(".json").read_text(encoding="utf-8"))
    record["config"] |= change
    base.with_suffix(".json").write_text(json.dumps(record), encoding="utf-8")
    assert "describes no possible model" in refusal(base)


def test_every_wrong_key_stands_in_one_error(base):
    def change(tensors):
        del tensors["norm.weight"], tensors["layers.1.attention.wq.weight"]
        tensors |= {"layers.2.ffn_norm.weight": torch.ones(64), "head.bias": torch.ones(3)}
        tensors["layers.0.attention.wk.weight"] = torch.ones(64, 64)

    message = refusal(rewritten(base, change))
    for part in (
        "missing norm.weight",
        "missing layers.1.attention.wq.weight",
        "unexpected layers.2.ffn_norm.weight",
        "unexpected head.bias",
        "layers.0.attention.wk.weight is (64, 64), not (32, 64)",
    ):
        assert part in message


def test_tied_tensors_that_differ_are_refused(base):
    message = refusal(
        rewritten(base, lambda tensors: tensors.update({"output.weight": torch.ones(320, 64)}))
    )
    assert "output.weight and tok_embeddings.weight differ" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(base, value):
    assert "NaN or infinity in norm.weight" in refusal(
        rewritten(base, lambda t: t["norm.weight"].fill_(value))
    )


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda weight: weight.double().fill_(1e300), "NaN or infinity in norm.weight"),
        (
            lambda weight: weight.to(torch.float8_e4m3fn),
            "holds norm.weight as torch.float8_e4m3fn; convert it",
        ),
        (lambda weight: weight.to("meta"), "holds 'norm.weight', which is no dense tensor"),
    ],
)
def test_numbers_that_fp32_cannot_hold_are_refused(base, change, said):
    assert said in refusal(
        rewritten(base, lambda t: t.update({"norm.weight": change(t["norm.weight"])}))
    )


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(base, share):
    os.truncate(base, int(share * base.stat().st_size))
    assert "full_sft_64.pth" in refusal(base)


def test_a_flipped_bit_is_refused_which_torch_itself_would_load(base):
    with zipfile.ZipFile(base) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(base.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1
    base.write_bytes(content)
    assert torch.load(base, weights_only=True).keys()
    assert "damaged" in refusal(base)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [torch.ones(2)],
        torch.ones(2),
        {"model": {"norm.weight": torch.ones(2)}},
        {1: torch.ones(2)},
        {"step": 3},
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth holds"):
        read_tensors(tmp_path / "x.pth")


def test_a_file_that_is_missing_or_something_else_is_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nothing.pth")
    assert "does not exist" in refusal(tmp_path)
    text = tmp_path / "text.pth"
    text.write_text("hello", encoding="utf-8")
    assert "not a readable weights file" in refusal(text)
    with zipfile.ZipFile(text, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "not a readable weights file" in refusal(text)
    torch.save({"layers.x.weight": torch.ones(2)}, text)
    assert "no MiniMindLM" in refusal(text)
    widths = {
        "tok_embeddings": (8, 0),
        "layers.0.feed_forward.w1": (4, 0),
        "layers.0.attention.wk": (4, 0),
    }
    torch.save({f"{name}.weight": torch.ones(shape) for name, shape in widths.items()}, text)
    assert "no MiniMindLM" in refusal(text)


# fingerprints


def test_the_model_is_made_of_the_files_tensors_themselves(base, monkeypatch):
    tensors = read_tensors(base)
    tensors["norm.weight"] = tensors["norm.weight"].bfloat16()
    monkeypatch.setattr(weights, "read_tensors", lambda path: tensors)
    model, _ = load_base(base)
    assert model.output.weight is model.tok_embeddings.weight
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[name].float()) and parameter.requires_grad
        shared = parameter.data_ptr() == tensors[name].data_ptr()
        assert shared == (name != "norm.weight") and parameter.dtype == torch.float32


def test_a_bf16_copy_is_the_same_base(sharp_model):
    before = fingerprint_of(sharp_model)
    assert fingerprint_of(copy.deepcopy(sharp_model).bfloat16()) == before
    assert fingerprint_of(copy.deepcopy(sharp_model).bfloat16().float()) == before


@pytest.mark.parametrize(
    "name", ["norm.weight", "output.weight", "layers.1.feed_forward.w3.weight"]
)
def test_other_weights_are_another_base(sharp_model, name):
    before = fingerprint_of(sharp_model)
    with torch.no_grad():
        sharp_model.get_parameter(name).view(-1)[5] *= 1.02
    assert fingerprint_of(sharp_model) != before


@pytest.mark.parametrize("change", [{"rope_theta": 1e4}, {"n_heads": 8}, {"norm_eps": 1e-6}])
def test_other_arithmetic_is_another_base(sharp_model, change):
    before = fingerprint_of(sharp_model)
    config = LMConfig(**{**sharp_model.config.to_dict(), **change})
    assert fingerprint(sharp_model.named_parameters(), config) != before


def test_a_longer_context_is_the_same_base(sharp_model):
    config = LMConfig(**{**sharp_model.config.to_dict(), "max_seq_len": 256})
    assert fingerprint(sharp_model.named_parameters(), config) == fingerprint_of(sharp_model)


# which base


@pytest.fixture
def out_dir(tmp_path, tiny_model):
    """Two bases of each stage; the older file of a stage has the larger name."""
    for age, name in enumerate(("full_sft_128", "pretrain_128", "full_sft_64", "pretrain_64")):
        with torch.no_grad():
            tiny_model.norm.weight.fill_(1 + age)
        save_base(tmp_path / f"{name}.pth", tiny_model)
        os.utime(tmp_path / f"{name}.pth", (1000 + age, 1000 + age))
    return tmp_path


def test_the_named_base_wins(out_dir):
    named = out_dir / "pretrain_128.pth"
    skill_base = json.loads((out_dir / "full_sft_64.json").read_text(encoding="utf-8"))
    assert choose_base(out_dir, named, skill_base) == named
    with pytest.raises(UserError, match=r"nothing\.pth "):
        choose_base(out_dir, out_dir / "nothing.pth", skill_base)


def test_then_the_base_that_the_skill_names(out_dir):
    for name in ("full_sft_128", "pretrain_64"):
        skill_base = json.loads((out_dir / f"{name}.json").read_text(encoding="utf-8"))
        assert choose_base(out_dir, skill_base=skill_base) == out_dir / f"{name}.pth"


def test_then_the_newest_of_the_latest_stage(out_dir):
    assert choose_base(out_dir).name == "full_sft_64.pth"
    assert (
        choose_base(out_dir, skill_base={"fingerprint": "of no base here"}).name
        == "full_sft_64.pth"
    )
    assert choose_base(out_dir, stages=("pretrain",)).name == "pretrain_64.pth"
    os.utime(out_dir / "full_sft_128.pth", (9000, 9000))
    assert choose_base(out_dir).name == "full_sft_128.pth"
    for path in out_dir.glob("full_sft_*.pth"):
        path.unlink()
    assert choose_base(out_dir).name == "pretrain_64.pth"


def test_no_base_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(UserError, match="full_sft_") as caught:
        choose_base(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_model_with_lora_is_not_saved_as_a_base(tmp_path, tiny_model):
    apply_lora(tiny_model, rank=2)
    with pytest.raises(UserError, match="without a LoRA"):
        save_base(tmp_path / "full_sft_64.pth", tiny_model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "config",
    [
        {"vocab_size": None},
        {"max_seq_len": 10**12},
        {"n_layers": 1.5},
        {"n_heads": "4"},
        {"dim": True},
    ],
)
def test_a_record_that_describes_no_model_is_one_sentence(base, config):
    beside = base.with_suffix(".json")
    record = json.loads(beside.read_text(encoding="utf-8"))
    record["config"] |= config
    if config == {"vocab_size": None}:
        del record["config"]["vocab_size"]
    beside.write_text(json.dumps(record), encoding="utf-8")
    assert f"{beside} describes no possible model" in refusal(base)


def test_a_broken_record_of_another_base_is_no_reason_to_stop(base):
    (base.parent / "a.json").write_text("{")
    (base.parent / "a.pth").write_text("x")
    wanted = json.loads(base.with_suffix(".json").read_text(encoding="utf-8"))
    assert choose_base(base.parent, skill_base=wanted) == base


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_numbers_of_another_kind_are_refused(dtype):
    with pytest.raises(UserError, match=rf"x\.pth .*: w is {dtype}"):
        check_keys({"w": torch.zeros(2)}, {"w": torch.zeros(2, dtype=dtype)}, "x.pth")


def test_a_link_that_leads_nowhere_is_no_base(tmp_path):
    base = tmp_path / "full_sft_64.pth"
    base.touch()
    try:
        (tmp_path / "full_sft_99.pth").symlink_to(tmp_path / "gone")
    except OSError:
        pytest.skip("this system lets nobody make links")
    assert choose_base(tmp_path) == base
