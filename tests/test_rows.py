"""Data files become clean rows, and every row that cannot is named by its line and a reason."""

import codecs
import gzip
import json
import random
import tracemalloc

import pytest
import zstandard

from core.errors import UserError
from dataset import rows
from dataset.rows import (
    BadRow,
    clean_any,
    clean_chat,
    clean_text,
    read_blocks,
    read_rows,
    read_texts,
)

CHAT = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hello 👋"}]
SYSTEM = {"role": "system", "content": "Be brief."}
TEXTS = [{"text": f"row {n} 第{n}行\nwith  spaces "} for n in range(5)]


def write(path, *rows):
    """A JSON-lines file; a row is an object, a line as it stands, or its bytes."""
    lines = [
        row if isinstance(row, str | bytes) else json.dumps(row, ensure_ascii=False) for row in rows
    ]
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    )
    return path


def rows_of(path, clean=clean_any):
    return [row for _, row in read_rows(path, clean)]


def bad_rows(path, clean=clean_any):
    return {line: str(row) for line, row in read_rows(path, clean) if isinstance(row, BadRow)}


def json_lines(rows):
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


FORMATS = {
    "a.jsonl": json_lines(TEXTS),
    "a.json": json.dumps(TEXTS, indent=2).encode(),
    "array.jsonl": json.dumps(TEXTS, ensure_ascii=False).encode(),
    "lines.json": json_lines(TEXTS),
    "bom.jsonl": codecs.BOM_UTF8 + json_lines(TEXTS),
    "bom_array.json": codecs.BOM_UTF8 + b"\n \n" + json.dumps(TEXTS).encode(),
    "crlf.jsonl": json_lines(TEXTS).replace(b"\n", b"\r\n"),
    "blank_lines.jsonl": b"\n\n" + json_lines(TEXTS).replace(b"\n", b"\n \n"),
    "no_last_newline.jsonl": json_lines(TEXTS).rstrip(),
    "a.jsonl.gz": gzip.compress(json_lines(TEXTS)),
    "bom.json.gz": gzip.compress(codecs.BOM_UTF8 + json.dumps(TEXTS).encode()),
    "two_members.jsonl.gz": gzip.compress(json_lines(TEXTS[:2]))
    + gzip.compress(json_lines(TEXTS[2:])),
    "a.jsonl.zst": zstandard.compress(json_lines(TEXTS)),
    "a.json.zst": zstandard.compress(json.dumps(TEXTS, indent=1).encode()),
    "two_frames.jsonl.zst": zstandard.compress(json_lines(TEXTS[:2]))
    + zstandard.compress(json_lines(TEXTS[2:])),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_file_format_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FORMATS[name])
    assert rows_of(path) == TEXTS


@pytest.mark.parametrize("size", [1, 2, 5, 64])
@pytest.mark.parametrize("name", FORMATS)
def test_however_little_is_read_at_once_the_rows_are_the_same(tmp_path, monkeypatch, name, size):
    monkeypatch.setattr(rows, "CHUNK_BYTES", size)
    monkeypatch.setattr(rows, "BLOCK_BYTES", size)
    path = tmp_path / name
    path.write_bytes(FORMATS[name])
    assert rows_of(path) == TEXTS
    assert sum(block.read for block in read_blocks(path)) == path.stat().st_size


@pytest.mark.parametrize("size", [1, 1 << 21])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_a_table_gives_a_row_for_each_line_below_its_header(tmp_path, monkeypatch, pack, size):
    monkeypatch.setattr(rows, "BLOCK_BYTES", size)
    suffix = {bytes: "", gzip.compress: ".gz", zstandard.compress: ".zst"}[pack]
    lines = ["id\ttext", '1\t"quoted', "", "2\tb\u2028c\\", "3", "4\t ", "5\te", "", ""]
    path = tmp_path / f"a.tsv{suffix}"
    path.write_bytes(pack(codecs.BOM_UTF8 + "\r\n".join(lines).encode()))
    good = [row for row in rows_of(path) if not isinstance(row, BadRow)]
    assert good == [{"text": text} for text in ('"quoted', "b\u2028c\\", "e")]
    found = {5: "1 columns, the header has 2", 6: '"text" is empty'}
    assert bad_rows(path) == found
    assert sum(block.read for block in read_blocks(path)) == path.stat().st_size


