"""Data files become clean rows, and every row that cannot is named by its line and a reason."""

import codecs
import csv
import gzip
import json
import random
import tracemalloc

import datasets
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from core.errors import UserError
from dataset import files
from dataset.chat import encode_chat
from dataset.files import data_files, read_blocks, read_rows
from dataset.rows import BadRow, clean_any, clean_chat, clean_text, settle_control_text
from dataset.tokenizer import control_spelling

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
    monkeypatch.setattr(files, "CHUNK_BYTES", size)
    monkeypatch.setattr(files, "BLOCK_BYTES", size)
    path = tmp_path / name
    path.write_bytes(FORMATS[name])
    assert rows_of(path) == TEXTS
    assert sum(block.read for block in read_blocks(path)) == path.stat().st_size


WRAPPED = json.dumps({"version": 1, "data": TEXTS}, ensure_ascii=False).encode()
COLUMNS = {"text": [row["text"] for row in TEXTS]}
CELLS = "".join(f'"{row["text"]}"\r\n' for row in TEXTS).encode()
MORE_FORMATS = {
    "A.JSONL": json_lines(TEXTS),
    "a.ndjson": json_lines(TEXTS),
    "packed.jsonl": gzip.compress(json_lines(TEXTS)),
    "packed.json": zstandard.compress(json_lines(TEXTS)),
    "plain.jsonl.gz": json_lines(TEXTS),
    "a.csv": b"text\r\n" + CELLS,
    "bom.CSV": codecs.BOM_UTF8 + b'"text"\n' + CELLS,
    "other.csv": b"id;text\n" + CELLS.replace(b'"row', b'007;"row'),
    "utf16.jsonl": json_lines(TEXTS).decode().encode("utf-16"),
    "utf16.csv": ("text\n" + CELLS.decode()).encode("utf-16"),
    "pretty.jsonl": b"\n".join(json.dumps(row, indent=2).encode() for row in TEXTS),
    "wrapped.json": WRAPPED,
    "pretty_wrapped.json": json.dumps({"a": 1, "rows": TEXTS}, indent=1).encode(),
    "parts.txt": b"\n<|endoftext|>\r\n".join(row["text"].encode() for row in TEXTS),
}


@pytest.mark.parametrize("name", MORE_FORMATS)
def test_more_formats_give_the_same_rows(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(MORE_FORMATS[name])
    assert rows_of(path) == TEXTS
    assert sum(block.read for block in read_blocks(path)) == path.stat().st_size


def test_parquet_and_folders_that_datasets_saved_give_the_same_rows(tmp_path):
    saved = datasets.Dataset.from_dict(COLUMNS | {"id": list(range(5))})
    saved.to_parquet(tmp_path / "a.parquet")
    saved.save_to_disk(tmp_path / "arrow", num_shards=2)
    pyarrow.feather.write_feather(saved.data.table, tmp_path / "a.arrow")
    assert rows_of(tmp_path / "a.arrow") == TEXTS
    chats = datasets.Dataset.from_list([{"messages": [{**turn, "x": None} for turn in CHAT]}])
    chats.to_parquet(tmp_path / "chats.parquet")
    assert rows_of(tmp_path / "a.parquet") == TEXTS
    assert [row for path in data_files([tmp_path / "arrow"]) for row in rows_of(path)] == TEXTS
    assert rows_of(tmp_path / "chats.parquet") == [{"conversations": CHAT}]
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"bytes"]}), tmp_path / "bytes.parquet")
    assert bad_rows(tmp_path / "bytes.parquet") == {"row 1": '"text" is not text but an object'}


def test_a_folder_stands_for_the_data_files_in_it(tmp_path):
    for name in ("b.jsonl", "a.csv", ".hidden.jsonl", "README.md"):
        (tmp_path / name).write_text("", encoding="utf-8")
    assert [path.name for path in data_files([tmp_path])] == ["a.csv", "b.jsonl"]
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match=r"folder .*outer.* inner"):
        data_files([tmp_path / "outer"])


