"""A chat's skills: their files are found, read once, and named in full when they are refused."""

import os
import shutil
import sys

import pytest
from chat_templates import TEMPLATES, tokenizer_of
from conftest import flags, logits_of

import eval_model
from core.errors import UserError
from core.paths import TOKENIZER_DIR, lora_path
from dataset.chat import encode_chat
from dataset.tokenizer import load_tokenizer
from model.generation import Sampling
from model.lora.skill_file import read_lora
from model.model import MiniMindLM
from model.model_lora import apply_lora, save_lora
from model.weights import load_base
from serving.session import ChatSession


@pytest.fixture
def session(trained, tmp_path):
    """On the trained chat base, with copies of its skills in a folder of its own."""
    out = tmp_path / "runs@2024"
    shutil.copytree(trained.out / "lora", out / "lora")
    model, _ = load_base(trained.out / "full_sft_64.pth")
    settings = {"seed": 1, "history_cnt": 6, "continues": False, "out_dir": out}
    return ChatSession(
        model, load_tokenizer(TOKENIZER_DIR), Sampling(max_new_tokens=64), **settings
    )


def test_a_refusal_names_the_folder_whatever_its_name(session):
    with pytest.raises(UserError) as caught:
        session.use_skill("nobody")
    assert str(session.out_dir) in str(caught.value) and "a, b" in str(caught.value)
    lora_path(session.out_dir, "a", 64).write_bytes(b"no weights")
    with pytest.raises(UserError) as caught:
        session.use_skill("a")
    assert str(session.out_dir) in str(caught.value)


def test_a_changed_file_that_does_not_fit_leaves_the_active_skill(session):
    session.use_skill("a")
    before, path = logits_of(session.model), lora_path(session.out_dir, "a", 64)
    other = MiniMindLM(session.model.config)
    apply_lora(other, 2)
    save_lora(other, path)
    os.utime(path, (9000, 9000))
    with pytest.raises(UserError, match="was trained on"):
        session.use_skill("a")
    assert (logits_of(session.model) == before).all() and session.skill == "a"


TURNS = [("What is 2 + 2?", "Four.\n\nAsk on!"), ("谢谢你", "不客气")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_asks_again_what_training_taught(tiny_model, tmp_path, monkeypatch, name):
    """Whatever the template writes around an answer is no part of what is shown or asked again."""
    tokenizer, chat = tokenizer_of(name), []
    settings = {"seed": 1, "history_cnt": 6, "continues": False, "out_dir": tmp_path}
    session = ChatSession(tiny_model, tokenizer, Sampling(max_new_tokens=1), **settings)
    stops = session.stop_ids()

    def learned_by_heart(model, ids, *_):
        """What a model generates that was trained on the chat until it makes no mistake."""
        all_ids, learned = encode_chat(tokenizer, chat)
        assert all_ids[: len(ids)] == ids and all(flag for flag in learned[len(ids) :][:1])
        new = [token for token, flag in zip(all_ids, learned, strict=True) if flag]
        last = new[len(new) - sum(learned[len(ids) :]) :]
        assert last[-1] in stops and not stops & set(last[:-1])
        return iter(last[:-1])

    monkeypatch.setattr("serving.session.generate", learned_by_heart)
    for question, answer in TURNS:
        turn = [("user", question), ("assistant", answer)]
        chat += [{"role": role, "content": text} for role, text in turn]
        assert "".join(session.reply(question)).strip() == answer
    assert session.messages == chat


def test_bytes_that_are_no_text_do_not_end_a_chat(tiny_model, tmp_path, monkeypatch):
    tokenizer = tokenizer_of("llama-2")
    settings = {"seed": 1, "history_cnt": 6, "continues": False, "out_dir": tmp_path}
    session = ChatSession(tiny_model, tokenizer, Sampling(max_new_tokens=1), **settings)
    word = tokenizer.encode("on", add_special_tokens=False)
    lone = [tokenizer.convert_tokens_to_ids(f"<0x{byte}>") for byte in ("C3", "8E", "E9")]
    monkeypatch.setattr("serving.session.generate", lambda *_: iter([*lone, *word, *word]))
    said = "".join(session.reply("Hi"))
    assert "\ufffd" in said and said.endswith("on")


def test_chats_asked_together_are_answered_as_one_by_one(session):
    session.model.double()
    chats = [("Hello",), ("Who are you?", "And who am I?"), ("你好", "谢谢", "再见"), ("Hello",)]
    said = session.reply_all(chats, [3, 4, 5, 6])
    assert not session.messages and len(set(said)) > 2
    for chat, seed, answer in zip(chats, [3, 4, 5, 6], said, strict=True):
        session.messages.clear()
        session.rng.manual_seed(seed)
        assert ["".join(session.reply(turn)) for turn in chat][-1] == answer


def test_a_system_turn_comes_first_or_is_refused(session, tiny_model, tmp_path):
    plain = session.prompt_ids("Hi")
    session.use_system("Be brief.")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert session.prompt_ids("Hi") == encode_chat(session.tokenizer, turns, True)[0] != plain
    session.use_system(None)
    assert session.prompt_ids("Hi") == plain
    settings = {"seed": 1, "history_cnt": 6, "out_dir": tmp_path}
    for name, continues in (("gemma-2", False), ("own", True)):
        other = ChatSession(
            tiny_model, tokenizer_of(name), Sampling(), continues=continues, **settings
        )
        with pytest.raises(UserError):
            other.use_system("Be brief.")
        assert other.system is None and other.prompt_ids("Hi")


def test_one_answer_opens_the_skill_file_as_often_as_reading_it_does(trained):
    """Reading a file opens it for its checksums and for its tensors."""
    path, opened = lora_path(trained.out, "a", 64), []

    def note(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            opened.append(os.fspath(arguments[0]))

    sys.addaudithook(note)  # for good: it only takes notes
    read_lora(path)
    once = opened.count(str(path))
    eval_model.main(
        trained.flags(lora_name="a", prompt="hi", device="cpu", max_new_tokens=1, seed=1)
    )
    assert opened.count(str(path)) == 2 * once > 0
    opened.clear()
    argv = trained.flags(lora_name="a", prompt="hi", device="cpu", max_new_tokens=1)
    eval_model.main([*argv, *flags(base=trained.out / "full_sft_64.pth")])
    assert opened.count(str(path)) == once
