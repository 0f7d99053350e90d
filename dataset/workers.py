"""Work in several processes: in order, a little at a time, and nobody is left behind."""

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from core.errors import STOPPING, UserError

Item, Result = TypeVar("Item"), TypeVar("Result")
AHEAD = 2  # items on the way for each process: one in work, one waiting
THREADS = "TOKENIZERS_PARALLELISM"  # each process has one core; also, a fork would be warned of


def by_workers(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """``function(item)`` for each item, in order, computed by ``workers`` processes.

    Function, items and results must pickle. Items are drawn as results are taken. The processes
    ignore ``STOPPING`` from their birth on, because a terminal sends Ctrl-C to them too, and the
    caller needs them until it has saved. They end when the generator is closed (see
    ``contextlib.closing``) or exhausted, and when the calling process ends. Raises here what
    ``function`` raises, and ``UserError`` if a process was killed.
    """
    loader = DataLoader(
        _Work(function),
        batch_size=None,
        sampler=items,
        num_workers=workers,
        prefetch_factor=AHEAD,
        collate_fn=_unchanged,
        worker_init_fn=_begin,
        generator=torch.Generator(),  # it draws a seed: from the global one, resuming would differ
    )
    started: list[multiprocessing.Process] = []
    end = partial(_kill, started)
    atexit.register(end)  # multiprocessing would send them a SIGTERM and wait for ever
    try:
        with _birth_of(started):
            results = iter(loader)
        for result in results:
            if isinstance(result, UserError):
                raise result
            yield result
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = "a worker process was killed, perhaps by the system for want of memory"
        raise UserError(f"{reason}: free some and start again, or use fewer workers") from error
    finally:
        end()
        atexit.unregister(end)


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Work:
    """What a loader takes for a data set: an item is the index of its result."""

    function: Callable[[Any], Any]

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.function(item)
        except UserError as error:  # raised here, its sentence would arrive inside a traceback
            return error


def _unchanged(result: Any) -> Any:
    return result


def _begin(worker: int) -> None:
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers, which would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextmanager
def _birth_of(started: list[multiprocessing.Process]) -> Iterator[None]:
    """Collect the processes that start inside; tokenizers use one thread there.

    ``STOPPING`` waits there too: a spawned process imports for seconds before it runs ``_begin``.
    """
    before, threads = multiprocessing.active_children(), os.environ.get(THREADS)
    os.environ[THREADS] = "false"
    if has_signals := hasattr(signal, "pthread_sigmask"):  # not on Windows
        if multiprocessing.get_start_method() != "fork":
            resource_tracker.ensure_running()  # its start lets signals through again
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        on_death = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        started += [child for child in multiprocessing.active_children() if child not in before]
        if has_signals:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if threading.current_thread() is threading.main_thread():
                # torch's handler would raise a worker's death wherever the caller happens to be.
                signal.signal(signal.SIGCHLD, on_death)
        os.environ.pop(THREADS) if threads is None else os.environ.update({THREADS: threads})


def _kill(processes: list[multiprocessing.Process]) -> None:
    for process in processes:
        process.kill()
        process.join()