def test_all_cells_of_a_table_are_texts(tmp_path):
    cells = ["007", "None", "NA", "1e5", "true", 'a "quoted", word', "two\nlines", "null"]
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["question", "answer"], *([cell, cell] for cell in cells)])
    assert rows_of(path) == [{"conversations": turns(cell, cell)} for cell in cells]
    for header in ("text,text", "a,,", '"a" b,c'):
        path.write_text(f"{header}\na,b\n", encoding="utf-8")
        assert list(bad_rows(path)) == ["the header"]
    path.write_text('"a,b,c";text\r1;d\r2;e\r', encoding="utf-8", newline="")
    assert rows_of(path) == [{"text": "d"}, {"text": "e"}]
    path.write_text('text,id\n"a,b\nc" d,1\ne,2\n', encoding="utf-8")
    assert "lines 2 to 3" in bad_rows(path)["row 1"] and rows_of(path)[1:] == [{"text": "e"}]
    path.write_text('text\na\n"b\nc\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 3"):
        rows_of(path)
    path.write_text("question,answer\na,b\nc\n\nd,\ne,f\n", encoding="utf-8")
    assert bad_rows(path) == {
        "row 2": "1 columns, the header has 2",
        "row 3": '"answer" is empty',
    }


CHAT_LINE = json.dumps(CHAT, ensure_ascii=False)
CONTAINERS = [  # a file, how many chats, a part of the reasons in its bad rows
    (CHAT_LINE, 1, {}),
    (CHAT_LINE + "\n\n" + CHAT_LINE + "\n", 2, {}),
    (json.dumps(CHAT, indent=1) + "\n" + json.dumps(CHAT, indent=1), 2, {}),
    (f"[{CHAT_LINE},\n{CHAT_LINE}]", 2, {}),
    (json.dumps({"messages": CHAT}, indent=1), 1, {}),
    (json.dumps({"data": [CHAT, {"messages": CHAT}]}), 2, {}),
    (json.dumps(COLUMNS), 0, {1: 'one JSON object with lists, "text" (5 items)'}),
    (json.dumps({"train": [CHAT], "test": [CHAT]}), 0, {1: '"train" (1 items), "test" (1 items)'}),
    (json.dumps({"chosen": CHAT, "rejected": CHAT}), 0, {1: "a preference row"}),
    ('{"text": "a"\n{"messages": ' + CHAT_LINE + "}", 1, {1: "invalid JSON at column 13"}),
    ('{\n"messages": ' + CHAT_LINE + "}\n{\noops\n}", 1, {3: "rest of the file is unreadable"}),
    ('{"text":\n{"messages": ' + CHAT_LINE + "}", 1, {1: "invalid JSON"}),
    (json.dumps({"messages": CHAT, "meta": [{"source": "x"}]}), 1, {}),
    (json.dumps({"dialogue": CHAT}), 0, {1: 'the nearest one has "dialog"'}),
    (json.dumps({"system": "a", "data": [CHAT]}), 0, {1: "one JSON object with lists"}),
    ('{"text": oops}\n{\n', 0, {1: "invalid JSON", 2: "invalid JSON"}),
]


@pytest.mark.parametrize(("text", "count", "reasons"), CONTAINERS)
def test_what_can_mean_one_thing_is_read_and_else_told(tmp_path, text, count, reasons):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    found = bad_rows(path)
    assert found.keys() == reasons.keys()
    assert all(reasons[place] in found[place] for place in found)
    assert [row for row in rows_of(path) if isinstance(row, dict)] == [
        {"conversations": CHAT}
    ] * count


@pytest.mark.parametrize("way", ["keep", "drop", "refuse"])
def test_control_tokens_that_a_text_spells_are_counted_and_settled(tokenizer, way):
    texts = ["<|im_start|>a<|im_end|> b", "plain", "<|im_<|im_end|>end|>c", "<|endoftext|>"]
    cleaned = [(n, {"text": text}) for n, text in enumerate(texts)]
    settled, spelled = settle_control_text(cleaned, control_spelling(tokenizer), way)
    texts = {
        "keep": texts,
        "drop": ["a b", "plain", "c", None],
        "refuse": [None, "plain", None, None],
    }[way]
    assert spelled == 3
    assert [None if isinstance(row, BadRow) else row["text"] for _, row in settled] == texts


@pytest.mark.parametrize("size", [1, 1 << 21])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_a_table_gives_a_row_for_each_line_below_its_header(tmp_path, monkeypatch, pack, size):
    monkeypatch.setattr(files, "BLOCK_BYTES", size)
    suffix = {bytes: "", gzip.compress: ".gz", zstandard.compress: ".zst"}[pack]
    lines = ["id\ttext", '1\t"quoted', "", "2\tb\u2028c\\", "3", "4\t ", "5\te", "", ""]
    path = tmp_path / f"a.tsv{suffix}"
    path.write_bytes(pack(codecs.BOM_UTF8 + "\r\n".join(lines).encode()))
    good = [row for row in rows_of(path) if not isinstance(row, BadRow)]
    assert good == [{"text": text} for text in ('"quoted', "b\u2028c\\", "e")]
    found = {"row 3": "1 columns, the header has 2", "row 4": '"text" is empty'}
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


def turns(*contents, system=None):
    """Questions and answers in turn; an answer in a list is context only."""
    chat = [{"role": "system", "content": system}] if system else []
    for n, text in enumerate(contents):
        off = {"learned": False} if isinstance(text, list) else {}
        role = "assistant" if n % 2 else "user"
        chat.append({"role": role, "content": "".join(text), **off})
    return chat


def marked(key, off, on):
    roles = ("user", "assistant") * 2
    chat = [{"role": role, "content": f"{n}"} for n, role in enumerate(roles)]
    chat[1][key], chat[3][key] = off, on
    return {"messages": chat}


HUMAN = [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "Hello 👋"}]
PARTS = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "👋"}]
STYLES = [  # a row, the chat that it means
    *(({key: CHAT}, CHAT) for key in ("conversations", "messages", "conversation", "dialog")),
    (CHAT, CHAT),
    ({"messages": CHAT, "id": 7, "conversations": None, "text": None, "history": []}, CHAT),
    ({"messages": CHAT, "prompt": "你好", "response": "beside it"}, CHAT),
    ({"conversations": [SYSTEM, *CHAT, *CHAT]}, [SYSTEM, *CHAT, *CHAT]),
    ({"messages": [{**message, "name": "x"} for message in CHAT]}, CHAT),
    ({"conversations": HUMAN}, CHAT),
    ({"system": "Be brief.", "conversations": HUMAN}, [SYSTEM, *CHAT]),
    ({"system_prompt": "Be brief.", "messages": [SYSTEM, *CHAT]}, [SYSTEM, *CHAT]),
    ({"system": "", "system_prompt": None, "messages": CHAT}, CHAT),
    *(
        ({"messages": [{"role": role, "content": text}, *CHAT]}, then)
        for role, text, then in [
            ("system", "", CHAT),
            ("System", None, CHAT),
            ("developer", "Be brief.", [SYSTEM, *CHAT]),
        ]
    ),
    *(
        ({"messages": [{"role": "USER", "content": "你好"}, {"role": r, "content": PARTS}]}, CHAT)
        for r in ("Assistant", "gpt", "bot", "Model", "ChatGPT")
    ),
    ({"messages": [{"role": None, "from": "user", "value": "你好"}, CHAT[1]]}, CHAT),
    ({"instruction": "你好", "input": "", "output": "Hello 👋"}, CHAT),
    ({"instruction": "", "input": "你好", "output": "Hello 👋"}, CHAT),
    ({"instruction": "你好", "output": "Hello 👋", "input": None}, CHAT),
    ({"instruction": "你好", "output": "Hello 👋", "system": "Be brief."}, [SYSTEM, *CHAT]),
    ({"instruction": "Add", "input": "1 2", "output": "3"}, turns("Add\n1 2", "3")),
    (
        {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"},
        turns("a", "b", "c", "d", system="s"),
    ),
    ({"query": "c", "response": "d", "history": []}, turns("c", "d")),
    *(
        ({question: "你好", answer: "Hello 👋", "source": "x"}, CHAT)
        for question in ("prompt", "query", "question", "q", "input", "instruction")
        for answer in ("response", "answer", "a", "output", "completion", "target")
    ),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, CHAT),
    ({"prompt": [SYSTEM, CHAT[0]], "completion": "Hello 👋"}, [SYSTEM, *CHAT]),
    ({"prompt": PARTS, "response": "d"}, turns("Hello 👋", "d")),
    ({"instruction": "a", "context": "b", "response": "c"}, turns("a\nb", "c")),
    ({"query": "c", "response": "d", "history": "", "context": ""}, turns("c", "d")),
    *(
        (marked(key, off, on), turns("0", ["1"], "2", "3"))
        for key, off, on in [
            *[("weight", 0, 1), ("weight", 0.0, 1.0), ("loss", 0, None), ("loss", False, True)],
            *[("train", False, True), ("masked", True, False), ("masked", 1, 0)],
        ]
    ),
    (
        {"tools": [], "messages": [{**CHAT[0], "tool_calls": None}, {**CHAT[1], "reasoning": ""}]},
        CHAT,
    ),
]


