"""A run that is asked to stop finishes its step and saves before it goes."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from core.errors import ECHO_SECONDS, STOPPING


@dataclass
class StopRequest:
    """``signum``: the signal that asked for the stop, 0 while none did."""

    signum: int = 0
    at: float = 0.0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, the first signal of ``STOPPING`` is noted in the request; another one, seconds later,
    acts at once.

    What the process was started to ignore, by nohup say, stays ignored. Only the main thread may
    set handlers: in another one nothing is noted.
    """
    request = StopRequest()

    def on_signal(signum: int, frame: object) -> None:
        if not request.signum:
            request.signum, request.at = signum, time.monotonic()
        elif time.monotonic() - request.at > ECHO_SECONDS:
            signal.signal(signum, before[signum])
            signal.raise_signal(signum)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {
            signum: handler
            for signum in STOPPING
            if (handler := signal.getsignal(signum)) != signal.SIG_IGN
        }
    for signum in before:
        signal.signal(signum, on_signal)
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
