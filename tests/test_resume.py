"""A run that was cut short and resumed leaves, bit for bit, what an uninterrupted one leaves;
damage never passes.
"""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import flags, needs_compiler
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import train_full_sft
import train_lora
import train_pretrain
from core.errors import Stopped, UserError
from core.files import sha256_file
from model.lora.skill_file import read_lora
from scripts import train_lora_classifier
from trainer.checkpoints import (
    MANIFEST,
    SUMS,
    TENSORS,
    Progress,
    RunStates,
    Trained,
    newest_state,
    saved_states,
    write_state,
)
from trainer.metrics import Validation
from trainer.optimizer import MuonAdamW, lr_at, param_groups
from trainer.options import MAY_CHANGE
from trainer.runtime import Runtime

TIMINGS = ("seconds", "seconds_left", "tokens_per_second", "matmul_share", "peak_memory_mb")
SHORT = {"max_seq_len": 64, "epochs": 2, "device": "cpu", "val_tokens": 256}
SHORT |= {"log_interval": 3, "save_interval": 4}  # so that saves come between two log lines
SHORT["val_interval"] = 3  # and other weights than the saved ones may be the best
SHORT["micro_tokens"] = 10**6  # so large that no micro-batch is split: the tests count passes
SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 4, "dropout": 0.1}
IMPATIENT = "--patience 2 --learning_rate 1e-30"  # which finds no better weights on any data


class Crash(Exception):
    """Stands for a kill: nothing in the program catches it."""


def at_each_step(monkeypatch, act: Callable[[int], object]) -> None:
    """Call ``act(n)`` when the n-th optimizer step from now begins."""
    numbers = itertools.count(1)

    def watched(*arguments):
        act(next(numbers))
        return lr_at(*arguments)

    monkeypatch.setattr("trainer.loop.lr_at", watched)


def cut_short(monkeypatch, step: int, how: int | None = None) -> None:
    """Let the optimizer step number ``step`` from now begin with a crash, or signal ``how``."""

    def cut(number: int) -> None:
        if number == step and how is None:
            raise Crash
        if number == step:
            signal.raise_signal(how)

    at_each_step(monkeypatch, cut)


def metrics_of(out: Path) -> list[dict]:
    (path,) = (out / "metrics").glob("*.jsonl")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    records[-1].update(records[-1].pop("summary", {}))
    return [{key: record[key] for key in record if key not in TIMINGS} for record in records]


def states_in(out: Path) -> dict[int, Path]:
    (folder,) = (out / "checkpoints").iterdir()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    return dict(saved_states(folder))


def left_in(out: Path) -> list:
    """Everything a run leaves, but for the clock."""
    files = [path for path in out.rglob("*") if path.suffix in (".pth", ".json")]
    not_results = {"cache", "checkpoints"}
    results = {path.name: sha256_file(path) for path in files if not_results.isdisjoint(path.parts)}
    states = {step: sha256_file(path / TENSORS) for step, path in states_in(out).items()}
    manifests = [json.loads((path / MANIFEST).read_text()) for path in states_in(out).values()]
    progress = [manifest["progress"] | {"seconds": 0} for manifest in manifests]
    return [results, states, progress, metrics_of(out)]


def door_and_flags(name: str, trained, **more) -> tuple:
    chat_base, chats = trained.out / "full_sft_64.pth", trained.chats
    door, settings = {
        "pretrain": (train_pretrain, {"data_path": trained.texts} | SHAPE),
        "full_sft": (train_full_sft, {"data_path": chats, "base": trained.out / "pretrain_64.pth"}),
        "lora": (
            train_lora,
            {"data_path": chats, "base": chat_base, "lora_name": "x"}
            | {"general_data": trained.general},
        ),
        "pretrain more": (
            train_pretrain,
            {"data_path": trained.texts, "base": trained.out / "pretrain_64.pth"},
        ),
    }[name]
    return door, flags(**(settings | SHORT | more))


