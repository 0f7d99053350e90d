"""Processes that prepare batches: they leave it to the training process what a Ctrl-C means, and
end when it ends.
"""

import atexit
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from torch.utils.data import DataLoader

from core.errors import STOPPING
from dataset.parallel import end_with_parent


def started(loader: DataLoader) -> Iterator:
    """What ``loader`` gives; its processes, if it has any, take no notice of ``STOPPING`` from
    their birth on.

    A terminal sends a Ctrl-C to them too, and the training process needs them until it has saved.
    """
    if not loader.num_workers:
        return iter(loader)
    loader.worker_init_fn = _outlive_signals
    atexit.unregister(_kill_workers)
    atexit.register(_kill_workers)
    with _signals_kept_back():
        return iter(loader)


def _outlive_signals(worker: int) -> None:
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def _signals_kept_back() -> Iterator[None]:
    """Inside, ``STOPPING`` waits, and for ever in a process that is born there: one that is spawned
    imports for seconds before it gets to ``_outlive_signals``. Windows has no such thing."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # its start lets signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill_workers() -> None:
    """What a crash leaves at work: multiprocessing would send it a SIGTERM and wait for ever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(
            signal.SIGCHLD, signal.SIG_DFL
        )  # torch's handler reports the death of a worker
    for worker in multiprocessing.active_children():
        worker.kill()
