"""The token cache: the same table whoever makes it, whole or absent, and never an old one for a new
file.
"""

import gzip
import hashlib
import json
import multiprocessing
import random
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from conftest import write_rows as write

from core import files
from core.errors import UserError
from core.paths import cache_dir
from dataset import blocks, token_table, tokenized
from dataset.batches import Batches, PretrainDataset
from dataset.chat import encode_chat
from dataset.token_table import TokenRows, open_table
from dataset.tokenized import CHAT, NO_TARGET, TEXT, split_rows, tokenize_files
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
        return tokenize_files((path,), TEXT, tokenizer, tmp_path / "cache", bad_rows, workers)

    return make


def cached(tmp_path):
    return {
        path.name: path.stat().st_mtime_ns
        for path in (tmp_path / "cache").glob("*")
        if path.name != "sha256.json"
    }


def rows_of(table):
    rows, _ = split_rows(table, 0.0)
    return [
        (rows.ids(n).tolist(), rows.learned(n).tolist(), int(rows.lengths[n]))
        for n in range(len(rows))
    ]


# One table, whoever makes it

GOOD_LINES = [json.dumps(row, ensure_ascii=False).encode() for row in TEXTS]
FAULTY_LINES = [
    b"",
    b'{"text": 3}',
    *GOOD_LINES[:25],
    b" ",
    b"oops",
    *GOOD_LINES[25:],
    b'{"tekst": "a"}',
]
FAULTS = [2, 29, 65]
LINES = b"\n".join(FAULTY_LINES) + b"\n"
ARRAY = b"[" + b",\n".join([b'{"text": 3}', *GOOD_LINES, b'{"text": ""}']) + b"]"
FORMATS = {  # content, lines of the bad rows
    "a.jsonl": (LINES, FAULTS),
    "bom_crlf.jsonl": (b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"), FAULTS),
    "a.jsonl.gz": (gzip.compress(LINES), FAULTS),
    "two_frames.jsonl.zst": (
        zstandard.compress(LINES[:999]) + zstandard.compress(LINES[999:]),
        FAULTS,
    ),
    "array.json": (ARRAY, [1, 62]),
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 700)
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 1000)


def tables(folder, paths, kind, tokenizer, workers):
    """The bytes of every table in the cache, made by so many processes."""
    cache = folder / f"cache-{workers}"
    tokenize_files(paths, kind, tokenizer, cache, "skip", workers)
    # The memory of hashes is written for files of some age only: on a slow machine.
    return {path.name: path.read_bytes() for path in cache.glob("*") if path.name != "sha256.json"}


@pytest.mark.parametrize("name", FORMATS)
def test_any_number_of_processes_makes_the_same_table(tokenizer, tmp_path, small_blocks, name):
    content, faults = FORMATS[name]
    path = tmp_path / name
    path.write_bytes(content)
    paths = (path, write(tmp_path / "second.jsonl", [*TEXTS, {"text": []}]))
    alone, helped = (tables(tmp_path, paths, TEXT, tokenizer, workers) for workers in (1, 3))
    assert alone == helped and len(alone) == 2
    (said,) = (json.loads(content) for name, content in alone.items() if name.endswith(".json"))
    shown = said["table"]["facts"]["shown"]
    assert [(file, line) for file, line, _ in shown] == [
        *((0, line) for line in faults),
        (1, len(TEXTS) + 1),
    ]
    table = tokenize_files(paths, TEXT, tokenizer, tmp_path / "cache-1", "skip")
    assert len(table.data.column("ids").chunks) > 5, "several blocks"
    assert [tokenizer.decode(ids) for ids, *_ in rows_of(table)] == [
        f"<|im_start|>{row['text']}<|im_end|>" for row in TEXTS * 2
    ]