@pytest.mark.parametrize(
    ("name", "accumulation_steps", "num_workers", "words"),
    [
        ("pretrain", 1, 2, ""),
        ("full_sft", 4, 0, ""),
        ("pretrain more", 1, 0, ""),
        ("lora", 1, 0, ""),
        ("lora", 1, 0, "--skill {out}/lora/lora_a_64.pth --lora_dropout 0.1 --patience 9"),
        ("lora", 1, 0, IMPATIENT),
        ("lora", 1, 0, "--use_dora --lora_dropout 0.1 --loraplus_lr_ratio 4 --rank_pattern wo=2"),
        ("lora", 1, 0, "--init_lora_weights pissa --load_in_4bit --target_modules wk w2"),
    ],
)
def test_a_resumed_run_leaves_the_same_bits(
    trained, tmp_path, monkeypatch, name, accumulation_steps, num_workers, words
):
    rows = {"batch_size": 8 // accumulation_steps, "accumulation_steps": accumulation_steps}
    door, argv = door_and_flags(name, trained, **rows, num_workers=num_workers)
    argv += words.format(out=trained.out).split()
    # The folders have one name, because it stands in the files.
    whole, cut = (tmp_path / name / "out" for name in ("whole", "cut"))
    alive = []
    at_each_step(monkeypatch, lambda number: alive.append(len(multiprocessing.active_children())))
    door.main([*argv, "--out_dir", str(whole)])
    assert len(states_in(whole)) == 2 and max(alive) == num_workers

    # Killed in step 7, after the save at 4; resumed and asked to stop in step 4 + 3; resumed to the
    # end.
    cut_short(monkeypatch, 7)
    with pytest.raises(Crash):
        door.main([*argv, "--out_dir", str(cut)])
    assert list(states_in(cut)) == [4]
    cut_short(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        door.main([*argv, "--out_dir", str(cut), "--resume"])
    assert stopped.value.signum == signal.SIGTERM and max(states_in(cut)) == 7
    door.main([*argv, "--out_dir", str(cut), "--resume"])
    assert left_in(cut) == left_in(whole)
    if IMPATIENT in words:  # it is finished, though steps are left
        assert max(states_in(cut)) == 9
        (cut / "lora" / "lora_x_64.pth").unlink()
        door.main([*argv, "--out_dir", str(cut), "--resume"])
        assert left_in(cut) == left_in(whole)


@needs_compiler
def test_a_compiled_run_resumes_to_the_same_bits(trained, tmp_path, monkeypatch):
    """With passes of one row and of several, and more lengths than programs may be made for."""
    torch.compiler.reset()  # other tests compile, too
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", True)  # it would ask for 10 s
    one_layer = (
        SHORT | SHAPE | {"n_layers": 1, "dropout": 0.0, "max_steps": 1, "data_path": trained.texts}
    )
    base = train_pretrain.main(flags(out_dir=tmp_path, **one_layer))
    settings = {"base": base, "batch_size": 4, "micro_tokens": 160, "max_steps": 8, "keep_rows": 4}
    settings |= {"dtype": "float32"}  # or a GPU would round to 8 bits
    door, argv = door_and_flags("lora", trained, **settings)
    plain, whole, cut = (tmp_path / name / "out" for name in ("plain", "whole", "cut"))
    door.main([*argv, "--out_dir", str(plain)])
    before = counters["stats"]["unique_graphs"]
    door.main([*argv, "--compile", "--out_dir", str(whole)])
    # A single row is a case of its own; so are passes without labels, which hold it to its base.
    assert counters["stats"]["unique_graphs"] == before + 4
    shutil.copytree(whole, cut)
    shutil.rmtree(states_in(cut)[8])
    torch.compiler.reset()  # as in a new process
    door.main([*argv, "--compile", "--out_dir", str(cut), "--resume"])
    assert left_in(cut) == left_in(whole)
    losses = ([record.get("loss", 0) for record in metrics_of(out)] for out in (whole, plain))
    assert next(losses) == pytest.approx(next(losses), abs=1e-4)


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory) -> Path:
    """The folder of a pretraining run of 24 steps, with states after steps 20 and 24."""
    out = tmp_path_factory.mktemp("finished") / "out"
    door, argv = door_and_flags("pretrain", trained, batch_size=4)
    door.main([*argv, "--out_dir", str(out)])
    assert list(states_in(out)) == [24, 20]
    return out


@pytest.fixture
def run(finished, trained, tmp_path):
    """A copy of ``finished``, and a function that runs its door again on it."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)

    def again(*words: str, **more: object) -> None:
        door, argv = door_and_flags("pretrain", trained, **{"batch_size": 4, "out_dir": out} | more)
        door.main([*argv, *words])

    again.out = out
    return again


def test_pretraining_gives_the_linears_to_muon_and_the_flag_takes_them_back(
    finished, trained, tmp_path
):
    door, argv = door_and_flags("pretrain", trained, batch_size=4)
    door.main([*argv, "--out_dir", str(tmp_path), "--optimizer", "adamw", "--max_steps", "1"])
    states = {states_in(finished)[24]: False, states_in(tmp_path)[1]: True}
    for folder, has_second_moment in states.items():
        tensors = load_file(folder / TENSORS)
        assert "optimizer.tok_embeddings.weight.exp_avg_sq" in tensors
        assert ("optimizer.layers.0.attention.wq.weight.exp_avg_sq" in tensors) == has_second_moment
        assert "optimizer.layers.0.attention.wq.weight.exp_avg" in tensors


def test_a_finished_run_writes_its_files_again(run, finished, capsys):
    for name in ("pretrain_64.pth", "pretrain_64.json"):
        (run.out / name).unlink()
    run("--resume")
    assert "finished at step 24" in capsys.readouterr().out
    assert left_in(run.out) == left_in(finished)


def test_a_damaged_state_gives_way_to_the_one_before(run, finished, capsys):
    state = states_in(run.out)[24]
    (state / TENSORS).write_bytes(b"")
    run("--resume")
    printed = capsys.readouterr().out
    assert f"{state} is damaged (checksum of {TENSORS})" in printed
    assert "resumed at step 20 of 24" in printed
    assert left_in(run.out) == left_in(finished)


def test_states_that_are_all_damaged_end_the_run(run):
    before = left_in(run.out)
    for state in states_in(run.out).values():
        (state / SUMS).unlink()
    with pytest.raises(UserError, match="pretrain_64"):
        run("--resume")
    assert left_in(run.out) == before


def test_no_flipped_bit_and_no_cut_passes(finished):
    folder = states_in(finished)[24].parent
    rng = random.Random(0)
    for path in (path for path in sorted((folder / "step-24").iterdir()) for _ in range(5)):
        good = path.read_bytes()
        at = rng.randrange(len(good))
        flipped = bytearray(good)
        flipped[at] ^= 1 << rng.randrange(8)
        for bad in (bytes(flipped), good[:at], good + b"\n"):
            path.write_bytes(bad)
            assert newest_state(folder).path.name == "step-20", (path, at)
        path.write_bytes(good)
    assert newest_state(folder).path.name == "step-24"


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_all_files_of_a_state_have_ordinary_permissions(finished, tmp_path):
    (tmp_path / "plain").touch()
    files = [tmp_path / "plain", *states_in(finished)[24].iterdir()]
    assert len(files) == 5 and len({path.stat().st_mode for path in files}) == 1


def test_every_change_that_matters_is_refused_in_one_sentence(run, trained, tmp_path):
    other = tmp_path / "texts.jsonl"
    other.write_bytes(trained.texts.read_bytes() + b'{"text": "one more"}\n')
    changed = {"learning_rate": 5e-3, "optimizer": "adamw", "seed": 5, "val_tokens": 64}
    with pytest.raises(UserError) as refused:
        run("--resume", data_path=other, **changed)
    before = {"learning_rate": 2e-3, "optimizer": "muon", "seed": 1337, "val_tokens": 256}
    for name, value in changed.items():
        assert f"{name} was {before[name]} and is now {value}" in str(refused.value)
    assert "file 1 of data_path changed since step 24" in str(refused.value)
    assert "start a new run in another out_dir" in str(refused.value)


def test_a_stop_validates_nothing_and_a_skill_goes_on_with_its_base_and_general_data_only(
    trained, tmp_path, monkeypatch
):
    settings = {"batch_size": 8, "out_dir": tmp_path / "out"}
    door, argv = door_and_flags("lora", trained, **settings)
    steps, validate = [], Validation.__call__

    def watched(validation, step):
        steps.append(step)
        return validate(validation, step)

    monkeypatch.setattr(Validation, "__call__", watched)
    cut_short(monkeypatch, 7, signal.SIGTERM)
    with pytest.raises(Stopped):
        door.main(argv)
    assert max(states_in(tmp_path / "out")) == 7 and steps == [0, 3, 6]
    metrics = read_lora(tmp_path / "out" / "lora" / "lora_x_64.pth")[1].metrics
    assert metrics["step"] == metrics["domain"]["best"]["step"] == 6
    assert [metrics["domain"][when]["step"] for when in ("first", "last")] == [0, 6]
    other = tmp_path / trained.general.name
    other.write_bytes(trained.general.read_bytes().partition(b"\n")[2])
    base = tmp_path / "full_sft_64.pth"  # the name stays, the weights are others
    for ending in (".pth", ".json"):
        found = (trained.out / "pretrain_64").with_suffix(ending)
        shutil.copyfile(found, base.with_suffix(ending))
    for change, named in (
        ({"general_data": other}, "file 1 of general_data"),
        ({"base": base}, "the base"),
    ):
        argv = door_and_flags("lora", trained, **settings | change)[1]
        with pytest.raises(UserError, match=f"the content of {named} changed since step 7"):
            door.main([*argv, "--resume"])


def test_a_run_is_resumed_with_the_skill_that_it_started_from(trained, tmp_path):
    skill = trained.out / "lora" / "lora_a_64.pth"
    settings = {"batch_size": 8, "out_dir": tmp_path, "max_steps": 1, "skill": skill}
    door, argv = door_and_flags("lora", trained, **settings)
    door.main(argv)
    moved = shutil.copyfile(skill, tmp_path / "moved.pth")
    door.main([*argv, "--resume", "--skill", str(moved)])
    other = str(skill.with_name("lora_b_64.pth"))
    with pytest.raises(UserError, match=r"the content of .* skill changed since step 1"):
        door.main([*argv, "--resume", "--skill", other])


def test_what_may_change_may_change(run, trained, tmp_path):
    doors = train_lora.Options, train_lora_classifier.Options
    assert all(any(hasattr(door, field) for door in doors) for field in MAY_CHANGE)
    moved = tmp_path / "renamed.jsonl"
    moved.write_bytes(trained.texts.read_bytes())
    run("--resume", data_path=moved, log_interval=3, save_interval=7, num_workers=1)


def test_resume_without_a_state_starts_and_says_so(run, finished, capsys):
    shutil.rmtree(run.out / "checkpoints")
    run("--resume")
    printed = capsys.readouterr().out
    assert "there is no state in" in printed and "starting clean" in printed
    assert left_in(run.out) == left_in(finished)


def test_a_state_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    write_state(tmp_path, 1, {"a": torch.ones(2)}, {}, "", starts_over=False)
    (tmp_path / "step-9").touch()  # a file is no state
    assert [step for step, _ in saved_states(tmp_path)] == [1]

    def refused(path: Path) -> bytes:  # the tests may run as a user who may read everything
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(UserError, match=r"step-1.*: Permission denied"):
        newest_state(tmp_path)


def test_a_run_that_saved_while_this_one_started_is_noticed(tmp_path):
    states = RunStates(tmp_path / "states", {}, resume=False)
    (tmp_path / "states" / "step-3").mkdir(parents=True)
    with pytest.raises(UserError, match=r"another run .*states"), states.alone():
        pass


def test_a_new_run_deletes_the_old_states_at_its_first_save_and_not_before(
    run, monkeypatch, capsys
):
    cut_short(monkeypatch, 1)
    with pytest.raises(Crash):
        run(seed=3)
    assert "note:" not in capsys.readouterr().out  # what is there was finished
    shutil.rmtree(states_in(run.out)[24])
    cut_short(monkeypatch, 4)
    with pytest.raises(Crash):
        run(seed=3)
    assert "holds a run that got to step 20 of 24" in capsys.readouterr().out
    assert list(states_in(run.out)) == [20]
    cut_short(monkeypatch, 5)
    with pytest.raises(Crash):
        run(seed=3)
    assert list(states_in(run.out)) == [4]


def test_a_state_is_on_disk_before_it_takes_its_name_and_others_go_after(tmp_path, monkeypatch):
    def write(step: int) -> None:
        write_state(tmp_path, step, {"a": torch.ones(2)}, {}, "", starts_over=False)

    write(1), write(2)
    calls = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(
        os, "rename", lambda a, b: (calls.append(f"{a.name} -> {b.name}"), rename(a, b))
    )
    write(3)
    folders = ["fsync"] * (os.name != "nt")  # Windows cannot sync a folder
    taken = [*["fsync"] * 4, *folders, ".new-step-3 -> step-3", *folders]
    assert calls == [*taken, "step-1 -> .old-step-1"]
    assert [step for step, _ in saved_states(tmp_path)] == [3, 2]


def test_left_over_folders_of_a_kill_are_cleared_away(run):
    folder = states_in(run.out)[24].parent
    (folder / ".new-step-99").mkdir()
    shutil.move(folder / "step-24", folder / ".old-step-24")
    run("--resume")
    assert list(states_in(run.out)) == [24, 20]


def test_a_full_disk_is_one_sentence_and_harms_nothing(run, finished):
    resource = pytest.importorskip("resource")  # there is none on Windows
    shutil.rmtree(states_in(run.out)[24])
    before = left_in(finished)[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Less than a state needs, more than the weights.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, hard))
    try:
        with pytest.raises(UserError, match="pretrain_64"):
            run("--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(states_in(run.out)) == [20]
    assert left_in(run.out)[0] == before
    run("--resume")
    assert left_in(run.out) == left_in(finished)


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: MuonAdamW(groups, 1e-2),
        lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
        lambda groups: torch.optim.NAdam(groups, lr=1e-2),
        lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
    ],
)
def test_any_optimizer_goes_on_where_it_was(tmp_path, make):
    cpu = Runtime.start("cpu")

    def parts():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
        return model, make(param_groups(model, 0.1, "muon")), cpu.scaler()

    def steps(model, optimizer, count):
        for _ in range(count):
            model(torch.rand(3, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer, scaler = parts()
    steps(model, optimizer, 3)
    states = RunStates(tmp_path, {}, resume=False)
    trained = Trained(model, optimizer, scaler)
    states.save(trained, cpu, cpu.rng_states(), Progress(3), metrics="", total_steps=6)
    steps(model, optimizer, 3)

    other, optimizer, scaler = parts()
    found = RunStates(tmp_path, {}, resume=True)
    assert found.restore(Trained(other, optimizer, scaler), cpu).step == 3
    steps(other, optimizer, 3)
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def test_the_scale_of_fp16_goes_on_where_it_was(tmp_path):
    cpu, model = Runtime.start("cpu"), torch.nn.Linear(2, 2)
    optimizer = MuonAdamW(param_groups(model, 0.1), 1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model(torch.rand(3, 2)).sum().backward()
    optimizer.step()
    states, trained = RunStates(tmp_path, {}, resume=False), Trained(model, optimizer, scaler)
    states.save(trained, cpu, cpu.rng_states(), Progress(1), metrics="", total_steps=6)
    fresh = torch.amp.GradScaler("cpu")
    RunStates(tmp_path, {}, resume=True).restore(Trained(model, optimizer, fresh), cpu)
    assert fresh.state_dict() == scaler.state_dict() and fresh.get_scale() == 1024.0
