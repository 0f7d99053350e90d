"""The doors end to end on a small model: what they print and write, and what they leave alone."""

import io
import json
import os
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from conftest import SMALL, flags, logits_of
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import eval_model
import train_full_sft
import train_lora
import train_pretrain
from core.errors import UserError
from core.files import sha256_file
from core.paths import TOKENIZER_DIR, lora_path
from dataset.tokenizer import load_tokenizer, tokenizer_fingerprint, tokenizer_of
from model.generation import Sampling
from model.lora.layer import adapted
from model.lora.skill_file import base_fingerprint, read_lora
from model.model_lora import attach_lora, remove_lora
from model.quantized import quantize
from model.weights import RunRecord, load_base
from serving.session import ChatSession
from serving.terminal import command
from trainer.stage import Base, run_facts


def load(trained, stage="full_sft"):
    base = trained.out / f"{stage}_64.pth"
    model, record = load_base(base)
    return model, record, tokenizer_of(record, base, None, trained.out)


def session_on(trained, stage="full_sft", **more) -> ChatSession:
    model, _, tokenizer = load(trained, stage)
    settings = {"seed": 1, "history_cnt": 6, "out_dir": trained.out} | more
    settings["continues"] = stage == "pretrain"
    return ChatSession(model, tokenizer, Sampling(temperature=0.0, max_new_tokens=8), **settings)


def test_every_stage_leaves_files_that_explain_themselves(trained):
    paths = (path for path in trained.out.rglob("*") if path.is_file())
    files = {path.relative_to(trained.out).as_posix() for path in paths}
    runs = ("pretrain_64", "full_sft_64", "lora_a_64", "lora_b_64")
    wanted = {"pretrain_64.pth", "pretrain_64.json", "full_sft_64.pth", "full_sft_64.json"}
    wanted |= {"lora/lora_a_64.pth", "lora/lora_b_64.pth"}
    wanted |= {f"metrics/{run}.{ending}" for run in runs for ending in ("jsonl", "png")}
    parts = ("SHA256SUMS", "manifest.json", "metrics.jsonl", "state.safetensors")
    wanted |= {f"checkpoints/{run}/step-4/{part}" for run in runs for part in parts}
    wanted |= {f"checkpoints/{run}/run.lock" for run in runs}
    assert {name for name in files if not name.startswith("cache/")} == wanted
    pretrain = json.loads((trained.out / "pretrain_64.json").read_text(encoding="utf-8"))
    full_sft = json.loads((trained.out / "full_sft_64.json").read_text(encoding="utf-8"))
    _, skill = read_lora(trained.out / "lora" / "lora_a_64.pth")
    stages = (pretrain["stage"], full_sft["stage"], skill.stage)
    assert stages == ("pretrain", "full_sft", "lora")
    assert full_sft["base"]["fingerprint"] == pretrain["fingerprint"]
    assert skill.base == {"file": "full_sft_64.pth", "fingerprint": full_sft["fingerprint"]}
    assert skill.options["data_path"] == ["chats.jsonl"]  # no folder of this machine
    assert skill.metrics["step"] == 4
    kinds = ("domain", "general")
    assert [set(skill.metrics[kind]) for kind in kinds] == [{"first", "last", "best"}] * 2
    assert str(trained.out.parent) not in json.dumps([pretrain, full_sft, skill.to_json()])


def test_a_file_name_that_is_no_utf_8_does_not_cost_the_record(trained, tmp_path):
    path = tmp_path / os.fsdecode(b"bad\xff.jsonl")
    try:
        shutil.copyfile(trained.texts, path)
    except (OSError, UnicodeError):
        pytest.skip("this file system knows no such names")
    options = train_pretrain.Options(data_path=(path,), out_dir=tmp_path)
    record = RunRecord(**run_facts("pretrain", options, load_tokenizer(TOKENIZER_DIR)))
    assert record.data[0]["file"] == record.options["data_path"][0] == r"bad\xff.jsonl"
    json.dumps(record.to_json(), ensure_ascii=False).encode()


def test_a_share_that_a_base_s_record_cannot_mean_is_named(tmp_path):
    def share(content):
        return Base(tmp_path / "x.pth", None, None, RunRecord.from_json(content)).held_out_share

    assert share({}) == share({"options": {"val_ratio": 0.0}}) == 0.02
    assert share({"val_ratio": 0.3}) == share({"options": {"val_ratio": 0.3}}) == 0.3
    for nonsense in ("a", 5, 1.5, [1]):
        with pytest.raises(UserError, match=r"x\.json says val_ratio"):
            share({"options": {"val_ratio": nonsense}})