def test_processes_that_inherit_nothing_make_the_same_table(tokenizer, tmp_path, small_blocks):
    """As on macOS and Windows."""
    paths = (write(tmp_path / "chats.jsonl", [*CHATS, {"messages": []}]),)
    alone = tables(tmp_path, paths, CHAT, tokenizer, 1)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert tables(tmp_path, paths, CHAT, tokenizer, 2) == alone
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_small_files_start_no_process_and_large_ones_say_what_happens(
    make, texts, monkeypatch, capsys
):
    started = []
    in_order = tokenized.in_order
    monkeypatch.setattr(tokenized, "in_order", lambda *a: started.append(a[-1]) or in_order(*a))
    make(texts)
    assert started == [1] and capsys.readouterr() == ("", "")
    monkeypatch.setattr(tokenized, "SMALL_BYTES", 100)
    monkeypatch.setattr(tokenized, "usable_cores", lambda: 2)
    make(write(texts.with_name("other.jsonl"), TEXTS[1:]))
    printed = capsys.readouterr()
    assert started == [1, 2] and printed.err == ""  # the bar is for terminals
    first, last = printed.out.splitlines()
    assert first.startswith("tokenising other.jsonl: ") and first.endswith(" MB, 2 processes")
    assert last.startswith(f"tokenised {len(TEXTS) - 1} rows in ") and "rows/s" in last


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_packed_files_are_weighed_by_the_text_in_them(make, tmp_path, monkeypatch, capsys, name):
    path = tmp_path / name
    path.write_bytes((gzip if name.endswith("gz") else zstandard).compress(b"\n".join(GOOD_LINES)))
    monkeypatch.setattr(tokenized, "SMALL_BYTES", 2 * path.stat().st_size)
    make(path)
    assert capsys.readouterr().out.startswith(f"tokenising {name}: ")


def test_a_file_that_grows_meanwhile_is_refused(make, texts, tmp_path, monkeypatch):
    read = tokenized.read_blocks

    def grow(path):
        yield from read(path)
        with path.open("a") as file:
            file.write('{"text": "late"}\n')

    monkeypatch.setattr(tokenized, "read_blocks", grow)
    with pytest.raises(UserError, match=r"texts\.jsonl changed while it was read"):
        make(texts)
    assert cached(tmp_path) == {}


def test_processes_that_start_at_once_share_one_table(tokenizer, texts, tmp_path):
    found = []

    def work():
        found.append(rows_of(tokenize_files((texts,), TEXT, tokenizer, tmp_path / "cache")))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        len(found) == 4 and all(rows == found[0] for rows in found) and len(cached(tmp_path)) == 2
    )


# Rows


def test_the_first_target_is_the_first_learned_token_that_something_predicts(
    tokenizer, tmp_path, small_blocks
):
    path = write(tmp_path / "chats.jsonl", CHATS)
    table = tokenize_files((path,), CHAT, tokenizer, tmp_path / "cache")
    rows, _ = split_rows(table, 0.0)
    assert rows.lengths.tolist() == [
        len(encode_chat(tokenizer, row["messages"])[0]) for row in CHATS
    ]
    for n, first in enumerate(rows.first_target):
        flags = rows.learned(n)
        assert first >= 1 and flags[first] and not flags[1:first].any()
    some = TokenRows(table, np.array([7, 3]))
    assert some.first_target.tolist() == rows.first_target[[7, 3]].tolist()


@pytest.mark.parametrize(
    ("learned", "expected"), [([True, False], NO_TARGET), ([False] * 3, NO_TARGET), ([1, 1], 1)]
)
def test_the_very_first_token_is_no_target(learned, expected):
    assert tokenized._first_target(learned) == expected and expected > 0


def test_a_table_of_many_parts_is_read_as_one(make, tokenizer, texts, small_blocks):
    rows, _ = split_rows(make(texts), 0.0)
    copied = TokenRows.__new__(TokenRows)
    copied.__setstate__(rows.__getstate__())
    for n in range(len(TEXTS)):
        for some in (rows, copied):
            assert tokenizer.decode(some.ids(n)) == f"<|im_start|>{TEXTS[n]['text']}<|im_end|>"
            assert some.learned(n).tolist() == [False, *[True] * (some.lengths[n] - 1)]


def test_some_of_a_row_is_cut_out_of_the_whole(make, texts, small_blocks):
    rows, _ = split_rows(make(texts), 0.0)
    for read in (rows.ids, rows.learned):
        for cut in ((0, 1), (2, 5), (1, 10**6), (3,)):
            assert (
                read(20, *cut).tolist() == read(20).tolist()[slice(*cut, *[None] * (2 - len(cut)))]
            )


