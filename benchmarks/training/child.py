"""A measured process: orders come in as JSON lines, figures go out, so that several processes can
take turns.

Nothing of this repository is imported here: MiniMind's process, whose package is called ``model``
too, uses it as well.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

SGEMM_SIZE = 2048
SGEMM_RUNS = 3  # a round; the best of all rounds counts


class Orders:
    """The parent's orders, one at a time; each must be answered by ``reply``."""

    def __init__(self):
        # Whatever else is printed in this process, by any library, goes to the log.
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def __iter__(self) -> Iterator[dict]:
        for line in sys.stdin:
            yield json.loads(line)

    def reply(self, **figures: object) -> None:
        print(json.dumps(figures), file=self._answers, flush=True)


def sgemm_gflops(size: int = SGEMM_SIZE) -> float:
    """GFLOP/s of the best of a few fp32 products of square matrices, in this process and its
    threads.
    """
    a, b = torch.randn(2, size, size).unbind()
    out = torch.empty_like(a)
    return (
        2 * size**3 / min(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(SGEMM_RUNS)) / 1e9
    )


def bare_mib() -> float:
    """This process's memory before it makes its model; the libraries behind the products are loaded
    by then.
    """
    x = torch.randn(1, 1, 32, 32, requires_grad=True)
    torch.nn.functional.scaled_dot_product_attention(x @ x, x, x, is_causal=True).sum().backward()
    return memory_mib(peak=False)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def memory_mib(peak: bool) -> float:
    """This process's memory in RAM: now, or the most it ever was. NaN where the system does not
    tell (Windows).
    """
    status = Path("/proc/self/status")
    if (
        status.is_file()
    ):  # of this program alone; ru_maxrss would count the parent's memory before it started us
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) / 1024
    try:
        import resource
    except ModuleNotFoundError:
        return float("nan")
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )  # macOS counts bytes, and knows the peak alone
