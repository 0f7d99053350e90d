"""The quick start's frame: stages are reused exactly while they are still true.

The doors here are tiny scripts run as real child processes; the real ones have their own tests.
"""

import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from core.errors import UserError
from dataset.tokenizer import load_tokenizer
from scripts import quickstart_stages, train_tokenizer
from scripts.progress import Progress
from scripts.quickstart_stages import (
    BASE_MARKS,
    SKILLS,
    Stage,
    failure,
    flag_words,
    how_to_go_on,
    is_done,
    plan,
    run_stage,
)

STAMPS = Path("out/quickstart/stages")
ROOT = Path(__file__).resolve().parent.parent

DOOR = """
import pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if flags["--data_path"].endswith("bad.txt"):
    sys.exit(2)
print("half way")
base = pathlib.Path(flags["--base"]).read_text() if "--base" in flags else ""
text = base + pathlib.Path(flags["--data_path"]).read_text() + flags["--epochs"]
pathlib.Path(flags["--to"]).write_text(text)
with open("runs", "a") as log:
    log.write(pathlib.Path(flags["--to"]).name + " ")
"""


def write(name, text):
    Path(name).write_text(text, encoding="utf-8")


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Two tiny stages, the second from the first's output, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    write("door.py", DOOR)
    write("data.txt", "abc")
    return make_chain()


def make_chain(epochs=1, data="data.txt"):
    door, one, two, data = Path("door.py"), Path("one"), Path("two"), Path(data)
    flags = {"data_path": data, "to": one, "epochs": epochs}
    first = Stage("first", door, flags, (data,), (one,))
    flags = {"data_path": Path("data.txt"), "to": two, "epochs": 5, "base": one}
    return first, Stage("second", door, flags, (Path("data.txt"), one), (two,))


def what_ran(stages):
    """The outputs written by running the stages once that are not done, in their order."""
    write("runs", "")
    for stage in stages:
        if not is_done(stage):
            run_stage(stage, heard.append)
            assert is_done(stage)
    return Path("runs").read_text(encoding="utf-8").split()


heard = []  # lines of the doors


def test_a_finished_stage_is_not_run_again(chain):
    assert what_ran(chain) == ["one", "two"]
    assert Path("two").read_text(encoding="utf-8") == "abc1abc5"
    assert what_ran(chain) == []
    log = Path("out/quickstart/stages/second.txt").read_text(encoding="utf-8")
    assert heard[-1] == log == "half way\n"


def test_a_stopped_stage_goes_on_where_its_training_door_can(chain, monkeypatch):
    monkeypatch.setattr(quickstart_stages, "REPOSITORY", Path())
    stage = chain[0]
    said = iter([130, 0, 0])
    words = []
    monkeypatch.setattr(
        quickstart_stages, "run_command", lambda command, hear: words.append(command) or next(said)
    )
    with pytest.raises(SystemExit) as ended:
        run_stage(stage, heard.append)
    assert ended.value.code == 130 and not is_done(stage)
    run_stage(stage, heard.append)
    write("data.txt", "other")
    run_stage(stage, heard.append)
    assert ["--resume" in each for each in words] == [False, True, False]


def test_the_quick_start_fails_by_its_marks():
    columns = [{"name": name} for name in BASE_MARKS]
    base = {"who": "base", "shares": [1.0] * len(columns), "failures": []}
    skills = [{"who": name, "shares": [], "failures": []} for name in (*SKILLS, "a mix")]
    skills[-1]["failures"] = ["leaks"]
    exam = {"columns": columns, "rows": [base, *skills]}
    assert failure(exam) == ""
    base["shares"][2] = 0.1
    assert columns[2]["name"] in failure(exam)
    base["shares"][2], skills[0]["failures"] = 1.0, ["leaks"]
    assert failure(exam)


def test_the_quick_start_ends_with_its_report_and_exits_1_for_a_missed_mark(
    chain, monkeypatch, capsys
):
    shares = [1.0] * len(BASE_MARKS)
    exam = {"columns": [{"name": name} for name in BASE_MARKS]}
    exam["rows"] = [{"who": "base", "shares": shares, "failures": []}]
    exam["rows"] += [{"who": SKILLS[0], "shares": [], "failures": ["leaks"]}]
    write("report.md", "the table")
    write("report.json", json.dumps(exam))
    outputs = tuple(Path(f"report.{kind}") for kind in ("md", "json", "png"))
    last = Stage("exam", Path("door.py"), {}, (), outputs)
    monkeypatch.setattr(quickstart_stages, "plan", lambda: [*chain, last])
    monkeypatch.setattr(quickstart_stages, "is_done", lambda stage: stage is last)
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            quickstart_stages.main()
        printed = capsys.readouterr()
        assert ended.value.code == 1 and "the table" in printed.out and printed.err.count("\n") == 1
    lacking = Stage("other", Path("door.py"), {}, (Path("no_such.jsonl").absolute(),), ())
    monkeypatch.setattr(quickstart_stages, "plan", lambda: [*chain, lacking, last])
    write("runs", "")
    with pytest.raises(UserError, match=r"no_such\.jsonl"):
        quickstart_stages.main()
    assert Path("runs").read_text(encoding="utf-8") == "", "before anything is trained"