def test_neither_a_long_line_nor_a_long_array_is_held_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        "[" + ", ".join(['{"text": "' + "x" * 1000 + '"}'] * 20_000) + "]", encoding="utf-8"
    )
    tracemalloc.start()
    assert sum(len(block.rows) for block in read_blocks(path)) == 20_000
    assert tracemalloc.get_traced_memory()[1] < 8e6 < path.stat().st_size
    tracemalloc.stop()


def test_lines_are_counted_in_the_file_not_among_the_rows(tmp_path):
    lines = write(tmp_path / "a.jsonl", "", {"text": "a"}, " ", {"text": "b"})
    assert [line for line, _ in read_rows(lines, clean_text)] == [2, 4]
    array = tmp_path / "a.json"
    array.write_text('\n[\n{"text": "a"}, {"text":\n "b"},\n\n{"text": "c"}\n]', encoding="utf-8")
    assert [line for line, _ in read_rows(array, clean_text)] == [3, 3, 6]


@pytest.mark.parametrize(
    "content", ["a\u2028b\u0085c\x0bd", "\ufeffa", "\u200b\ufe0f x", "\x00\x1b"]
)
def test_only_newlines_end_a_line_and_contents_come_back_exactly(tmp_path, content):
    row = {"text": content}
    assert rows_of(write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False), row)) == [
        row,
        row,
    ]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversations": CHAT}, CHAT),
        ({"messages": CHAT, "id": 7}, CHAT),
        ({"conversations": [SYSTEM, *CHAT, *CHAT]}, [SYSTEM, *CHAT, *CHAT]),
        ({"messages": [{**message, "name": "x"} for message in CHAT]}, CHAT),
        ({"instruction": "你好", "input": "", "output": "Hello 👋"}, CHAT),
        ({"instruction": "你好", "output": "Hello 👋", "input": None}, CHAT),
        ({"instruction": "你好", "output": "Hello 👋", "system": "Be brief."}, [SYSTEM, *CHAT]),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            [("user", "Add\n1 2"), ("assistant", "3")],
        ),
    ],
)
def test_the_three_chat_formats(row, messages):
    expected = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages]
    assert clean_chat(row) == {"conversations": expected}


def test_contents_are_never_trimmed():
    messages = [{"role": "user", "content": "  a\n"}, {"role": "assistant", "content": "\n b  "}]
    assert clean_chat({"messages": messages}) == {"conversations": messages}


def chat(*roles):
    return {"conversations": [{"role": role, "content": "x"} for role in roles]}