def test_pretraining_says_what_it_will_do_before_it_begins(trained, tmp_path, capsys):
    out = tmp_path / "out"
    argv = flags(out_dir=out, data_path=trained.texts, dim=64, n_layers=2, n_heads=4, **SMALL)
    train_pretrain.main(argv)
    printed = capsys.readouterr().out
    said = ["texts.jsonl: ", "documents", "0 % truncated", "held out", "device cpu"]
    said += ["dtype float32", "parameters", "optimizer steps"]
    assert [word for word in said if word not in printed.partition("step 1/")[0]] == []
    assert "starting clean" not in printed
    train_pretrain.main(argv)
    assert f"starting clean: {out / 'pretrain_64.pth'}" in capsys.readouterr().out


def test_a_base_is_never_overwritten_by_the_run_that_starts_from_it(trained, tmp_path):
    base = trained.out / "full_sft_64.pth"
    before = sha256_file(base)
    with pytest.raises(UserError, match="out_dir"):
        train_full_sft.main(trained.flags(data_path=trained.chats, base=base, **SMALL))
    assert sha256_file(base) == before
    train_full_sft.main(flags(out_dir=tmp_path, data_path=trained.chats, base=base, **SMALL))


def test_a_base_takes_the_skills_that_were_trained_on_it_along(trained, tmp_path, capsys):
    out = shutil.copytree(trained.out, tmp_path / "out")
    argv = flags(out_dir=out, data_path=trained.chats, seed=9, **SMALL)

    def noted() -> list[str]:
        train_full_sft.main(argv)
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
        return [name for name in ("lora_a_64.pth", "lora_b_64.pth") if name in "".join(notes)]

    (out / "lora" / "lora_c_64.pth").write_bytes(b"no skill")
    assert noted() == ["lora_a_64.pth", "lora_b_64.pth"]
    assert noted() == [], "they were trained on the base before this one"


class Started(Exception):
    """Stands for the training, which does not happen."""


@pytest.fixture
def start_of(monkeypatch):
    """The logits of what a door trains, before the first step."""

    def logits_at_start(door, argv: list[str]) -> torch.Tensor:
        found = []

        def start(model, *others):
            found.append(logits_of(model))
            raise Started

        with monkeypatch.context() as patch, pytest.raises(Started):
            patch.setattr("trainer.stage.train", start)
            door.main(argv)
        return found[0]

    return logits_at_start


@pytest.mark.parametrize("sizes", [{}, {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}])
def test_pretraining_goes_on_from_a_base_in_its_sizes(trained, tmp_path, start_of, sizes):
    base, out = trained.out / "pretrain_64.pth", tmp_path / "out"
    before = sha256_file(base)
    argv = flags(out_dir=out, data_path=trained.texts, base=base, **sizes, **SMALL)
    model, record, _ = load(trained, "pretrain")
    assert torch.equal(start_of(train_pretrain, argv), logits_of(model))
    path = train_pretrain.main(argv)
    after = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert after["base"] == {"file": "pretrain_64.pth", "fingerprint": record.fingerprint}
    assert after["config"] == record.config and after["tokenizer"] == record.tokenizer
    assert after["options"]["dim"] == 64 and after["options"]["n_heads"] == 4
    assert after["fingerprint"] != record.fingerprint and sha256_file(base) == before


SKILLS = ["", "--use_dora --rank_pattern wo=2 --alpha 8 --use_rslora --rank 4"]
SKILLS += ["--init_lora_weights pissa", "--load_in_4bit --target_modules wk w2"]