def test_a_window_reads_no_more_of_a_document_than_itself(make, tokenizer, tmp_path, monkeypatch):
    book = write(tmp_path / "book.jsonl", [{"text": "a cat sat " * 500}, *TEXTS])
    samples = PretrainDataset((book,), tokenizer, 16, cache=tmp_path / "cache", val_ratio=0.0).train
    read = []
    for name in ("ids", "learned"):
        method = getattr(TokenRows, name)
        monkeypatch.setattr(TokenRows, name, lambda *a, m=method: read.append(m(*a)) or read[-1])
    assert len(samples) > 100
    for n in range(len(samples)):
        read.clear()
        ids, learned = samples[n]
        assert len(ids) == len(learned) == samples.lengths[n]
        assert sum(map(len, read)) == 2 * samples.lengths[n]


# Whole or absent


def test_the_second_call_reads_the_cache(make, texts, tmp_path, monkeypatch):
    first = rows_of(make(texts))
    before = cached(tmp_path)
    moved = texts.rename(tmp_path / "another name.jsonl")
    monkeypatch.setattr(tokenized, "read_blocks", None)  # whoever tokenises again fails
    assert rows_of(make(moved)) == first
    assert cached(tmp_path) == before and len(before) == 2


def test_a_warm_start_hashes_no_data(make, texts, monkeypatch):
    now = files.time.time_ns
    monkeypatch.setattr(files.time, "time_ns", lambda: now() + HOUR_NS)  # later
    rows = rows_of(make(texts))
    opened = []
    open_path = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *a, **k: opened.append(path.name) or open_path(path, *a, **k)
    )
    assert rows_of(make(texts)) == rows and "texts.jsonl" not in opened


