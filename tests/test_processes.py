"""Several processes train as one: the same gradients and samples, one set of files, one end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from conftest import SMALL, flags
from safetensors.torch import load_file
from test_resume import left_in, metrics_of, states_in
from two_processes import PRETRAIN, run_door

import train_pretrain
from core.paths import REPOSITORY, checkpoints_dir
from model.lora.skill_file import read_lora
from model.weights import read_tensors
from trainer.checkpoints import newest_state

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch build knows no processes"
)


def torchrun(*command: object, **settings: object) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [sys.executable, *launcher, *map(str, command)]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    variables["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(words, env=os.environ | variables, **pipes, **settings)


@pytest.fixture(scope="module")
def both(trained, tmp_path_factory):
    """What each of two processes saw in the scenarios of two_processes.py, and their folder."""
    folder = tmp_path_factory.mktemp("both")
    pretrain = PRETRAIN | {"data_path": trained.texts}
    alone = run_door(train_pretrain, folder / "two" / "out", crash_at=14, **pretrain)
    script = REPOSITORY / "tests" / "two_processes.py"
    files = trained.texts, trained.chats, trained.general, trained.out / "full_sft_64.pth"
    child = torchrun(script, folder, *files)
    output, errors = child.communicate(timeout=240)
    assert child.returncode == 0, errors
    files = (folder / f"rank-{rank}.json" for rank in (0, 1))
    seen = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {"folder": folder, "ranks": seen, "alone": alone, "output": output}


def rows(*runs: list) -> Counter:
    """How often each row was learned from, padding left out."""
    learned = (row for steps in runs for step in steps for row in step)
    return Counter(tuple(id for id in row if id) for row in learned)


def test_ranks_together_have_the_gradient_of_one_process(both):
    for rank in both["ranks"]:
        assert len(rank["gradients"]) == 8
        assert max(rank["gradients"].values()) <= 1e-10


def test_a_process_leaves_the_others_at_its_very_end(both):
    """However it ends: the threads that talk to them would abort it."""
    left = [(both["folder"] / f"left-{rank}").read_text(encoding="utf-8") for rank in (0, 1)]
    assert left == ["True", "True"]


def test_parameters_that_the_loss_never_reaches_make_no_rank_wait(both):
    found = [rank["bypassed"] for rank in both["ranks"]]
    assert found == [["bypassed.weight", "bypassed.bias"]] * 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
def test_what_fails_in_the_first_process_ends_all(both):
    first, second = (rank["full disk"]["end"] for rank in both["ranks"])
    assert first.startswith("UserError: cannot write") and "File too large" in first
    assert second == "SystemExit: 2"


def test_a_log_that_cannot_be_opened_ends_all(both):
    first, other = (rank["no metrics"]["end"] for rank in both["ranks"])
    assert first.startswith("UserError: ") and "metrics" in first
    assert other == "SystemExit: 2"


def test_processes_that_see_other_states_are_refused(both):
    for rank in both["ranks"]:
        assert "the processes see different states" in rank["not shared"]["end"]


def test_each_rank_has_random_numbers_of_its_own(both):
    first, second = (rank["seed"] for rank in both["ranks"])
    assert first != second


def test_patience_ends_all_processes_at_the_same_step(both):
    runs, out = [rank["lora"] for rank in both["ranks"]], both["folder"] / "lora" / "out"
    (step, _), steps = max(states_in(out).items()), [len(run["steps"]) for run in runs]
    assert steps == [step] * 2 and step < 28  # of two epochs
    metrics = read_lora(out / "lora" / "lora_x_64.pth")[1].metrics
    assert metrics["step"] == step - 1 == metrics["domain"]["best"]["step"]


def test_the_first_rank_alone_prints(both):
    ends = [run.get("end") for run in both["ranks"][0].values() if isinstance(run, dict)]
    saved = both["output"].count(f"saved {both['folder']}")
    assert saved == ends.count("finished") == 4


def test_files_are_those_of_one_process(both, trained):
    out = both["folder"] / "whole" / "out"
    one, two = (read_tensors(folder / "pretrain_64.pth") for folder in (trained.out, out))
    assert one.keys() == two.keys()
    tensors, _ = read_lora(both["folder"] / "lora" / "out" / "lora" / "lora_x_64.pth")
    assert tensors.keys() == read_lora(trained.out / "lora" / "lora_a_64.pth")[0].keys()
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if ".B." in name)
    folders = (checkpoints_dir(folder, "pretrain_64") for folder in (trained.out, out))
    one, two = (newest_state(folder).tensors for folder in folders)
    assert {name for name in two if not name.startswith("rng.1.")} == one.keys()


def test_two_processes_resume_bit_for_bit(both):
    folder = both["folder"]
    assert left_in(folder / "cut" / "out") == left_in(folder / "whole" / "out")


def test_no_sample_is_lost_or_repeated_when_the_number_of_processes_changes(
    both, trained, tmp_path, capsys
):
    first, second = both["ranks"]
    expected = rows(first["whole"]["steps"], second["whole"]["steps"])
    assert set(expected.values()) == {1} and len(expected) == 46

    before = [rank["poisoned"]["steps"][:4] for rank in both["ranks"]]
    out = shutil.copytree(both["folder"] / "poisoned" / "out", tmp_path / "out")
    after = run_door(train_pretrain, out, "--resume", **PRETRAIN | {"data_path": trained.texts})
    assert after["end"] == "finished" and rows(*before, after["steps"]) == expected
    printed = capsys.readouterr().out
    assert "processes was 2 and is now 1" in printed and "8 optimizer steps of 4 rows" in printed

    resumed = [rank["resumed from one"]["steps"] for rank in both["ranks"]]
    assert rows(both["alone"]["steps"][:12], *resumed) == expected


def test_a_number_that_is_not_finite_on_one_rank_stops_both_before_the_update(both):
    first, second = (rank["poisoned"] for rank in both["ranks"])
    assert first["end"] == second["end"] and first["end"].startswith("UserError: step 7: loss nan")
    saved = states_in(both["folder"] / "poisoned" / "out")
    assert saved.keys() == {4}
    tensors = load_file(saved[4] / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


FAILING = """
import atexit, json, os, sys, time
from core.errors import UserError, run