@pytest.mark.parametrize("words", SKILLS)
def test_a_skill_goes_on_from_its_file(trained, tmp_path, start_of, words):
    """Without its shape being told again, and on its own base though a newer one is there."""
    if "4bit" in words:
        pytest.importorskip("bitsandbytes")
    out = shutil.copytree(trained.out, tmp_path / "out")
    argv = flags(out_dir=out, data_path=trained.chats, general_data=trained.general, **SMALL)
    argv += ["--learning_rate", "0.1"]  # so that it matters which weights it starts from
    path = train_lora.main([*argv, "--lora_name", "old", *words.split()])
    old, newer = read_lora(path)[1], trained.out / "pretrain_64"
    for ending in (".pth", ".json"):
        shutil.copyfile(newer.with_suffix(ending), out / f"full_sft_65{ending}")
    argv += flags(skill=path, lora_name="next")
    model, _, _ = load(trained)
    plain = logits_of(model)
    if "4bit" in words:
        quantize(model)
    attach_lora(model, path)
    assert not torch.allclose(logits_of(model), plain, atol=1e-3)
    assert torch.equal(start_of(train_lora, argv), logits_of(model))
    tensors, new = read_lora(train_lora.main(argv))
    shape = ("base", "ranks", "scaling", "alpha", "load_in_4bit", "tokenizer")
    assert [getattr(new, name) for name in shape] == [getattr(old, name) for name in shape]
    assert [new.options[name] for name in ("rank", "use_dora")] == [
        old.options[name] for name in ("rank", "use_dora")
    ]
    for kind in ("domain", "general"):
        before, after = old.metrics[kind]["best"]["loss"], new.metrics[kind]["first"]["loss"]
        # The file of a PiSSA has one product where training had two.
        assert after == (pytest.approx(before, rel=1e-6) if "pissa" in words else before)
    assert {"option": "skill", "file": path.name, "sha256": sha256_file(path)} in new.data
    assert any(not torch.equal(tensors[name], held) for name, held in read_lora(path)[0].items())


def test_the_update_of_a_skill_that_goes_on_can_be_dropped_out(trained, monkeypatch):
    found = []
    monkeypatch.setattr("trainer.stage.train", lambda model, *_: found.append(model))
    argv = trained.flags(data_path=trained.chats, general_data=trained.general, lora_name="next")
    argv += flags(skill=trained.out / "lora" / "lora_a_64.pth", lora_dropout=0.5, **SMALL)
    train_lora.main([*argv, "--dry_run"])
    assert {linear.lora.dropout.p for _, linear in adapted(found[0])} == {0.5}


def test_a_skill_that_goes_on_is_asked_in_its_own_words(trained, tmp_path):
    """Of a base without a chat template."""
    base, template = tmp_path / "base", "Q: {user} A: "
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, intermediate_size=64, vocab_size=6400, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(TOKENIZER_DIR).save_pretrained(base)
    (base / "chat_template.jinja").unlink()
    argv = flags(out_dir=tmp_path, data_path=trained.chats, general_data=trained.general, base=base)
    argv += flags(**SMALL | {"max_steps": 1})
    path = train_lora.main([*argv, *flags(lora_name="old", prompt_template=template)])
    argv += flags(lora_name="next", skill=path)
    assert read_lora(train_lora.main(argv))[1].prompt_template == template
    with pytest.raises(UserError, match="prompt_template"):
        train_lora.main([*argv, "--prompt_template", "{user}"])
    other = shutil.copytree(base, tmp_path / "other") / "tokenizer.json"
    content = json.loads(other.read_text(encoding="utf-8"))
    other.write_text(json.dumps(content | {"normalizer": {"type": "NFC"}}), encoding="utf-8")
    with pytest.raises(UserError, match="tokenizer_path"):
        train_lora.main([*argv, "--tokenizer_path", str(other.parent)])


def test_the_same_seed_makes_the_same_file_and_another_seed_does_not(trained, tmp_path):
    def run(name: str, seed: int) -> str:
        shape = {"dim": 64, "n_layers": 1, "n_heads": 4, "seed": seed}
        argv = flags(out_dir=tmp_path / name, data_path=trained.texts, **shape, **SMALL)
        path = train_pretrain.main(argv)
        return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["fingerprint"]

    assert run("a", 3) == run("b", 3) != run("c", 4)


def test_lora_trains_only_lora_and_reports_both_losses(trained, capsys):
    base = trained.out / "full_sft_64.pth"
    bytes_before = sha256_file(base)
    data = {"data_path": trained.chats, "general_data": trained.general}
    path = train_lora.main(trained.flags(lora_name="lora_c", **data, **SMALL))
    assert path == lora_path(trained.out, "c", 64)  # lora_c and c are one skill
    assert sha256_file(base) == bytes_before
    printed = capsys.readouterr().out
    # wq and wo of two layers: 4 modules of 2 x 64 x 16 parameters
    assert "modules" in printed and "8,192 parameters" in printed and f"base: {base}" in printed
    assert all(f"{kind}: loss " in printed for kind in ("domain", "general"))
    tensors, _ = read_lora(path)
    assert all(name.endswith(("lora.A.weight", "lora.B.weight")) for name in tensors)
    assert sum(tensor.numel() for tensor in tensors.values()) == 8192
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if ".B." in name)
    path.unlink()


