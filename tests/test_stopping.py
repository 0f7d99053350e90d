"""A run that is asked to stop, left alone, or started twice ends in good order."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import Source, ragged_batch, run_training

from core.errors import STOPPING, Stopped, UserError
from core.paths import REPOSITORY
from trainer import run
from trainer.loop import causal_loss_sum


def test_ctrl_c_ends_the_step_saves_and_interrupts(tiny_model, tmp_path):
    passes, saved = [], []

    def interrupted(model, batch):
        passes.append(None)
        if len(passes) == 1 + 3:  # after the warm-up, in step 3
            signal.raise_signal(signal.SIGINT)
        return causal_loss_sum(model, batch)

    handler, source = signal.getsignal(signal.SIGINT), Source([ragged_batch(2, seed=11)])
    settings = {"epochs": 50, "loss": interrupted, "write": saved.append}
    with pytest.raises(Stopped):
        run_training(tiny_model, source, tmp_path, **settings)
    assert [metrics["step"] for metrics in saved] == [3]  # it was finished
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_stop_before_the_first_step_leaves_everything_as_it_was(tiny_model, tmp_path, capsys):
    source = Source([ragged_batch(2, seed=11)])
    run_training(tiny_model, source, tmp_path, max_steps=2)
    before = sorted(tmp_path.rglob("*"))

    def interrupted(model, batch):
        signal.raise_signal(signal.SIGINT)
        return causal_loss_sum(model, batch)

    settings = {"loss": interrupted, "write": lambda metrics: pytest.fail("saved")}
    with pytest.raises(Stopped):
        run_training(tiny_model, source, tmp_path, **settings)
    assert "stopped by SIGINT after step 0 of 4" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("asked", "error", "steps"), [(True, Stopped, [2]), (False, RuntimeError, [])]
)
def test_a_signal_that_ends_the_processes_of_the_source_too_still_saves(
    tiny_model, tmp_path, asked, error, steps
):
    """As on Windows, where a worker that is still importing cannot be kept from a Ctrl-C."""

    class Dying(Source):
        def steps(self, epoch: int, start: int = 0):
            if epoch == 2:
                if asked:
                    signal.raise_signal(signal.SIGINT)
                raise RuntimeError("DataLoader worker exited unexpectedly")
            return super().steps(epoch, start)

    saved, source = [], Dying([ragged_batch(2, seed=11)])
    with pytest.raises(error):
        run_training(tiny_model, source, tmp_path, write=saved.append)
    assert [metrics["step"] for metrics in saved] == steps


HOLDER = """
from pathlib import Path
from core.files import try_lock
path = Path("states/run.lock")
path.parent.mkdir()
with path.open("a") as file:
    print(try_lock(file), flush=True)
    input()
"""


def test_a_second_run_at_the_same_states_is_refused_until_the_first_is_dead(tiny_model, tmp_path):
    settings = {"env": os.environ | {"PYTHONPATH": str(REPOSITORY)}, "cwd": tmp_path, "text": True}
    settings |= {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    source = Source([ragged_batch(2, seed=11)])
    with subprocess.Popen([sys.executable, "-c", HOLDER], **settings) as holder:
        assert holder.stdout.readline() == "True\n"
        with pytest.raises(UserError, match=r"another run .*states"):
            run_training(tiny_model, source, tmp_path)
        assert [path.name for path in tmp_path.rglob("*")] == ["states", "run.lock"]
        run_training(tiny_model, source, tmp_path, dry_run=True)
        holder.kill()
    assert run_training(tiny_model, source, tmp_path).steps == 4


def test_a_second_signal_acts_at_once_but_an_echo_does_not(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    with pytest.raises(KeyboardInterrupt), run.stop_requests() as request:
        signal.raise_signal(signal.SIGTERM)
        assert request.signum == signal.SIGTERM
        now[0] += 0.5
        signal.raise_signal(signal.SIGINT)  # torchrun passes on what the terminal has already sent
        assert request.signum == signal.SIGTERM
        now[0] += run.ECHO_SECONDS
        signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
def test_a_closed_terminal_stops_a_run_unless_it_was_told_to_outlast_that():
    # As for a job in the background of a script.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with run.stop_requests() as request:
            signal.raise_signal(signal.SIGINT)
            assert not request.signum
            assert signal.SIGHUP in STOPPING
            signal.raise_signal(signal.SIGHUP)
            assert request.signum == signal.SIGHUP
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
