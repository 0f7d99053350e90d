"""The token cache: the same table whoever makes it, whole or absent, and never an old one for a new
file.
"""

import gzip
import json
import multiprocessing
import os
import pickle
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard
from conftest import write_rows as write

from core import files
from core.errors import UserError
from core.paths import cache_dir
from dataset import cache
from dataset import files as data_reading
from dataset.batches import PretrainDataset
from dataset.cache import CHAT, TEXT, TokenRows, split_rows, tokenize_files
from dataset.chat import encode_chat
from scripts import prepare_data
from scripts.train_tokenizer import train_bpe

RNG = random.Random(3)
WORDS = ["the", "cat", "天地", "sat", "on", "一二三", "a", "mat", "😀", "and", "你好", "café"]


def words(most):
    return " ".join(RNG.choices(WORDS, k=RNG.randint(1, most)))


TEXTS = [{"text": words(30)} for _ in range(60)]
CHATS = [
    {"messages": [{"role": r, "content": words(9)} for r in ("user", "assistant") * (n % 3 + 1)]}
    for n in range(40)
]
HOUR_NS = 3600 * 10**9


@pytest.fixture
def texts(tmp_path):
    return write(tmp_path / "texts.jsonl", TEXTS)


@pytest.fixture
def make(tokenizer, tmp_path):
    """The table of one file of texts."""

    def make(path, bad_rows="stop", workers=0):
        cache_folder = tmp_path / "cache"
        return tokenize_files((path,), TEXT, tokenizer, cache_folder, bad_rows, workers=workers)

    return make


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(data_reading, "BLOCK_BYTES", 700)


def written(folder):
    """The files of all tables in a cache; the memory of hashes is written for files of some age
    only.
    """
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.name != "sha256.json"}


def rows_of(table):
    return [table[n].tolist() for n in range(len(table.lengths))]


def decoded(tokenizer, table):
    return [tokenizer.decode(table[n] >> 1) for n in range(len(table.lengths))]


def framed(some):
    return [f"<|im_start|>{row['text']}<|im_end|>" for row in some]


# One table, whoever makes it

GOOD_LINES = [json.dumps(row, ensure_ascii=False).encode() for row in TEXTS]
LINES = b"\n".join(
    [b"", b'{"text": 3}', *GOOD_LINES[:25], b" ", b"oops", *GOOD_LINES[25:], b'{"tekst": "a"}\n']
)
FAULTS = [2, 29, 65]
ARRAY = b"[" + b",\n".join([b'{"text": 3}', *GOOD_LINES, b'{"text": ""}']) + b"]"
TWO_FRAMES = zstandard.compress(LINES[:999]) + zstandard.compress(LINES[999:])
FORMATS = {  # content, lines of the bad rows
    "a.jsonl": (LINES, FAULTS),
    "bom_crlf.jsonl": (b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"), FAULTS),
    "a.jsonl.gz": (gzip.compress(LINES), FAULTS),
    "two_frames.jsonl.zst": (TWO_FRAMES, FAULTS),
    "array.json": (ARRAY, [1, 62]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_any_number_of_processes_makes_the_same_table(tokenizer, tmp_path, small_blocks, name):
    content, faults = FORMATS[name]
    (tmp_path / name).write_bytes(content)
    paths = tmp_path / name, write(tmp_path / "second.jsonl", [*TEXTS, {"text": []}])
    made = []
    for workers in (1, 3):
        folder = tmp_path / f"cache-{workers}"
        table = tokenize_files(paths, TEXT, tokenizer, folder, "skip", workers=workers)
        assert decoded(tokenizer, table) == framed(TEXTS * 2)
        made.append(written(folder))
    assert made[0] == made[1] and len(made[0]) == 3
    (seal,) = (json.loads(content) for name, content in made[0].items() if name.endswith(".json"))
    shown = [(file, line) for file, line, _ in seal["facts"]["shown"]]
    assert shown == [*((0, line) for line in faults), (1, len(TEXTS) + 1)]


def test_processes_that_inherit_nothing_make_the_same_table(tokenizer, tmp_path, small_blocks):
    """As on macOS and Windows."""
    paths = (write(tmp_path / "chats.jsonl", [*CHATS, {"messages": []}]),)
    tokenize_files(paths, CHAT, tokenizer, tmp_path / "alone", "skip", workers=1)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        tokenize_files(paths, CHAT, tokenizer, tmp_path / "helped", "skip", workers=2)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert written(tmp_path / "helped") == written(tmp_path / "alone")


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)]
)
def test_much_text_is_announced_also_when_packed_and_little_is_not(
    make, tmp_path, monkeypatch, capsys, suffix, pack
):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(b"\n".join(GOOD_LINES)))
    monkeypatch.setattr(cache, "MOST_WORKERS", 1)
    monkeypatch.setattr(cache, "SMALL_BYTES", path.stat().st_size * (2 if suffix else 1))
    make(path)
    printed = capsys.readouterr()
    first, last = printed.out.splitlines()
    assert first.startswith(f"tokenising {path.name}: ") and first.endswith(" MB, 1 processes")
    assert last.startswith(f"tokenised {len(TEXTS)} rows in ") and "rows/s" in last
    assert printed.err == "", "the bar is for terminals"
    make(write(tmp_path / "small.jsonl", TEXTS[:9]))
    assert capsys.readouterr() == ("", "")