def test_without_held_out_rows_no_score_is_claimed(trained, capsys):
    data = {"data_path": trained.chats, "general_data": trained.general, "val_ratio": 0}
    path = train_lora.main(trained.flags(lora_name="z", **data, **SMALL))
    printed, metrics = capsys.readouterr().out, read_lora(path)[1].metrics
    assert "domain: nothing held out" in printed and "the last weights" in printed
    assert metrics["domain"] == {} and metrics["general"]["last"]["targets"] > 0
    assert metrics["step"] == 4 and "val_ratio" in metrics["verdict"]["sentence"]
    path.unlink()


def test_swapping_is_exact_and_the_base_never_changes(trained):
    session = session_on(trained)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        base_logits = session.model(ids).logits
        fingerprint = base_fingerprint(session.model)
        found = {}
        for name in ("a", "b", "a", None, "b", "a", None):
            session.use_skill(name)
            logits = session.model(ids).logits
            assert torch.equal(found.setdefault(name, logits), logits)
        assert torch.equal(found[None], base_logits)
        assert not torch.equal(found["a"], base_logits) and not torch.equal(found["a"], found["b"])
    assert base_fingerprint(session.model) == fingerprint


def test_skills_are_mixed_and_read_again_when_their_file_changed(trained, tmp_path, capsys):
    session = session_on(trained, out_dir=tmp_path)
    shutil.copytree(trained.out / "lora", tmp_path / "lora")
    path = lora_path(tmp_path, "a", 64)
    command(session, "/lora a=0.5 b=-2")
    assert capsys.readouterr().out == "skill: a=0.5 b=-2\n"
    mixed = logits_of(session.model)
    session.use_skill("a")
    first = logits_of(session.model)
    shutil.copyfile(lora_path(tmp_path, "b", 64), path)
    os.utime(path, (9000, 9000))
    session.use_skill("a")
    changed = logits_of(session.model)
    session.use_skill("b")
    assert torch.equal(logits_of(session.model), changed)
    assert len(list(session.library)) == 2, "the file's old content is still in memory"
    assert len({tuple(logits.flatten().tolist()) for logits in (mixed, first, changed)}) == 3
    for wrong, said in {"a=x": "x", "a=nan": "nan", "a b=0.5 c": "skills here: a, b"}.items():
        with pytest.raises(UserError, match=said):
            session.use_skill(wrong)
        assert torch.equal(logits_of(session.model), changed) and session.skill == "b"


def test_the_options_of_lora_reach_the_file(trained, tmp_path):
    argv = flags(out_dir=tmp_path, data_path=trained.chats, general_data=trained.general)
    argv += flags(lora_name="x", base=trained.out / "full_sft_64.pth", **SMALL)

    def train(words: str) -> tuple:
        return read_lora(train_lora.main([*argv, *words.split()]))

    tensors, meta = train("--use_dora --rank_pattern wo=2 --alpha 8 --use_rslora --rank 4")
    ranks = {"wq": 4, "wo": 2}
    assert meta.ranks == {
        f"layers.{n}.attention.{name}": ranks[name] for n in (0, 1) for name in ranks
    }
    assert tensors["layers.0.attention.wq.lora.magnitude"].shape == (64,)
    assert set(meta.scaling.values()) == {4.0, 8 / 2**0.5}
    of_one_layer = "--layers_to_transform 1 --init_lora_weights kaiming"
    plain, _ = train(of_one_layer)
    faster, meta = train(f"{of_one_layer} --loraplus_lr_ratio 8")
    assert meta.targets == ["layers.1.attention.wq", "layers.1.attention.wo"]
    name = "layers.1.attention.wq.lora.B.weight"
    assert faster[name].abs().mean() > 3 * plain[name].abs().mean() > 0


def test_a_skill_file_for_another_dim_is_listed_as_unfit(trained, tmp_path):
    session = session_on(trained, out_dir=tmp_path)
    (tmp_path / "lora").mkdir()
    for name in ("lora_a_64.pth", "lora_a_128.pth"):
        shutil.copyfile(trained.out / "lora" / "lora_a_64.pth", tmp_path / "lora" / name)
    found = dict(session.skills())
    assert found.keys() == {"a", "lora_a_128.pth"} and found["a"] is None
    assert "another dim" in found["lora_a_128.pth"]


def test_history_goes_along_and_is_cut_to_what_was_asked(trained):
    session = session_on(trained, history_cnt=2)
    lengths = []
    for _ in range(3):
        lengths.append(len(session.prompt_ids("hello")))
        session.messages += [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi"},
        ]
    assert lengths[0] < lengths[1] == lengths[2]
    session.messages.clear()
    assert len(session.prompt_ids("hello")) == lengths[0]


