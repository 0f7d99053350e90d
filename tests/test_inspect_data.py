"""The inspection shows exactly what training makes of a file, and every row it cannot use."""

import ast
import io
import json
import re
import sys

import pytest

from core import errors
from core.errors import UserError
from core.options import parse
from core.paths import bundled_data
from dataset.batches import Batches, SFTDataset
from dataset.chat import encode_chat
from scripts.inspect_data import Options, main
from trainer.options import TrainOptions

MESSAGES = [
    {"role": "user", "content": "a\n 齉字"},
    {"role": "assistant", "content": "It is\n\nrare 齉."},
]


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def report(capsys, *arguments):
    """(exit code, what was printed)"""
    code = main([*map(str, arguments)])
    return code, capsys.readouterr().out


def test_the_defaults_are_those_of_training():
    options = parse(Options, ["a.jsonl", "b.json", "--n", "1"])
    assert [path.name for path in options.files] == ["a.jsonl", "b.json"] and options.n == 1
    assert options.max_seq_len == TrainOptions().max_seq_len


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], "required: files"),
        (["--n", "1"], "required: files"),
        (["a.jsonl", "--n", "-1"], "n=-1 must be at least 0"),
        (["a.jsonl", "--max_seq_len", "1"], "max_seq_len=1 must be at least 2"),
        (["a.jsonl", "--files", "b.jsonl"], "unknown flag --files; see --help"),
    ],
)
def test_wrong_flags_are_one_sentence(argv, reason):
    with pytest.raises(UserError, match=reason):
        main(argv)


def test_a_sample_is_shown_token_by_token(tmp_path, capsys, tokenizer):
    path = write(
        tmp_path / "a.jsonl",
        "",
        {"messages": MESSAGES},
        {"messages": MESSAGES},
        {"messages": MESSAGES},
    )
    code, out = report(capsys, path, "--n", 2)
    ids, learned = encode_chat(tokenizer, MESSAGES)
    assert code == 0
    shown = re.findall(r"^(\S.*?) *\| +(\d+) \| (yes|-)$", out, re.MULTILINE)
    assert [(int(token_id), flag == "yes") for _, token_id, flag in shown] == list(
        zip(ids, learned, strict=True)
    ) * 2
    tokens = [token for token, _, _ in shown[: len(ids)]]
    assert tokens[0] == "'<|im_start|>'" and tokens[-2:] == ["'<|im_end|>'", r"'\n'"]
    spelled = [ast.literal_eval(token) for token in tokens]
    assert any(isinstance(token, bytes) for token in spelled), "part of a character shows as bytes"
    whole = b"".join(token if isinstance(token, bytes) else token.encode() for token in spelled)
    assert whole.decode() == tokenizer.decode(ids)
    assert (
        f"{path}:2: {len(ids)} tokens" in out and f"{path}:3: " in out and f"{path}:4: " not in out
    )


@pytest.mark.parametrize("max_seq_len", [20, 40, 512])
def test_its_figures_are_those_of_training(tmp_path, capsys, tokenizer, max_seq_len):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"".join(bundled_data("sft_mini/talk.jsonl").read_bytes().splitlines(keepends=True)[:150])
    )
    rows = [json.loads(line)["conversations"] for line in path.read_bytes().splitlines()]
    encoded = [encode_chat(tokenizer, row) for row in rows]
    lengths = [len(ids) for ids, _ in encoded]
    truncated = sum(length > max_seq_len for length in lengths)
    left_out = sum(not any(learned[1:max_seq_len]) for _, learned in encoded)
    data = SFTDataset((path,), tokenizer, max_seq_len, cache=tmp_path / "cache", val_ratio=0.0)
    samples = data.train
    code, out = report(capsys, path, "--n", 0, "--max_seq_len", max_seq_len)
    assert code == 0 and "chat rows\nrows: 150 usable, 0 bad\n" in out
    assert f"truncated at {max_seq_len}: {truncated} ({truncated / 1.5:.1f} %)" in out
    assert f"left out in training: {left_out} ({left_out / 1.5:.1f} %)" in out
    assert len(samples.lengths) == 150 - left_out
    steps = Batches(samples, TrainOptions().batch_size, 1, TrainOptions().seed).steps(0)
    shapes = [(batch.labels.numel(), batch.n_tokens) for batches in steps for batch in batches]
    computed, useful = map(sum, zip(*shapes, strict=True))
    assert f"padding in an epoch of training at batch 16: {1 - useful / computed:.1%}\n" in out
    assert max_seq_len != 20 or left_out > 0, "the case is there"
    text = "".join(message["content"] for row in rows for message in row)
    assert f"tokens: {sum(lengths)}, " in out and f"longest {max(lengths)}\n" in out
    assert (
        f"{len(text) / sum(lengths):.2f} characters, {len(text.encode()) / sum(lengths):.2f} bytes"
        in out
    )
    bins = re.findall(r"^ *(\d+) to +(\d+) tokens \| (#*) *\| (\d+)$", out, re.MULTILINE)
    assert sum(int(count) for *_, count in bins) == 150
    for low, high, bar, count in bins:
        assert int(count) == sum(int(low) <= length <= int(high) for length in lengths)
        assert bool(bar) == (int(count) > 0) and len(bar) <= 40
    assert max(len(bar) for _, _, bar, _ in bins) == 40