def test_a_file_that_grows_meanwhile_is_refused(make, texts, tmp_path, monkeypatch):
    read = cache.read_blocks

    def grow(path):
        yield from read(path)
        with path.open("a") as file:
            file.write('{"text": "late"}\n')

    monkeypatch.setattr(cache, "read_blocks", grow)
    with pytest.raises(UserError, match=r"texts\.jsonl "):
        make(texts)
    assert written(tmp_path / "cache") == {}


def test_processes_that_start_at_once_share_one_table(make, texts, tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(rows_of(make(texts)))) for _ in "1234"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(rows == found[0] for rows in found)
    assert len(written(tmp_path / "cache")) == 3


# Rows


def test_rows_say_what_is_learned_and_where_that_begins(tokenizer, tmp_path, small_blocks):
    path = write(tmp_path / "chats.jsonl", CHATS)
    table = tokenize_files((path,), CHAT, tokenizer, tmp_path / "cache")
    for n, row in enumerate(CHATS):
        ids, learned = encode_chat(tokenizer, row["messages"])
        first = table.first_target[n]
        assert (table[n] >> 1).tolist() == ids and (table[n] & 1).tolist() == learned
        assert first >= 1 and learned[first] and not any(learned[1:first])
        assert table.lengths[n] == len(ids)
    assert np.shares_memory(table[7], table.tokens), "a row is a view of the file"
    some = TokenRows(table.table, table.dtype, np.array([3, 7]))
    copied = pickle.loads(pickle.dumps(some))
    assert len(pickle.dumps(some)) < 1000, "worker processes open the file themselves"
    for subset in (some, copied):
        assert rows_of(subset) == [table[3].tolist(), table[7].tolist()]
        assert subset.first_target.tolist() == table.first_target[[3, 7]].tolist()


@pytest.mark.parametrize(
    ("learned", "expected"),
    [([True, False], 2), ([False] * 3, 3), ([True, True], 1), ([True, False, True], 2)],
)
def test_nothing_predicts_the_first_token_and_a_row_may_have_no_target(
    tokenizer, texts, tmp_path, learned, expected
):
    kind = TEXT._replace(encode=lambda _, rows: [([5] * len(learned), learned) for _ in rows])
    table = tokenize_files((texts,), kind, tokenizer, tmp_path / "cache")
    assert set(table.first_target.tolist()) == {expected}


@pytest.mark.parametrize("largest", [(1 << 15) - 1, 1 << 15, (1 << 31) - 1])
def test_ids_of_any_vocabulary_come_back(tokenizer, texts, tmp_path, monkeypatch, largest):
    vocabulary = tokenizer.get_vocab() | {"x": largest}
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: vocabulary)
    kind = TEXT._replace(encode=lambda _, rows: [([3, largest], [False, True]) for _ in rows])
    table = tokenize_files((texts,), kind, tokenizer, tmp_path / "cache")
    assert (table[0] >> 1).tolist() == [3, largest] and (table[0] & 1).tolist() == [0, 1]
    assert table.tokens.itemsize == (2 if largest < 1 << 15 else 4)


# Whole or absent


def test_the_second_call_reads_the_cache(make, texts, tmp_path, monkeypatch):
    first, before = rows_of(make(texts)), written(tmp_path / "cache")
    moved = texts.rename(tmp_path / "another name.jsonl")
    monkeypatch.setattr(cache, "read_blocks", None)  # whoever tokenises again fails
    assert rows_of(make(moved)) == first
    assert written(tmp_path / "cache") == before


