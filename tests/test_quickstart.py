"""The quick start's frame: stages are reused exactly while they are still true.

The doors here are tiny scripts run as real child processes; the real ones have their own tests.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from core.paths import TOKENIZER_DIR
from dataset.tokenizer import load_tokenizer
from scripts.quickstart_stages import SKILLS, Stage, how_to_go_on, plan, run_stage

ROOT = Path(__file__).resolve().parent.parent

DOOR = """
import pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if flags["--data_path"].endswith("bad.txt"):
    sys.exit(2)
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
    door, one, two = Path("door.py"), Path("one"), Path("two")
    first = Stage("first", door, Path(data), {"to": one, "epochs": epochs}, (one,))
    return first, Stage("second", door, Path("data.txt"), {"to": two, "epochs": 5}, (two,), one)


def what_ran(stages):
    """The outputs written by running the stages once, in their order."""
    write("runs", "")
    for stage in stages:
        run_stage(stage, Path("stamps"))
    return Path("runs").read_text(encoding="utf-8").split()


def test_a_finished_stage_is_not_run_again(chain):
    assert what_ran(chain) == ["one", "two"]
    assert Path("two").read_text(encoding="utf-8") == "abc1abc5"
    assert what_ran(chain) == []
    assert [run_stage(stage, Path("stamps"))[1] for stage in chain] == [True, True]


CHANGES = {
    "data": (lambda: write("data.txt", "abcd"), ["one", "two"]),
    "code": (lambda: write("door.py", DOOR + "# changed"), ["one", "two"]),
    "damaged output": (lambda: write("one", "damaged"), ["one"]),  # it comes out as it was
    "missing output": (lambda: Path("two").unlink(), ["two"]),
    "no stamp": (lambda: Path("stamps/second.json").unlink(), ["two"]),
    "half a stamp": (lambda: write("stamps/second.json", '{"inputs'), ["two"]),
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
    with pytest.raises(SystemExit) as ended:
        what_ran(make_chain(data="bad.txt"))
    assert ended.value.code == 2 and "stage first" in capsys.readouterr().err
    assert not Path("stamps").exists()


def test_the_plan_stays_in_its_own_folder_and_its_data_is_bundled():
    for stage in plan():
        assert stage.data.is_file(), stage.data
        assert all(path.is_relative_to("out/quickstart") for path in stage.outputs)
    pretrain, full_sft, *skills = plan()
    assert full_sft.base == pretrain.outputs[0]
    assert {skill.base for skill in skills} == {full_sft.outputs[0]}


def test_the_way_on_is_full_commands():
    text = how_to_go_on()
    chat = f"--out_dir {Path('out/quickstart')} --history_cnt 0"
    assert all(f"eval_model.py --lora_name {skill} {chat}" in text for skill in (*SKILLS, "mine"))
    assert "--lora_name mine --data_path my.jsonl" in text


def test_the_bundled_base_meets_every_token_that_the_skills_answer_with():
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

    bundled = ("pretrain_mini.jsonl", "sft_mini.jsonl")
    texts = "".join((ROOT / "dataset" / part).read_text(encoding="utf-8") for part in bundled)
    assert "小石" not in texts and "pebble" not in texts.casefold(), (
        "the names are the skill's to teach"
    )
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    known = counted(*bundled)
    wanted = counted(
        *(f"lora_{skill}.jsonl" for skill in SKILLS), ours=lambda m: m["role"] == "assistant"
    )
    assert len(wanted) > 100
    assert not [tokenizer.decode([id]) for id in wanted if known[id] < 15]


def test_an_unknown_argument_is_refused_before_anything_is_made(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "quickstart.py", "--epochs", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--help" in done.stderr
    assert not list(tmp_path.iterdir())
