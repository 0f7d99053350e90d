"""One function over many items by several processes: in order, and with few items on the way at a
time.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from core.errors import UserError

Item, Result = TypeVar("Item"), TypeVar("Result")
AHEAD = 2  # items on the way for each process: one in work, one waiting
MOST_WORKERS = 16  # where one reading and writing process becomes the bottleneck


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    function: Callable[[Any, Item], Result], shared: Any, items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """``function(shared, item)`` of each item, in the order of the items, by ``workers`` processes
    (1: by this one).

    Everything must pickle, ``function`` by its name; ``shared`` travels once to each process. Items
    are drawn as results are taken. Close the generator (``contextlib.closing``) to end the
    processes: each finishes its item. An exception in ``function`` is raised here. Raises
    ``UserError`` when a process was killed.
    """
    if workers <= 1:
        yield from (function(shared, item) for item in items)
        return
    waiting: deque = deque()
    context = multiprocessing.get_context()
    closed = context.Event()
    with (
        _serial_tokenizers(),
        ProcessPoolExecutor(workers, context, _start, (function, shared, closed)) as pool,
    ):
        try:
            for item in items:
                waiting.append(pool.submit(_call, item))
                if len(waiting) == AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, by the system perhaps, for want of memory: free some and start again,"
                " or prepare the data with scripts/prepare_data.py --workers 1"
            ) from error
        finally:
            closed.set()  # what the pool has handed out already, it cannot cancel
            pool.shutdown(cancel_futures=True)


@contextmanager
def _serial_tokenizers() -> Iterator[None]:
    """Each process has one core: the tokenizers library must not start threads in it, nor warn of a
    fork.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


_job: tuple | None = None  # of a worker process


def _start(*job: Any) -> None:
    global _job
    _job = job
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches every process of a terminal; the parent decides
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A killed parent cannot tell its workers, which would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(item: Any) -> Any:
    function, shared, closed = _job
    return None if closed.is_set() else function(shared, item)