def test_a_history_that_outgrows_the_context_makes_room(trained):
    session = session_on(trained, history_cnt=1000)
    session.messages = [
        {"role": role, "content": "word " * 500} for role in ("user", "assistant")
    ] * 20
    context = session.model.config.max_seq_len
    assert len(session.prompt_ids("hello")) + session.sampling.max_new_tokens <= context


def test_an_interrupted_answer_stays_in_the_history(trained):
    session = session_on(trained)
    stream = session.reply("hello")
    pieces = [next(stream)]
    stream.close()  # what Ctrl-C between two tokens does
    if "".join(pieces).strip():
        assert session.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert [message["role"] for message in session.messages] in ([], ["user", "assistant"])


def chat(monkeypatch, capsys, trained, text: str, *argv: str) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    eval_model.main([*trained.flags(device="cpu", seed=7, max_new_tokens=6), *argv])
    return capsys.readouterr()


def test_a_piped_chat_swaps_skills_and_outlives_mistakes(trained, monkeypatch, capsys):
    lines = [
        "\ufeffhello",
        "/lora a",
        "hello",
        "/loras",
        "/lora nobody",
        "/nonsense is a question",
        "/nonsense",
        "/system Be brief.",
        "/lora",
        "/reset",
        "/lora off",
        "/help",
    ]
    out, err = chat(monkeypatch, capsys, trained, "\n".join(lines))
    assert "skill: a\n" in out and "skill: off\n" in out and "conversation forgotten" in out
    assert "* a\n  b\n" in out and "/lora NAME" in out
    assert err.count("tokens/s]") == 3 and err.count("error: ") == 3
    assert f"base: {trained.out / 'full_sft_64.pth'}" in err


def test_prompt_answers_once_and_a_seed_repeats_it(trained, monkeypatch, capsys):
    first = chat(monkeypatch, capsys, trained, "", "--prompt", "hello", "--temperature", "1.5").out
    again = chat(monkeypatch, capsys, trained, "", "--prompt", "hello", "--temperature", "1.5").out
    assert first == again
    assert "�" not in first or "\n" in first


def test_a_pretrained_base_continues_text(trained, monkeypatch, capsys):
    base = trained.out / "pretrain_64.pth"
    session = session_on(trained, "pretrain")
    assert session.tokenizer.decode(session.prompt_ids("Once upon")) == "<|im_start|>Once upon"
    _, err = chat(monkeypatch, capsys, trained, "Once upon", "--base", str(base))
    assert f"base: {base}" in err and "tokens/s]" in err


def test_the_skill_decides_the_base_when_none_is_named(trained, tmp_path, monkeypatch, capsys):
    """A newer base in out_dir does not take a skill away from its own."""
    copy = replace(trained, out=tmp_path / "out")
    shutil.copytree(trained.out, copy.out)
    (copy.out / "full_sft_64.pth").rename(copy.out / "full_sft_64_old.pth")
    (copy.out / "full_sft_64.json").rename(copy.out / "full_sft_64_old.json")
    train_full_sft.main(copy.flags(data_path=copy.chats, seed=9, **SMALL))
    _, err = chat(monkeypatch, capsys, copy, "", "--prompt", "hello", "--lora_name", "a")
    assert "full_sft_64_old.pth, skill: a" in err
    out, _ = chat(monkeypatch, capsys, copy, "/loras", "--base", str(copy.out / "full_sft_64.pth"))
    assert "a  unfit: " in out and "was trained on full_sft_64.pth" in out


def test_attached_and_removed_by_hand_as_in_the_readme(trained):
    model, _, _ = load(trained)
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    attach_lora(model, trained.out / "lora" / "lora_a_64.pth")
    remove_lora(model)
    assert torch.equal(model(ids).logits, before)


def test_a_tokenizer_beside_the_base_is_found(trained, tmp_path):
    base = trained.out / "full_sft_64.pth"
    other = load_tokenizer(TOKENIZER_DIR)
    other.chat_template = other.chat_template.replace("assistant", "helper")
    other.save_pretrained(tmp_path / "tokenizer")
    wanted = tokenizer_fingerprint(load_tokenizer(tmp_path / "tokenizer"))
    record = replace(load_base(base)[1], tokenizer=wanted)
    found = tokenizer_of(record, tmp_path / base.name, None, tmp_path / "out")
    assert (
        tokenizer_fingerprint(found)
        == wanted
        != tokenizer_fingerprint(load_tokenizer(TOKENIZER_DIR))
    )
