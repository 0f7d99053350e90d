"""Work spread over processes: in order, a little at a time, and nobody is left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest

from core.errors import UserError
from core.paths import REPOSITORY
from dataset.parallel import AHEAD, in_order

PROGRAM = f"""
import os, sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
from core.errors import run
from dataset.parallel import in_order

def work(shared, item):
    time.sleep(0.05)
    return os.getpid()

def main():
    for process in in_order(work, None, range(1000), 2):
        print(process, flush=True)
        time.sleep(0.5)  # the workers have nothing left to do meanwhile

if __name__ == "__main__":
    run(main)
"""


def slowest_first(shared, item):
    time.sleep(0.02 * (item % 3 == 0))
    return shared * item, os.environ.get("TOKENIZERS_PARALLELISM")


def fails(shared, item):
    if item == shared:
        raise ValueError(f"item {item}")
    return item


def dies(shared, item):
    if item == shared:
        os._exit(9)
    return item


def leaves_a_mark(shared, item):
    (shared / str(item)).touch()
    time.sleep(0.5 * (item > 0))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order_and_items_are_drawn_as_needed(workers, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    drawn = []
    items = (drawn.append(n) or n for n in range(30))
    for taken, (result, threads) in enumerate(in_order(slowest_first, 7, items, workers)):
        assert result == 7 * taken and len(drawn) <= taken + AHEAD * workers
        assert threads == (None if workers == 1 else "false")
    assert len(drawn) == 30 and "TOKENIZERS_PARALLELISM" not in os.environ


def test_what_fails_in_a_process_is_raised_here():
    with pytest.raises(ValueError, match="item 5"):
        list(in_order(fails, 5, range(100), 2))
    assert multiprocessing.active_children() == []


def test_a_killed_process_is_one_sentence():
    with pytest.raises(UserError, match="a worker process was killed"):
        list(in_order(dies, 5, range(100), 2))
    assert multiprocessing.active_children() == []


def test_whoever_stops_early_leaves_no_process():
    with closing(in_order(slowest_first, 1, range(1000), 2)) as results:
        next(results)
    assert multiprocessing.active_children() == []


def test_what_waits_when_the_generator_is_closed_is_not_begun(tmp_path):
    with closing(in_order(leaves_a_mark, tmp_path, range(1000), 2)) as results:
        next(results)  # the others are at items 1 and 2
    assert "3" not in {path.name for path in tmp_path.iterdir()}


@pytest.mark.skipif(sys.platform == "win32", reason="signals to groups of processes are of Unix")
@pytest.mark.parametrize("end", ["Ctrl-C", "kill"])
def test_no_worker_outlives_its_parent(tmp_path, end):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    command = [sys.executable, str(program)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, text=True, **pipes) as parent:
        workers = {int(parent.stdout.readline()) for _ in range(3)}
        time.sleep(0.25)
        if end == "Ctrl-C":  # a terminal sends it to the whole group
            os.killpg(parent.pid, signal.SIGINT)
        else:
            parent.kill()
        _, err = parent.communicate(timeout=60)
    assert workers and (parent.returncode, err) in [
        (130, "error: interrupted\n"),
        (-signal.SIGKILL, ""),
    ]
    until = time.monotonic() + 30
    while any(map(is_alive, workers)):
        assert time.monotonic() < until, "a worker is left"
        time.sleep(0.05)


def is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return not is_zombie(process)


def is_zombie(process):
    """Dead, but not collected yet by a parent that does not collect (process 1 of some
    containers).
    """
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True
    )
    return state.stdout.strip().startswith("Z")