def main():
    before, sentence, after = json.loads(sys.argv[1])[int(os.environ["RANK"])]
    atexit.register(time.sleep, after)
    time.sleep(before)
    raise UserError(sentence)

run(main)
"""


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([(0, "one", 0), (0, "one", 0)], ["one"]),
        ([(0, "one", 5), (0, "one", 0)], ["one"]),  # the first takes its time to end
        ([(0, "of rank 0", 5), (0, "of rank 1", 0)], ["of rank 0", "of rank 1"]),
        ([(60, "not reached", 0), (0, "of rank 1", 0)], ["of rank 1"]),
    ],
)
def test_what_processes_say_of_a_mistake_comes_once(tmp_path, ranks, said):
    script = tmp_path / "failing.py"
    script.write_text(FAILING, encoding="utf-8")
    child = torchrun(script, json.dumps(ranks))
    errors = child.communicate(timeout=120)[1]
    assert child.returncode != 0
    assert [line for line in errors.splitlines() if line.startswith("error: ")] == [
        f"error: {sentence}" for sentence in said
    ]


@pytest.mark.parametrize("words", ["--nonsense", "--data_path bad.jsonl"])
def test_a_door_s_mistake_comes_once(tmp_path, words):
    (tmp_path / "bad.jsonl").write_text("no row", encoding="utf-8")
    values = SMALL | {"dim": 64, "n_layers": 1, "n_heads": 4, "out_dir": tmp_path}
    door = REPOSITORY / "train_pretrain.py"
    child = torchrun(door, *flags(**values), *words.split(), cwd=tmp_path)
    errors = child.communicate(timeout=120)[1]
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert words.split()[-1] in line


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals for groups of processes")
def test_a_signal_for_all_processes_saves_once_and_ends_all(trained, tmp_path):
    """As terminals and clusters send it: to torchrun, which passes it on, to ranks and workers."""
    values = PRETRAIN | {"data_path": trained.texts, "out_dir": tmp_path, "num_workers": 1}
    values |= {"epochs": 1000, "save_interval": 100_000, "log_interval": 5}
    door = REPOSITORY / "train_pretrain.py"
    child = torchrun(door, *flags(**values), start_new_session=True)
    for line in child.stdout:
        if line.startswith("step 5/"):
            break
    os.killpg(child.pid, signal.SIGTERM)
    began = time.monotonic()
    output, errors = child.communicate(timeout=60)
    assert child.returncode != 0 and time.monotonic() - began < 25, errors
    assert output.count("stopped by SIGTERM after step") == 1, errors
    (step,) = states_in(tmp_path)
    assert f"after step {step} of" in output
    assert (tmp_path / "pretrain_64.pth").is_file()
    assert all(record["step"] <= step for record in metrics_of(tmp_path))