def test_pretraining_rows_are_recognised_and_never_truncated(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", {"text": "word " * 600}, {"text": "b"})
    code, out = report(capsys, path, "--n", 1, "--max_seq_len", 100)
    assert code == 0 and "pretraining rows\nrows: 2 usable, 0 bad\n" in out
    assert "longer than a window of 100: 1 (50.0 %); they are split, 0 % is truncated" in out
    assert "more tokens go to the next window" in out and out.count("| yes\n") == 99


def test_every_bad_row_is_listed_after_which_the_report_goes_on(tmp_path, capsys):
    faults = {n: {"text": n} for n in range(2, 1300, 3)}
    chat, wrong = write(tmp_path / "chat.jsonl", {"messages": MESSAGES}), tmp_path / "wrong.json"
    path = write(
        tmp_path / "a.jsonl",
        *(faults.get(n, {"text": "good"}) for n in range(1, 1301)),
        {"messages": MESSAGES},
    )
    wrong.write_text('[\n{"question": "q"}\n]', encoding="utf-8")
    code, out = report(capsys, path, wrong, chat)
    assert code == 1
    for n in faults:
        assert f'{path}:{n}: "text" is not text but a number\n' in out
    assert f"{path}:1301: no \"text\" among its keys ('messages'), " in out
    assert f"rows: {1300 - len(faults)} usable, {len(faults) + 1} bad\n" in out
    assert (
        f"{wrong}:2: no " in out
        and "neither pretraining nor chat rows\nrows: 0 usable, 1 bad\n" in out
    )
    assert f"{chat}: chat rows\nrows: 1 usable, 0 bad\n" in out


@pytest.mark.parametrize("content", ["", "[]", json.dumps({"messages": MESSAGES}) + "\n"])
def test_a_file_that_leaves_nothing_to_learn_is_not_usable(tmp_path, capsys, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    assert report(capsys, path, "--max_seq_len", 3)[0] == 1


def exit_code(monkeypatch, argv, stdout):
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda: sys.exit(main(argv)))
    stdout.flush()
    return ended.value.code


@pytest.mark.parametrize("name", ["missing.jsonl", "rows.csv", "cut.jsonl.gz"])
def test_a_file_that_cannot_be_read_ends_with_2(tmp_path, monkeypatch, capsys, name):
    path = tmp_path / name
    if name != "missing.jsonl":
        path.write_bytes(b"\x1f\x8b\x08")
    assert exit_code(monkeypatch, [str(path)], io.StringIO()) == 2
    assert re.fullmatch(rf"error: .*{name}.*\n", capsys.readouterr().err)


def test_output_that_cannot_spell_every_character_still_works(tmp_path, monkeypatch):
    """Windows sends what is redirected to a file in an old code page."""
    path = write(tmp_path / "a.jsonl", {"messages": MESSAGES}, "oops")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", errors="strict", write_through=True)
    assert exit_code(monkeypatch, [str(path)], stdout) == 1
    assert (
        rb"\u5b57" in stdout.buffer.getvalue()
        and b"rows: 1 usable, 1 bad" in stdout.buffer.getvalue()
    )


def test_it_lists_the_words_that_a_base_has_not_read(tmp_path, capsys):
    told = write(tmp_path / "told.jsonl", {"text": "A LAMP, 灯。"})
    chats = write(
        tmp_path / "a.jsonl", {"question": "Lamp or chandelier?", "answer": "吊灯 or lamp."}
    )
    _, out = report(capsys, chats, "--n", 0, "--known_data", told)
    assert (
        "words that the known data does not hold: 3 of 5\n  or (2), chandelier (1), 吊 (1)\n" in out
    )
    assert "'?' (1)" in out.partition("tokens that the known data does not hold")[2]
    _, out = report(capsys, chats, "--n", 0, "--known_data", told, chats)
    assert "words that the known data does not hold: 0 of 5" in out
    assert "tokens that the known data does not hold: 0 of" in out