@pytest.mark.parametrize(("row", "messages"), STYLES)
def test_each_style_of_chat_is_read_as_meant(tmp_path, row, messages):
    assert rows_of(write(tmp_path / "a.jsonl", row)) == [{"conversations": messages}]


def test_an_answer_that_is_context_only_is_not_learned(tokenizer):
    (_, chat) = next(pair for pair in STYLES if {"learned": False}.items() <= pair[1][1].items())
    plain = [{"role": turn["role"], "content": turn["content"]} for turn in chat]
    ids, learned = encode_chat(tokenizer, chat)
    all_ids, all_learned = encode_chat(tokenizer, plain)
    assert ids == all_ids
    first = [n for n, flag in enumerate(all_learned) if flag][:2]  # "1" and its end
    assert [n for n in range(len(ids)) if learned[n] != all_learned[n]] == first


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
    (chat("user", "tool"), "message 2 is a tool turn, which is not learned here"),
    (chat("user", "narrator"), "message 2 has \"role\" 'narrator', none of system, developer"),
    (chat("user", ["assistant"]), "message 2 has \"role\" ['assistant'], none of"),
    ({"conversations": []}, "the conversation is an empty list"),
    ({"messages": {"role": "user"}}, "the conversation is not a list but an object"),
    ({"messages": ["hello", "hi"]}, "message 1 is not an object but text"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "2 is not text but null"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": " \n"}]}, "message 2 is empty"),
    ({"messages": [{"role": "user", "content": ["x"]}, CHAT[1]]}, "1 is a list that holds text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, CHAT[1]]},
        "message 1 holds a part of type 'image_url'",
    ),
    ({"conversations": CHAT, "messages": CHAT}, "more than one reading, by the keys conversations"),
    ({"system": "a", "messages": [SYSTEM, *CHAT]}, "two different system turns"),
    ({"system": "a", "system_prompt": "b", "messages": CHAT}, "two different system turns"),
    (marked("weight", 0.5, 1), 'message 2 has "weight" 0.5, which is neither on nor off'),
    (marked("train", "no", 1), "message 2 has \"train\" 'no'"),
    *(
        ({"messages": [CHAT[0], {**CHAT[1], key: value}]}, f"message 2 holds {key}")
        for key, value in [
            *[("tool_calls", [{"id": 1}]), ("function_call", {"name": "f"}), ("thinking", "hm")],
            *[("reasoning_content", "Two and two"), ("reasoning", "hm"), ("tools", '[{"x": 1}]')],
        ]
    ),
    ({"messages": CHAT, "tools": [{"name": "f"}]}, "the row holds tools"),
    ({"messages": [CHAT[0], {"role": "assistant", "tool_calls": [1]}]}, "2 holds tool_calls"),
    ({"prompt": "a", "completion": "b", "label": False}, "makes it a preference row"),
    ({"chosen": CHAT, "rejected": CHAT}, "a preference row (chosen, rejected)"),
    ({"conversations": CHAT[:1], "chosen": {}, "rejected": {}}, "a preference row"),
    ({"messages": CHAT, "history": [["a", "b"]]}, "more than one reading, by the keys messages"),
    ({"prompt": "a", "question": "b", "answer": "c"}, "by the keys prompt, question, answer"),
    ({"prompt": "a", "answer": "b", "output": "c"}, "by the keys prompt, answer, output"),
    ({"query": "c", "response": "d", "history": [["a"]]}, 'part 1 of "history" is no'),
    ({"query": "c", "response": "d", "history": "a"}, '"history" is not a list but text'),
    ({"instruction": "", "output": "x"}, '"instruction" is empty'),
    ({"instruction": "a", "input": 3, "output": "x"}, '"input" is not text but a number'),
    ({"instruction": "a", "output": ""}, '"output" is empty'),
    ({"instruction": "a"}, '(\'instruction\'); the nearest one has "instruction" with "output"'),
    ({"Question": "a", "Answer": "b"}, 'the nearest one has "question" with "answer"'),
    ({"mesages": CHAT}, 'the nearest one has "messages"'),
    ({}, "has its keys (none)"),
    ({"text": ""}, '"text" is empty'),
    ({"text": "\u3000\t"}, '"text" is empty'),
    ({"text": 3}, '"text" is not text but a number'),
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
    ('["text"]', "message 1 is not an object but text"),
    ("null", "a row must be a JSON object, not null"),
    ('"text"', "a row must be a JSON object, not text"),
    ("über die Brücke".encode("latin-1"), "not UTF-8 at byte 1 of the row"),
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
    with pytest.raises(BadRow, match=r"text.*conversations"):
        clean_text({"conversations": CHAT})
    with pytest.raises(BadRow, match=r"\('text'\)"):
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
    ('[\n{"text": "a"},\n"\\ud83d"]', {3: "a row must be a JSON object, not text"}),
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
    monkeypatch.setattr(files, "CHUNK_BYTES", size)
    path = tmp_path / "a.json"
    path.write_bytes(array if isinstance(array, bytes) else array.encode())
    actual = bad_rows(path)
    assert actual.keys() == found.keys()
    assert all(reason in actual[line] for line, reason in found.items())


@pytest.mark.parametrize("size", [1, 3])
def test_a_number_is_not_cut_where_reading_paused(tmp_path, monkeypatch, size):
    monkeypatch.setattr(files, "CHUNK_BYTES", size)
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
    "a.docx": (b"a,b\n", "unknown ending; use one of .jsonl"),
    "jsonl": (b"", "unknown ending"),
    "cut.jsonl.gz": (gzip.compress(json_lines(TEXTS * 500))[:-40], "cannot read"),
    "damaged.jsonl.gz": (b"\x1f\x8b\x08" + b"\x00" * 7 + b"\xff" * 50, "cannot read"),
    "cut.jsonl.zst": (zstandard.compress(json_lines(TEXTS * 500))[:-40], "cannot read"),
    "sheet.csv": (b"PK\x03\x04" + b"\x00" * 30, "spreadsheet or an archive; save its table as CSV"),
    "gbk.jsonl": ('{"text": "a"}\n{"text": "你好"}\n'.encode("gb18030"), "GB18030.*iconv"),
    "gbk.csv": ("text\n你好\n".encode("gb18030"), "GB18030.*iconv"),
    "gbk.txt": ("你好，世界".encode("gb18030"), "GB18030.*iconv"),
    "sheet.xlsx": (b"PK", "save a spreadsheet as .csv"),
    "odd.jsonl": (codecs.BOM_UTF16_LE + b"a", "cannot read"),
    "cut.parquet": (b"PAR1cut", "cannot read"),
    "no.arrow": (b"no", "cannot read"),
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