def test_whatever_changes_the_tokens_makes_a_new_table(tokenizer, texts, tmp_path, monkeypatch):
    cache, chats = tmp_path / "cache", write(tmp_path / "chats.jsonl", CHATS)

    def tables(*settings):
        tokenize_files(*settings, cache)
        return len(list(cache.glob("*.arrow")))

    assert tables((texts,), TEXT, tokenizer) == tables((texts,), TEXT, tokenizer) == 1
    assert tables((chats,), CHAT, tokenizer) == 2
    assert tables((texts, texts), TEXT, tokenizer) == 3
    other = train_bpe((row["text"] for row in TEXTS), 270)
    assert tables((texts,), TEXT, other) == 4
    other.chat_template = tokenizer.chat_template + " "
    assert tables((texts,), TEXT, other) == 5
    texts.write_bytes(texts.read_bytes().replace(b"cat", b"dog"))
    assert tables((texts,), TEXT, tokenizer) == 6
    monkeypatch.setattr(tokenized, "FORMAT", tokenized.FORMAT + 1)
    assert tables((texts,), TEXT, tokenizer) == 7


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("fails", ["block", "atomic_write", "replace"])
def test_an_interrupted_write_leaves_no_table_and_no_process(
    make, texts, tmp_path, monkeypatch, small_blocks, fails, workers
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if fails == "block":
            patch.setattr(tokenized.BadRows, "add", interrupt)  # while parts are coming in
        else:
            patch.setattr(
                *{"atomic_write": (tokenized, fails), "replace": (files.os, fails)}[fails],
                interrupt,
            )
        with pytest.raises(KeyboardInterrupt) as caught:  # its traceback keeps every variable alive
            make(texts, workers=workers)
        assert caught and multiprocessing.active_children() == []
    assert cached(tmp_path) == {}
    assert len(make(texts)) == len(TEXTS)


def damage(table, how, rng=None):
    said = table.with_suffix(".json")
    content = table.read_bytes()
    if how == "cut":
        table.write_bytes(content[:200])
    elif how == "a part less":  # still a legal stream
        batches = list(pa.ipc.open_stream(content))
        with pa.ipc.new_stream(str(table), batches[0].schema) as writer:
            for batch in batches[:-1]:
                writer.write_batch(batch)
    elif how == "a row too long":
        (ends, *_) = (
            batch.column("ids").offsets.to_numpy() for batch in pa.ipc.open_stream(content)
        )
        too_long = ends.copy()
        too_long[-1] += 10**6
        table.write_bytes(content.replace(ends.tobytes(), too_long.tobytes()))
    elif how == "empty":
        table.write_bytes(b"")
    elif how == "no list":
        said.unlink()
    elif how == "another list":
        said.write_text("[]")
    elif how == "broken list":
        said.write_text("[[")
    elif how == "noise":
        at = rng.randrange(len(content))
        table.write_bytes(content[:at] + bytes(rng.choices(range(256), k=4)) + content[at + 4 :])
    else:
        content = (said if how == "a bit of the list" else table).read_bytes()
        at = rng.randrange(len(content))
        flipped = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        (said if how == "a bit of the list" else table).write_bytes(flipped)


@pytest.mark.parametrize(
    "how",
    ["cut", "a part less", "a row too long", "empty", "no list", "another list", "broken list"],
)
def test_a_damaged_cache_is_made_again(make, texts, tmp_path, small_blocks, capsys, how):
    before = rows_of(make(texts))
    (table,) = (tmp_path / "cache").glob("*.arrow")
    damage(table, how)
    capsys.readouterr()
    assert rows_of(make(texts)) == before
    assert (
        capsys.readouterr().out
        == f"the token cache {table} is damaged or unfinished: it is made again\n"
    )


@pytest.mark.parametrize("how", ["noise", "a bit of the table", "a bit of the list"])
@pytest.mark.parametrize("size", ["small", "large"])
def test_no_damage_passes_or_ends_the_process(
    make, texts, tmp_path, monkeypatch, small_blocks, how, size
):
    before = rows_of(make(texts))
    (table,) = (tmp_path / "cache").glob("*.arrow")
    said = table.with_suffix(".json")
    files, rng = {path: path.read_bytes() for path in (table, said)}, random.Random(1)
    monkeypatch.setattr(token_table, "CHECKED_AT_START", 1 << 29 if size == "small" else 0)
    told = 0
    for _ in range(150):
        damage(table, how, rng)
        try:
            opened = open_table(table)
            sound = (
                opened is not None and rows_of(opened[0]) == before
            )  # what lies between the parts does no harm
            told += opened is None
            assert sound or opened is None
        except UserError:
            assert size == "large" and not said.exists()
            told += 1
        for path, content in files.items():
            path.write_bytes(content)
    assert told > 120


def test_a_table_of_another_type_of_ids_is_not_the_same(make, texts, tmp_path):
    make(texts)
    (table,) = (tmp_path / "cache").glob("*.arrow")
    content, kind = table.read_bytes(), open_table(table)[0].data.schema
    signed = [
        field if field.name != "ids" else pa.field("ids", pa.list_(pa.int16())) for field in kind
    ]
    for n, schema in enumerate((kind, pa.schema(signed))):
        head, other = (one.remove_metadata().serialize().to_pybytes() for one in (kind, schema))
        assert content.startswith(head) and n == (head != other)
        table.write_bytes(content.replace(head, other.ljust(len(head), b"\0")))
        assert (open_table(table) is None) == n


@pytest.fixture
def harmed_later(make, texts, tmp_path, monkeypatch, small_blocks):
    """The rows of a large table before and after a bit of its last ids has flipped; it was not
    noticed at the start.
    """
    monkeypatch.setattr(token_table, "CHECKED_AT_START", 0)
    before = rows_of(make(texts))
    (table,) = (tmp_path / "cache").glob("*.arrow")
    (*_, ids) = (
        batch.column("ids").buffers()[3].to_pybytes()
        for batch in pa.ipc.open_stream(table.read_bytes())
    )
    table.write_bytes(table.read_bytes().replace(ids, ids[:-1] + bytes([ids[-1] ^ 1])))
    return before, make(texts)


def test_a_large_table_is_checked_before_a_part_is_used(make, texts, harmed_later, capsys):
    before, table = harmed_later
    rows, _ = split_rows(table, 0.0)
    assert capsys.readouterr().out == ""
    assert rows.ids(0).tolist() == before[0][0], "another part"
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"the token cache .*\.arrow is damaged; start again, with --resume"
        ):
            rows.ids(len(rows) - 1)
    with pytest.raises(UserError, match="is damaged"):
        split_rows(table, 0.0)
    assert rows_of(make(texts)) == before
    assert "is damaged or unfinished: it is made again" in capsys.readouterr().out


