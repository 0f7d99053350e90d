"""Labelled rows: the same from JSON and from tables, each bad one named, split without leaks."""

import gzip
import json

import pytest
from conftest import write_rows

from core.errors import UserError
from dataset.labelled import clean_unlabelled, labels_of, read_labelled, split_labelled


def test_json_and_tsv_say_the_same(tmp_path):
    rows = [
        {"text": 'a "quoted', "text_pair": "b\u2028c", "label": 1},
        {"text": "d", "text_pair": "e", "label": 0},
    ]
    wanted = [{**row, "label": str(row["label"])} for row in rows]
    glue = "sentence1\tindex\tsentence2\tlabel\n" + "".join(
        f"{row['text']}\t{n}\t{row['text_pair']}\t{row['label']}\r\n" for n, row in enumerate(rows)
    )
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbf" + glue.encode())
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(glue.encode()))
    write_rows(tmp_path / "c.jsonl", rows)
    (tmp_path / "d.json").write_text(json.dumps([{"sentence": "x", "label": "yes"}]))
    qnli = {"index": 0, "question": 'a "quoted', "sentence": "b\u2028c", "label": 1}
    write_rows(tmp_path / "glue.jsonl", [qnli, {"premise": "d", "hypothesis": "e", "label": 0}])
    for name in ("glue.jsonl", "a.tsv", "b.tsv.gz", "c.jsonl"):
        assert read_labelled((tmp_path / name,)) == wanted, name
    assert read_labelled((tmp_path / "d.json",)) == [
        {"text": "x", "text_pair": None, "label": "yes"}
    ]
    assert read_labelled((tmp_path / "c.jsonl",), clean=clean_unlabelled)[0] == {
        "text": 'a "quoted',
        "text_pair": "b\u2028c",
    }
    assert len(read_labelled((tmp_path / "a.tsv", tmp_path / "c.jsonl"))) == 4
    (tmp_path / "e.tsv").write_text("text\ngood\n\nbad\n\n")
    with pytest.raises(
        UserError, match=r"e\.tsv: row 2: .*; mend it$"
    ):  # answers would be of other rows
        read_labelled((tmp_path / "e.tsv",), "refuse", clean_unlabelled)


@pytest.mark.parametrize(
    "content, reason",
    [
        ('{"text": "a"}', r':1: "label" None is neither a whole number nor a name'),
        ('{"text": "a", "label": 0.5}', r":1: .label. 0.5 is neither"),
        ('{"text": "a", "label": "-3.8e1"}', r":1: .label. '-3.8e1' is neither"),
        ('{"question": "a", "label": 1}', r""":1: no "text" among its keys"""),
        ('{"text": "a", "label": true}', r":1: .label. True is neither"),
        ('{"text": " ", "label": 1}', r':1: "text" is empty'),
        ('{"words": "a", "label": 1}', r""":1: no "text" among its keys \('words', 'label'\)"""),
        ('["a", 1]', r":1: a row must be a JSON object"),
        ('{"text": "a", "label": 1}\nnonsense', r":2: "),
        (
            '{"text": "a", "label": 1}\n{"text": "a", "text_pair": "b", "label": 1}',
            "some rows have a text_pair",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, content, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=reason):
        read_labelled((path,))


def test_bad_rows_of_a_table_are_named_or_skipped(tmp_path, capsys):
    path = tmp_path / "rows.tsv"
    path.write_text("sentence\tlabel\nfine\t1\nno label\n\nbad\t0\n")
    with pytest.raises(UserError, match=r"rows\.tsv: row 2: 1 columns"):
        read_labelled((path,))
    assert len(read_labelled((path,), "skip")) == 2
    assert "bad rows skipped: 1" in capsys.readouterr().out
    path.write_bytes(b"sentence\tlabel\n\xff\t1\n")
    with pytest.raises(UserError, match=r"rows\.tsv: row 1: not UTF-8"):
        read_labelled((path,))
    path.write_bytes(b"sentence\tlabel\tlabel\nx\t1\t1\n")
    with pytest.raises(UserError, match=r"rows\.tsv: the header: "):
        read_labelled((path,))
    broken = tmp_path / "broken.tsv.gz"
    broken.write_bytes(gzip.compress(b"sentence\tlabel\n" + b"x\t1\n" * 99)[:20] + b"\xff" * 30)
    with pytest.raises(UserError, match="broken"):
        read_labelled((broken,))
    with pytest.raises(UserError, match=r"none\.tsv "):
        read_labelled((tmp_path / "none.tsv",))


def test_labels_are_numbered_in_their_order():
    rows = [{"label": label} for label in ("10", "9", "b", "a", "9")]
    assert labels_of(rows) == ["9", "10", "a", "b"]
    with pytest.raises(UserError, match="label 'x'"):
        labels_of([{"label": "x"}])


def test_the_same_text_is_never_on_both_sides():
    rows = [{"text": str(n % 200), "text_pair": None, "label": str(n % 3)} for n in range(1000)]
    train, held_out = split_labelled(rows, 0.2)
    assert len(train) + len(held_out) == 1000 and 100 < len(held_out) < 300
    assert not {row["text"] for row in train} & {row["text"] for row in held_out}
    assert [len(side) for side in split_labelled(rows[:200], 1e-9)] == [199, 1]
    with pytest.raises(UserError, match="val_ratio"):
        split_labelled(rows[:1], 0.1)