FAULTS = [  # a line, the reason in it
    (chat("assistant"), "message 1 is an answer to no question"),
    (chat("system", "assistant"), "message 2 is an answer to no question"),
    (chat("user"), "the conversation does not end with an assistant turn"),
    (chat("user", "assistant", "user"), "the conversation does not end with an assistant turn"),
    (chat("user", "user", "assistant"), "messages 1 and 2 are both from user"),
    (chat("user", "assistant", "assistant"), "messages 2 and 3 are both from assistant"),
    (chat("user", "system", "assistant"), "message 2 is a system turn, which may only come first"),
    (chat("user", "tool"), "message 2 has role 'tool', not one of system, user, assistant"),
    (chat("user", ["assistant"]), "message 2 has role ['assistant'], not one of"),
    ({"conversations": []}, "the conversation is not a list of messages"),
    ({"messages": {"role": "user"}}, "the conversation is not a list of messages"),
    ({"messages": ["hello", "hi"]}, 'message 1 is not an object with "role" and "content"'),
    (
        {"messages": [{"from": "human", "value": "x"}]},
        'message 1 is not an object with "role" and "content"',
    ),
    (
        {"messages": [CHAT[0], {"role": "assistant", "content": None}]},
        "message 2 is not text but NoneType",
    ),
    ({"messages": [CHAT[0], {"role": "assistant", "content": " \n"}]}, "message 2 is empty"),
    ({"messages": [{"role": "user", "content": ["x"]}, CHAT[1]]}, "message 1 is not text but list"),
    ({"instruction": "", "output": "x"}, '"instruction" is empty'),
    ({"instruction": "a", "input": 3, "output": "x"}, '"input" is not text but int'),
    ({"instruction": "a", "output": ""}, "message 2 is empty"),
    (
        {"instruction": "a"},
        'no "conversations", "messages" or "instruction" with "output" among its keys',
    ),
    ({}, "among its keys (none)"),
    ({"text": ""}, '"text" is empty'),
    ({"text": "\u3000\t"}, '"text" is empty'),
    ({"text": 3}, '"text" is not text but int'),
    ('{"text": "\\ud83d"}', '"text" holds half of a surrogate pair'),
    (
        '{"messages": [{"role": "user", "content": "\\ude00"}]}',
        "message 1 holds half of a surrogate pair",
    ),
    ('{"text": "a", "text": "b"}', "a key appears twice"),
    (
        '{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}',
        "a key appears twice",
    ),
    ('{"text": "a"', "invalid JSON at column 13"),
    ('{"text": "a"} {"text": "b"}', "invalid JSON at column 15: Extra data"),
    ("{'text': 'a'}", "invalid JSON at column 2"),
    ("text", "invalid JSON at column 1"),
    ('{"text": "a", "id": ' + "1" * 5000 + "}", "invalid JSON: Exceeds the limit"),
    ("[" * 100_000, "invalid JSON"),
    ('["text"]', "a row must be a JSON object, not list"),
    ("null", "a row must be a JSON object, not NoneType"),
    ('"text"', "a row must be a JSON object, not str"),
    (b'{"text": "caf\xe9"}', "not UTF-8 at byte 14 of the row (invalid continuation byte)"),
    ('{"text": "你好"}'.encode("gb18030"), "not UTF-8 at byte 11 of the row"),
    ('{"text": "a"}'.encode("utf-16"), "not UTF-8 at byte 1 of the row"),
    ('{"text": "😀"}'.encode()[:-4], "not UTF-8 at byte 11 of the row (unexpected end of data)"),
]


@pytest.mark.parametrize(("row", "reason"), FAULTS, ids=[reason for _, reason in FAULTS])
def test_a_bad_row_is_named_by_its_line_and_reason(tmp_path, row, reason):
    path = write(
        tmp_path / "a.jsonl", {"conversations": CHAT}, {"text": "good"}, row, {"text": "good"}
    )
    found = bad_rows(path)
    assert list(found) == [3] and reason in found[3]
    assert rows_of(path)[-1] == {"text": "good"}


def test_each_kind_refuses_the_other_kind_of_row():
    with pytest.raises(BadRow, match=r"\"text\".*\('conversations'\)"):
        clean_text({"conversations": CHAT})
    with pytest.raises(BadRow, match=r"\"conversations\".*\('text'\)"):
        clean_chat({"text": "a"})


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_planted_faults_among_many_good_rows_are_all_found(tmp_path, ending):
    rng = random.Random(5)
    good = [{"text": f"row {n}"} if n % 2 else {"conversations": CHAT} for n in range(3000)]
    planted = dict(zip(rng.sample(range(1, 3001), len(FAULTS)), FAULTS, strict=True))
    lines = [planted[n][0] if n in planted else row for n, row in enumerate(good, 1)]
    plain = write(tmp_path / "plain.jsonl", *lines).read_bytes()
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[ending]
    path = tmp_path / f"a{ending}"
    path.write_bytes(pack(plain))
    found = bad_rows(path)
    assert sorted(found) == sorted(planted)
    assert all(planted[line][1] in reason for line, reason in found.items())
    assert len(rows_of(path)) == 3000