def test_a_loader_s_process_finds_the_damage_too(tokenizer, texts, tmp_path, harmed_later):
    data = PretrainDataset((texts,), tokenizer, 16, cache=tmp_path / "cache", val_ratio=0.0)
    with pytest.raises(
        UserError, match=r"^the token cache .* is damaged"
    ):  # not in the words of the loader
        list(Batches(data.train, 4, 1, seed=0, num_workers=1).steps(0))
    assert multiprocessing.active_children() == []


def test_a_cache_that_cannot_be_written_is_one_sentence(make, texts, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot write .*: No space left on device; make room"):
            make(texts)
    assert cached(tmp_path) == {}
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"cannot write .*choose another folder"):
        make(texts)


# Bad rows


def test_bad_rows_stop_the_run_or_are_skipped_and_are_remembered(make, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": 3}, {"text": "b"}, {"tekst": "c"}])
    for name in (
        "a.jsonl",
        "renamed.jsonl",
    ):  # the second time from the cache, and under the name it has now
        path = path.rename(tmp_path / name)
        with pytest.raises(
            UserError, match=rf"2 bad rows, the first .*{name}:2: \"text\" is not text but int; "
        ):
            make(path)
        printed = capsys.readouterr().out
        assert f'{path}:2: "text" is not text but int\n{path}:4: no "text" among' in printed
        assert len(make(path, bad_rows="skip")) == 2
        assert "bad rows skipped: 2" in capsys.readouterr().out
    assert len(cached(tmp_path)) == 2


def test_many_bad_rows_are_counted_and_the_first_are_shown(make, tmp_path, small_blocks, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": n} for n in range(500)])
    with pytest.raises(UserError, match=r"500 bad rows, the first .*a\.jsonl:1: "):
        make(path)
    *shown, more = capsys.readouterr().out.splitlines()
    assert [line.split(":")[-2] for line in shown] == [
        str(n) for n in range(1, 21)
    ] and more == "..."


@pytest.mark.parametrize("content", ["", "\n\n", "[]", '{"text": ""}\n'])
def test_a_file_without_a_usable_row_is_one_sentence(make, tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    for _ in range(2):  # also when the cache answers
        with pytest.raises(UserError, match=r"no usable row in .*a\.jsonl"):
            make(path, bad_rows="skip")


def test_a_missing_file_is_one_sentence(make, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist"):
        make(tmp_path / "nowhere.jsonl")


def test_a_data_file_is_only_read(tokenizer, texts, tmp_path):
    before = hashlib.sha256(texts.read_bytes()).hexdigest(), Path(texts).stat().st_mtime_ns
    PretrainDataset((texts,), tokenizer, 64, cache=tmp_path / "cache")
    assert before == (
        hashlib.sha256(texts.read_bytes()).hexdigest(),
        Path(texts).stat().st_mtime_ns,
    )


# The command


def test_training_finds_what_was_prepared(tokenizer, texts, tmp_path, capsys, monkeypatch):
    prepare_data.main([str(texts), "--out_dir", str(tmp_path), "--workers", "2"])
    assert capsys.readouterr().out.startswith(f"{len(TEXTS)} text rows, ")
    monkeypatch.setattr(tokenized, "read_blocks", None)  # whoever tokenises again fails
    assert (
        len(
            PretrainDataset(
                (texts,), tokenizer, 64, cache=cache_dir(tmp_path), val_ratio=0.0
            ).train.rows
        )
        == 60
    )


def test_chats_are_told_from_texts_and_other_rows_refused(tmp_path, capsys):
    prepare_data.main([str(write(tmp_path / "a.jsonl", CHATS)), "--out_dir", str(tmp_path)])
    assert capsys.readouterr().out.startswith(f"{len(CHATS)} chat rows, ")
    with pytest.raises(UserError, match=r"no usable row in .*b\.jsonl"):
        prepare_data.main(
            [str(write(tmp_path / "b.jsonl", [{"question": "x"}])), "--out_dir", str(tmp_path)]
        )
