"""Tokenizers: trained in seconds on small data, exact for any text, and known by their
fingerprint.
"""

import copy
import json
import random
import shutil
import sys
import unicodedata

import numpy as np
import pytest
from conftest import write_rows
from transformers import PreTrainedTokenizerFast

from core.errors import UserError
from core.paths import TOKENIZER_DIR, bundled_data
from dataset.chat import encode_chat
from dataset.tokenizer import load_tokenizer, spelled_bytes, token_bytes, tokenizer_fingerprint
from scripts.train_tokenizer import (
    CHAT_TEMPLATE,
    learned_texts,
    main,
    save_tokenizer,
    texts_of,
    train_bpe,
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MESSAGES = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hello 👋"}]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tokenizer of 400 entries, trained by the command on two small files: its folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    files = [folder / "texts.jsonl", folder / "chats.json"]
    files[0].write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in words()), encoding="utf-8"
    )
    files[1].write_text(json.dumps([{"messages": MESSAGES}] * 40), encoding="utf-8")
    return main(
        [
            "--data_path",
            *map(str, files),
            "--vocab_size",
            "400",
            "--tokenizer_path",
            str(folder / "made"),
        ]
    )


def words():
    rng = random.Random(3)
    return [
        " ".join("".join(rng.choices("abcdefgh天地人", k=4)) for _ in range(40)) for _ in range(60)
    ]


def any_text(rng, length=40):
    """Characters of every plane, control characters, lone combining marks, odd line ends; all but
    surrogates.
    """
    blocks = [
        (0, 0x100),
        (0x300, 0x370),
        (0x4E00, 0x9FFF),
        (0xE000, 0xFFFF),
        *((p << 16, (p << 16) + 0xFFFF) for p in range(17)),
    ]
    text = ""
    while len(text) < length:
        code = rng.randint(*rng.choice(blocks))
        text += "" if 0xD800 <= code < 0xE000 else chr(code)
    return text


def test_training_gives_the_wanted_size_and_places(small):
    tokenizer = load_tokenizer(small)
    assert len(tokenizer) == tokenizer.vocab_size == 400
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == SPECIAL
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert sorted(tokenizer.get_vocab().values()) == list(range(400))
    assert tokenizer("天地人 abc").input_ids, "no control token is added by itself"
    assert not set(tokenizer("天地人 abc").input_ids) & {0, 1, 2}


def test_training_twice_gives_the_same_tokenizer(small):
    texts = words()
    assert tokenizer_fingerprint(train_bpe(iter(texts), 350)) == tokenizer_fingerprint(
        train_bpe(iter(texts), 350)
    )
    assert tokenizer_fingerprint(train_bpe(iter(texts), 350)) != tokenizer_fingerprint(
        load_tokenizer(small)
    )


def test_held_out_texts_are_never_trained_on(tmp_path, capsys):
    """Only the held-out texts hold the words that would become the first merges."""
    path = tmp_path / "a.jsonl"
    rows = [
        {"text": "zqzq zqzq zqzq zqzq" if n % 20 == 0 else text} for n, text in enumerate(words())
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    main(
        [
            "--data_path",
            str(path),
            "--vocab_size",
            "300",
            "--tokenizer_path",
            str(tmp_path / "made"),
        ]
    )
    vocabulary = load_tokenizer(tmp_path / "made").get_vocab()
    assert "zq" not in vocabulary and any(
        len(token) > 1 and token.isascii() for token in vocabulary
    )
    assert f"{path.name} | 3 | " in capsys.readouterr().out


def test_texts_of_either_kind_are_held_out_or_not_and_bad_rows_left_out(tmp_path, capsys):
    chat = {"messages": [{"role": r, "content": r} for r in ("user", "assistant")]}
    rows = [{"text": "a"}, {"text": ""}, chat, {"text": "c"}, {"text": "d"}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert list(texts_of(path, 3, held_out=False)) == ["user\nassistant", "c"]
    assert not capsys.readouterr().out
    assert list(texts_of(path, 3, held_out=True)) == ["a", "d"]
    assert "1 bad row" in capsys.readouterr().out
    with pytest.raises(UserError, match="no usable row"):
        list(texts_of(write_rows(tmp_path / "b.jsonl", rows[1:2]), held_out=True))


def test_a_cap_draws_random_texts_once_each_and_the_same_ones_again(tmp_path, capsys):
    texts = [f"{n:04d}" for n in range(500)]
    path = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in ["held out", *texts]])
    drawn = list(learned_texts(path, 1000, 402))
    assert len(drawn) == len(set(drawn)) == 101 and set(drawn) <= set(texts)
    assert drawn == list(learned_texts(path, 1000, 402)) and drawn[-1] > "0250"
    assert "404 of 2,000" in capsys.readouterr().out
    assert list(learned_texts(path, 1000, 0)) == list(learned_texts(path, 1000, 10**9)) == texts
    assert not capsys.readouterr().out


def test_too_little_data_for_the_size_is_said(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "ab ab"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"2\d\d .*--vocab_size 6400"):
        main(["--data_path", str(path), "--tokenizer_path", str(tmp_path / "made")])
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("flags", [["--vocab_size", "258"], ["--held_out", "1"]])
def test_impossible_settings_are_refused(flags):
    with pytest.raises(UserError, match="must be at least"):
        main(flags)