def test_the_same_bytes_are_other_rows_in_a_table(tokenizer, make, tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS[:3])
    assert decoded(tokenizer, make(path)) == framed(TEXTS[:3])
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(["text", *lines]), encoding="utf-8")
    assert decoded(tokenizer, make(path, "skip")) == framed(TEXTS[:3])
    table = make(path.rename(tmp_path / "a.tsv"))
    assert decoded(tokenizer, table) == framed([{"text": line} for line in lines])


def test_a_warm_start_hashes_no_data(make, texts, monkeypatch):
    now = files.time.time_ns
    monkeypatch.setattr(files.time, "time_ns", lambda: now() + HOUR_NS)  # later
    first, opened = rows_of(make(texts)), []
    monkeypatch.setattr(
        Path, "open", lambda *a, open=Path.open, **k: opened.append(a[0].name) or open(*a, **k)
    )
    assert rows_of(make(texts)) == first and opened and "texts.jsonl" not in opened


def test_whatever_changes_the_tokens_makes_a_new_table(tokenizer, texts, tmp_path, monkeypatch):
    folder, chats = tmp_path / "cache", write(tmp_path / "chats.jsonl", CHATS)

    def tables(*settings):
        tokenize_files(*settings, folder)
        return len(list(folder.glob("*.tokens")))

    assert tables((texts,), TEXT, tokenizer) == tables((texts,), TEXT, tokenizer) == 1
    assert tables((chats,), CHAT, tokenizer) == 2
    assert tables((texts, texts), TEXT, tokenizer) == 3
    other = train_bpe((row["text"] for row in TEXTS), 270)
    assert tables((texts,), TEXT, other) == 4
    other.chat_template = tokenizer.chat_template + " "
    assert tables((texts,), TEXT, other) == 5
    texts.write_bytes(texts.read_bytes().replace(b"cat", b"dog"))
    assert tables((texts,), TEXT, tokenizer) == 6
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert tables((texts,), TEXT, tokenizer) == 7


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "fails", [(cache.zlib, "crc32"), (files.os, "fsync"), (files.os, "replace")], ids=str
)
def test_an_interrupted_write_leaves_no_table_and_no_process(
    make, texts, tmp_path, monkeypatch, small_blocks, fails, workers
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*fails, interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:  # its traceback keeps every variable alive
            make(texts, workers=workers)
        assert caught and multiprocessing.active_children() == []
    assert written(tmp_path / "cache") == {}
    assert len(make(texts).lengths) == len(TEXTS)


def cut(content, _):
    return content[:-7]


def without_a_row(content, _):
    return content[: -cache.ROW.itemsize]


def emptied(content, _):
    return b""


def another_list(content, _):
    return b"[]"


def flipped(content, rng):
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def noisy(content, rng):
    at = rng.randrange(len(content) - 4)
    noise = bytes(byte ^ rng.randrange(1, 256) for byte in content[at : at + 4])
    return content[:at] + noise + content[at + 4 :]


@pytest.mark.parametrize("suffix", [".json", ".rows", ".tokens"])
def test_a_damaged_cache_is_made_again(make, texts, tmp_path, small_blocks, capsys, suffix):
    before = rows_of(make(texts))
    (part,) = (tmp_path / "cache").glob(f"text-*{suffix}")
    whole, rng = part.read_bytes(), random.Random(1)
    for damage in (cut, without_a_row, emptied, another_list, *[flipped] * 8, *[noisy] * 4):
        part.write_bytes(damage(whole, rng))
        capsys.readouterr()
        assert rows_of(make(texts)) == before
        assert capsys.readouterr().out.endswith("is damaged or unfinished: it is made again\n")
        assert part.read_bytes() == whole
    part.unlink()
    assert rows_of(make(texts)) == before and part.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_one_sentence(make, texts, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
            make(texts)
    assert written(tmp_path / "cache") == {}
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"cannot write .*cache"):
        make(texts)


# Bad rows


def test_bad_rows_stop_the_run_or_are_skipped_and_are_remembered(make, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": 3}, {"text": "b"}, {"tekst": "c"}])
    for name in ("a.jsonl", "renamed.jsonl"):  # then from the cache, under the name it has now
        path = path.rename(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}:2: .*bad_rows"):
            make(path)
        printed = capsys.readouterr().out
        assert f'{path}:2: "text" is not text but a number\n{path}:4: no "text" among' in printed
        assert len(make(path, bad_rows="skip").lengths) == 2
        assert "bad rows skipped: 2" in capsys.readouterr().out
    assert len(written(tmp_path / "cache")) == 3


def test_many_bad_rows_are_counted_and_the_first_are_shown(make, tmp_path, small_blocks, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": n} for n in range(500)])
    with pytest.raises(UserError, match=r"500 .*a\.jsonl:1: "):
        make(path)
    *shown, more = capsys.readouterr().out.splitlines()
    assert [int(line.split(":")[-2]) for line in shown] == list(range(1, 21)) and more == "..."


@pytest.mark.parametrize("content", ["", "\n\n", "[]", '{"text": ""}\n'])
def test_a_file_without_a_usable_row_is_one_sentence(make, tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    for _ in range(2):  # also when the cache answers
        with pytest.raises(UserError, match=r"a\.jsonl$"):
            make(path, bad_rows="skip")


def test_a_missing_file_is_one_sentence(make, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl "):
        make(tmp_path / "nowhere.jsonl")


# The split


def test_duplicates_land_on_one_side_whatever_the_order(tokenizer, make, tmp_path, texts):
    many = TEXTS * 3 + [{"text": row["text"], "source": "copy"} for row in TEXTS]
    RNG.shuffle(many)
    sides = []
    for path in (texts, write(tmp_path / "shuffled.jsonl", many)):
        table = make(path)
        train, val = split_rows(table, 0.2)
        sizes = [len(part.lengths) for part in (train, val)]
        assert sum(sizes) == len(table.lengths) and all(sizes)
        sides.append([set(decoded(tokenizer, side)) for side in (train, val)])
    assert sides[0] == sides[1] and not sides[0][0] & sides[0][1]


def test_the_split_takes_its_share_and_at_least_one_row(make, tmp_path):
    table = make(write(tmp_path / "many.jsonl", [{"text": f"row {n}"} for n in range(2000)]))
    sizes = {
        ratio: tuple(len(part.lengths) for part in split_rows(table, ratio))
        for ratio in (0.0, 1e-9, 0.02, 0.5)
    }
    assert sizes[0.0] == (2000, 0) and sizes[1e-9] == (1999, 1)
    assert 20 <= sizes[0.02][1] <= 60 and 920 <= sizes[0.5][1] <= 1080
    lone = make(write(tmp_path / "lone.jsonl", [{"text": "the same"}] * 5))
    with pytest.raises(UserError, match=r"0\.02 .*val_ratio"):
        split_rows(lone, 0.02)
    assert len(split_rows(lone, 0.0)[0].lengths) == 5


def test_tables_that_nobody_uses_are_dropped(make, texts, tmp_path, capsys, monkeypatch):
    make(texts)
    folder = tmp_path / "cache"
    first = set(written(folder))

    def second_run(days):
        for name in first:
            os.utime(folder / name, (time.time() - days * 86400,) * 2)
        texts.write_text(f'{{"text": "{days}"}}\n', encoding="utf-8")
        make(texts)
        return first <= set(written(folder)), "deleted" in capsys.readouterr().out

    assert second_run(8) == (True, False)
    monkeypatch.setattr(cache, "FULL_BYTES", 0)
    assert second_run(6) == (True, False)
    assert second_run(8) == (False, True)
    monkeypatch.undo()
    first = set(written(folder))
    assert second_run(31) == (False, True)


def test_the_same_rows_are_held_out_as_ever(make, tmp_path):
    """Bases and skills of earlier releases were judged on them."""
    table = make(write(tmp_path / "many.jsonl", [{"text": f"row {n}"} for n in range(200)]))
    assert split_rows(table, 0.02)[1].chosen.tolist() == [12, 38, 63, 132, 153, 180, 188]


# The command


def test_training_finds_what_was_prepared(tokenizer, texts, tmp_path, capsys, monkeypatch):
    prepare_data.main([str(texts), "--out_dir", str(tmp_path), "--workers", "2"])
    assert capsys.readouterr().out.startswith(f"{len(TEXTS)} text rows, ")
    monkeypatch.setattr(cache, "read_blocks", None)  # whoever tokenises again fails
    data = PretrainDataset((texts,), tokenizer, 64, cache=cache_dir(tmp_path), val_ratio=0.0)
    assert len(data.train.rows.lengths) == len(TEXTS)


def test_chats_are_told_from_texts_and_other_rows_refused(tmp_path, capsys):
    prepare_data.main([str(write(tmp_path / "a.jsonl", CHATS)), "--out_dir", str(tmp_path)])
    assert capsys.readouterr().out.startswith(f"{len(CHATS)} chat rows, ")
    path = write(tmp_path / "b.jsonl", [{"question": "x"}])
    with pytest.raises(UserError, match=r"b\.jsonl"):
        prepare_data.main([str(path), "--out_dir", str(tmp_path)])