ARRAYS = [  # a file's content, the reason in each bad line
    ('[\n{"text": "a"},\n{"text": ""},\n{"text": "c"}]', {3: '"text" is empty'}),
    (
        '[\n{"text": "a"},\n{"text": "b", "text": "c"},\n{"text": ""}]',
        {3: "a key appears twice", 4: "is empty"},
    ),
    (
        '[\n{"text": "a"},\n{"text": oops},\n{"text": "c"}]',
        {3: "the rest of the array is unreadable"},
    ),
    ('[\n{"text": "a"},\n\n', {4: "the JSON array is not closed"}),
    ('[\n{"text": "a"},\n{"text": "b', {3: "the rest of the array is unreadable"}),
    ('[{"text": "a"}]\n\n[{"text": "b"}]\n', {3: "text after the end of the JSON array"}),
    ('[\n{"text": "a"},\n"\\ud83d"]', {3: "a row must be a JSON object, not str"}),
    (b'[\n{"text": "a"},\n{"text": "\xe9"}\n]', {3: "not UTF-8"}),
    ("[]", {}),
    ('[\n1, "a", 22, nul]', {2: "the rest of the array is unreadable"}),
    ('[{"text": "a \n b"},\n{"text": "b"}]', {1: "the rest of the array is unreadable"}),
    (
        b'[\n{"text": "\xff"},\n{"text": "b"},\n{"text": "\xe4\xbd"}]',
        {2: "not UTF-8", 4: "not UTF-8"},
    ),
]


@pytest.mark.parametrize("size", [1, 3, 1 << 18])
@pytest.mark.parametrize(("array", "found"), ARRAYS)
def test_bad_rows_of_an_array_are_named_by_their_line(tmp_path, monkeypatch, array, found, size):
    monkeypatch.setattr(rows, "CHUNK_BYTES", size)
    path = tmp_path / "a.json"
    path.write_bytes(array if isinstance(array, bytes) else array.encode())
    actual = bad_rows(path)
    assert actual.keys() == found.keys()
    assert all(reason in actual[line] for line, reason in found.items())


@pytest.mark.parametrize("size", [1, 3])
def test_a_number_is_not_cut_where_reading_paused(tmp_path, monkeypatch, size):
    monkeypatch.setattr(rows, "CHUNK_BYTES", size)
    path = tmp_path / "a.json"
    path.write_text('[12345, -1.5e7, {"text": "a"}]', encoding="utf-8")
    assert [line for block in read_blocks(path) for _, line in block.rows] == [
        b"12345",
        b"-1.5e7",
        b'{"text": "a"}',
    ]


def test_no_line_of_random_damage_escapes(tmp_path):
    rng = random.Random(0)
    good = [
        json.dumps(row, ensure_ascii=False).encode()
        for row in ({"text": "añ😀"}, {"messages": CHAT}, *TEXTS)
    ]
    lines = []
    for _ in range(1500):
        line = bytearray(rng.choice(good))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(line))
            line[at : at + rng.randint(0, 2)] = bytes(rng.choices(range(256), k=rng.randint(0, 2)))
        lines.append(b'{"text": "first"}\n' + bytes(line).replace(b"\n", b" "))
    path = write(tmp_path / "a.jsonl", *lines)
    accepted = [row for row in rows_of(path) if not isinstance(row, BadRow)]
    assert len(accepted) >= 1500 and all(clean_any(row) == row for row in accepted)


NOT_DATA = {
    "missing.jsonl": (None, "does not exist"),
    "a.csv": (b"a,b\n", "unknown ending; use one of .jsonl"),
    "cut.jsonl.gz": (gzip.compress(json_lines(TEXTS * 500))[:-40], "cannot read"),
    "damaged.jsonl.gz": (b"\x1f\x8b\x08" + b"\x00" * 7 + b"\xff" * 50, "cannot read"),
    "plain.jsonl.gz": (json_lines(TEXTS), "cannot read"),
    "cut.jsonl.zst": (
        zstandard.compress(json_lines(TEXTS * 500))[:-40],
        "cannot read",
    ),
    "plain.jsonl.zst": (json_lines(TEXTS), "cannot read"),
}


@pytest.mark.parametrize("name", NOT_DATA)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, name):
    content, reason = NOT_DATA[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        rows_of(path)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_texts_of_either_kind_leave_bad_rows_out(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a"}, "oops", {"conversations": [SYSTEM, *CHAT]})
    assert read_texts(path) == ["a", "Be brief.\n你好\nHello 👋"]