@pytest.mark.parametrize("which", ["small", "shipped"])
def test_any_text_comes_back_exactly(small, tokenizer, which):
    chosen = load_tokenizer(small) if which == "small" else tokenizer
    sizes = token_bytes(chosen)
    rng = random.Random(9)
    every_mark = "".join(
        chr(code)
        for code in range(sys.maxunicode)
        if unicodedata.category(chr(code)) in ("Mn", "Cc")
    )
    texts = [
        "\r\n \r\n\t\n",
        " ",
        "  a  ",
        "e\u0301",
        "\u0301",
        every_mark,
        *(any_text(rng) for _ in range(400)),
    ]
    for text in texts:
        ids = chosen.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert chosen.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())
        assert b"".join(spelled_bytes(chosen, ids)) == text.encode()


def test_every_token_is_counted_by_its_own_bytes(tokenizer):
    sizes = token_bytes(tokenizer)
    assert sizes.shape == (6400,) and sizes.dtype == np.int64
    assert (sizes[:3] == 0).all() and (sizes[3:] >= 1).all()
    spelled = spelled_bytes(tokenizer, range(6400))
    assert [len(token) for token in spelled[3:]] == sizes[3:].tolist()
    assert set(spelled) >= {bytes([byte]) for byte in range(256)}
    assert spelled[1] == b"<|im_start|>"


def test_the_shipped_tokenizer(tokenizer):
    assert len(tokenizer) == 6400
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == SPECIAL
    assert tokenizer.chat_template == CHAT_TEMPLATE
    config = json.loads((TOKENIZER_DIR / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = (TOKENIZER_DIR / "chat_template.jinja").read_text(encoding="utf-8")
    assert config["chat_template"] == template, "older readers take the one, newer ones the other"
    # It suits the bundled data; 256 single bytes would give 0.6 characters per token.
    texts = [
        json.loads(line)["text"]
        for line in bundled_data("pretrain_mini.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert sum(map(len, texts)) / sum(map(len, tokenizer(texts).input_ids)) > 1.9


def test_saving_and_loading_keep_the_fingerprint(tokenizer, small, tmp_path):
    for one in (tokenizer, load_tokenizer(small), train_bpe(iter(words()), 300)):
        before = tokenizer_fingerprint(one)
        one("a text"), encode_chat(one, MESSAGES)  # using it changes nothing
        assert tokenizer_fingerprint(one) == before
        save_tokenizer(one, tmp_path / before)
        loaded = load_tokenizer(tmp_path / before)
        assert tokenizer_fingerprint(loaded) == before
        assert encode_chat(loaded, MESSAGES) == encode_chat(one, MESSAGES)


def test_the_fingerprint_changes_with_whatever_changes_ids(tokenizer, small, tmp_path):
    seen = {tokenizer_fingerprint(tokenizer), tokenizer_fingerprint(load_tokenizer(small))}
    template = copy.copy(tokenizer)
    template.chat_template = CHAT_TEMPLATE.replace("\\n", " ")
    seen.add(tokenizer_fingerprint(template))
    backend = json.loads((small / "tokenizer.json").read_text(encoding="utf-8"))
    changes = {
        "merge": lambda d: d["model"]["merges"].reverse(),
        "spelling": lambda d: d["model"]["vocab"].update(
            {"ab": d["model"]["vocab"]["Ā"], "Ā": d["model"]["vocab"]["ab"]}
        ),
        "normalizer": lambda d: d.update(normalizer={"type": "NFC"}),
        "splitting": lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
    }
    for name, change in changes.items():
        changed = json.loads(json.dumps(backend))
        change(changed)
        shutil.copytree(small, tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(changed), encoding="utf-8")
        seen.add(tokenizer_fingerprint(load_tokenizer(tmp_path / name)))
    added = load_tokenizer(small)
    added.add_tokens(["<think>"])
    seen.add(tokenizer_fingerprint(added))
    assert len(seen) == 2 + 1 + len(changes) + 1


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b'{"model": '), "cannot be read"),
        (lambda folder: (folder / "tokenizer_config.json").write_bytes(b"[]"), "cannot be read"),
        (
            lambda folder: save_without(folder, "chat_template"),
            "has no chat template",
        ),
        (lambda folder: save_without(folder, "eos_token"), "lacks an end-of-turn token"),
    ],
)
def test_a_folder_that_is_no_tokenizer_is_one_sentence(small, tmp_path, damage, reason):
    folder = tmp_path / "copy"
    shutil.copytree(small, folder)
    damage(folder)
    with pytest.raises(UserError, match=reason) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def save_without(folder, key):
    (folder / "chat_template.jinja").unlink()
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config[key]
    file.write_text(json.dumps(config), encoding="utf-8")


def test_plain_transformers_reads_the_folder(small):
    loaded = PreTrainedTokenizerFast.from_pretrained(small)
    assert (
        loaded.convert_tokens_to_ids(SPECIAL) == [0, 1, 2] and loaded.chat_template == CHAT_TEMPLATE
    )