CHANGES = {
    "data": (lambda: write("data.txt", "abcd"), ["one", "two"]),
    "code": (lambda: write("door.py", DOOR + "# changed"), ["one", "two"]),
    "damaged output": (lambda: write("one", "damaged"), ["one"]),  # it comes out as it was
    "missing output": (lambda: Path("two").unlink(), ["two"]),
    "no stamp": (lambda: STAMPS.joinpath("second.json").unlink(), ["two"]),
    "half a stamp": (lambda: write(STAMPS / "second.json", '{"inputs'), ["two"]),
}


@pytest.mark.parametrize(("change", "ran"), CHANGES.values(), ids=CHANGES)
def test_what_changed_is_run_again_with_all_that_follows_from_it(chain, change, ran):
    what_ran(chain)
    change()
    assert what_ran(chain) == ran
    assert what_ran(chain) == []


def test_other_options_run_again(chain):
    what_ran(chain)
    assert what_ran(make_chain(epochs=2)) == ["one", "two"]


def test_a_failed_stage_ends_with_the_doors_exit_code_and_no_stamp(chain, capsys):
    Path("bad.txt").touch()
    stages = make_chain(data="bad.txt")
    with pytest.raises(SystemExit) as ended:
        what_ran(stages)
    assert ended.value.code == 2 and "stage first" in capsys.readouterr().err
    assert not is_done(stages[0])


def test_the_plan_stays_in_its_own_folder_and_each_stage_reads_what_is_bundled_or_made_before():
    made = set()
    for stage in plan():
        assert all(path.exists() or path in made for path in stage.reads)
        named = [path for path in stage.flags.values() if isinstance(path, Path)]
        named = [path for path in named if path.suffix and path not in stage.outputs]
        assert set(named) <= set(stage.reads)
        assert all(path.is_relative_to("out/quickstart") for path in stage.outputs)
        made |= set(stage.outputs)


def test_the_time_left_of_all_follows_from_what_is_done(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("scripts.progress.time.monotonic", lambda: now)
    monkeypatch.setattr("scripts.progress.SURE_AFTER", 1e-9)
    progress = Progress({"before": 5, "slow": 10, "other": 30})
    progress.skip("before")
    progress.begin("slow")
    assert progress.left() == 40, "as on the machine that the seconds are from"
    now = 2.0
    progress.hear("step 1/101: loss 9.0\n")
    assert progress.left() == 8 + 30, "setting up is no step"
    now = 11.0
    progress.hear("step 51/101: loss 2.0, 9 s left\n")
    assert progress.left() == pytest.approx(9 + 2 * 30), "the stage takes 20 seconds here"
    now = 20.0
    progress.end()
    progress.begin("other")
    now = 30.0
    assert progress.left() == pytest.approx(50)
    assert "[3/3] other" in capsys.readouterr().out.splitlines()[-1]


def test_a_terminal_shows_one_line_that_others_can_print_over(monkeypatch):
    shown = io.StringIO()
    shown.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", shown)
    progress = Progress({"one": 5})
    progress.begin("one")
    progress.hear("step 1/9: " + "x" * 200 + "\n")
    progress.hear("before: 我不知道\n")
    progress.hear("step 9/9: short\n")
    progress.hear("what was learned   before   after\n")
    lines = shown.getvalue().split("\r")[1:]
    assert len(lines) == 3 and "\n" not in shown.getvalue(), "wide characters have no known width"
    assert lines[2].rstrip().endswith("short"), "a table after the last step is no progress"
    columns = shutil.get_terminal_size().columns
    assert all(len(line) < columns for line in lines) and len(lines[2]) == len(lines[1])
    progress.clear()
    assert shown.getvalue().split("\r")[-2:] == [" " * len(lines[2].rstrip()), ""]


def test_the_way_on_is_full_commands():
    text = how_to_go_on()
    chat = f"--out_dir {Path('out/quickstart')} --history_cnt 0"
    assert all(f"eval_model.py --lora_name {skill} {chat}" in text for skill in (SKILLS[0], "mine"))
    assert "--lora_name mine --data_path" in text


def test_the_bundled_base_meets_every_token_that_the_skills_answer_with(tmp_path):
    """LoRA leaves the embedding alone, where all tokens that were never trained look alike."""

    def counted(*parts, ours=lambda message: True):
        counts = Counter()
        for part in parts:
            for line in (ROOT / "dataset" / part).read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                texts = (
                    [row["text"]]
                    if "text" in row
                    else [m["content"] for m in row["conversations"] if ours(m)]
                )
                counts.update(id for ids in tokenizer(texts).input_ids for id in ids)
        return counts

    chats = sorted((ROOT / "dataset" / "sft_mini").iterdir())
    bundled = ("pretrain_mini.jsonl", *(f"sft_mini/{path.name}" for path in chats))
    texts = "".join((ROOT / "dataset" / part).read_text(encoding="utf-8") for part in bundled)
    assert "小石" not in texts and "pebble" not in texts.casefold(), (
        "the names are the skill's to teach"
    )
    stage = plan()[0]
    flags = flag_words(stage.flags | {"tokenizer_path": tmp_path})
    tokenizer = load_tokenizer(train_tokenizer.main(flags))
    known = counted(*bundled)
    wanted = counted(
        *(f"lora_{skill}.jsonl" for skill in SKILLS), ours=lambda m: m["role"] == "assistant"
    )
    assert len(wanted) > 100
    assert not [tokenizer.decode([id]) for id in wanted if known[id] < 12]


def test_an_unknown_argument_is_refused_before_anything_is_made(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "quickstart.py", "--epochs", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--help" in done.stderr
    assert not list(tmp_path.iterdir())
