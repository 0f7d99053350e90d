"""Work in several processes: in order, a little at a time, deaf to signals, and nobody is left
behind.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial

import pytest

from core.errors import STOPPING, UserError
from core.paths import REPOSITORY
from dataset.workers import AHEAD, by_workers

PROGRAM = """
import os, sys, time
from core.errors import run
from dataset.workers import by_workers

def work(item):
    time.sleep(0.05)
    return os.getpid()

def main():
    results = by_workers(work, range(1000), 2)
    for process in results:
        print(process, flush=True)
        if sys.argv[1] == "crash":
            raise ValueError("a bug")
        time.sleep(0.5)  # the workers have nothing left to do meanwhile

if __name__ == "__main__":
    run(main)
"""


def slowest_first(item):
    time.sleep(0.02 * (item % 3 == 0))
    return 7 * item, os.environ["TOKENIZERS_PARALLELISM"]


def fail_at(end, item):
    if item == 5:
        end()
    return item


def value_error():
    raise ValueError("item 5")


def user_error():
    raise UserError("a sentence")


def deafness(_):
    """Which of ``STOPPING`` this process keeps back, and which it ignores."""
    back = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return [(n in back, signal.getsignal(n) == signal.SIG_IGN) for n in STOPPING]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_items_are_drawn_as_needed(workers, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    drawn = []
    items = (drawn.append(n) or n for n in range(30))
    for taken, (result, threads) in enumerate(by_workers(slowest_first, items, workers)):
        assert result == 7 * taken and len(drawn) <= taken + 1 + AHEAD * workers
        assert threads == "false" and "TOKENIZERS_PARALLELISM" not in os.environ
    assert len(drawn) == 30 and multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("end", "error", "message"),
    [
        (value_error, ValueError, "item 5"),
        (user_error, UserError, r"^a sentence$"),
        (partial(os._exit, 9), UserError, "process was killed"),
    ],
)
def test_what_fails_in_a_process_is_raised_here(end, error, message):
    with pytest.raises(error, match=message):
        list(by_workers(partial(fail_at, end), range(100), 2))
    assert multiprocessing.active_children() == []


def test_an_item_that_cannot_be_drawn_is_the_caller_s(tmp_path):
    def items():
        yield 1
        raise UserError("a sentence")

    with pytest.raises(UserError, match=r"^a sentence$"):
        list(by_workers(abs, items(), 1))
    assert multiprocessing.active_children() == []


def test_whoever_stops_early_leaves_no_process():
    with closing(by_workers(slowest_first, range(1000), 2)) as results:
        next(results)
        with closing(by_workers(slowest_first, range(1000), 1)) as others:
            next(others)
        assert len(multiprocessing.active_children()) == 2, "each ends its own"
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot keep signals back")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_are_deaf_to_a_stop_from_their_birth_on(method):
    """Kept back: already while they import. Ignored: in case another process of theirs, forkserver,
    was born before.
    """
    before = multiprocessing.get_start_method()
    handler = signal.getsignal(signal.SIGCHLD)
    multiprocessing.set_start_method(method, force=True)
    try:
        assert list(by_workers(deafness, [0], 1)) == [[(True, True)] * len(STOPPING)]
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOPPING)
    assert signal.getsignal(signal.SIGCHLD) == handler


def program(folder, end):
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    settings = {"env": os.environ | {"PYTHONPATH": str(REPOSITORY)}, "cwd": folder, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "program.py", end]
    return subprocess.Popen(command, start_new_session=True, **settings, **pipes)


def test_a_crash_ends_the_process(tmp_path):
    """Its traceback keeps the workers alive to the end, where multiprocessing would wait for them
    for ever.
    """
    with program(tmp_path, "crash") as parent:
        _, err = parent.communicate(timeout=60)
    assert parent.returncode == 1 and err.strip().endswith("ValueError: a bug")


@pytest.mark.skipif(sys.platform == "win32", reason="signals to groups of processes are of Unix")
@pytest.mark.parametrize("end", ["Ctrl-C", "kill"])
def test_no_worker_outlives_its_parent(tmp_path, end):
    with program(tmp_path, end) as parent:
        workers = {int(parent.stdout.readline()) for _ in range(3)}
        time.sleep(0.25)
        if end == "Ctrl-C":  # a terminal sends it to the whole group
            os.killpg(parent.pid, signal.SIGINT)
        else:
            parent.kill()
        _, err = parent.communicate(timeout=60)
    expected = {"Ctrl-C": (130, "error: interrupted\n"), "kill": (-signal.SIGKILL, "")}
    assert workers and (parent.returncode, err) == expected[end]
    until = time.monotonic() + 30
    while any(map(is_alive, workers)):
        assert time.monotonic() < until, "a worker is left"
        time.sleep(0.05)


def is_alive(process):
    """Not dead yet, nor dead but not collected by a parent that does not collect (process 1 of some
    containers).
    """
    command = ["ps", "-o", "stat=", "-p", str(process)]
    state = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")
