"""How long OpenMP's threads spin while they wait: it decides how fast small models train."""

import os
import time
from pathlib import Path

# How long a thread that waits keeps its core busy: GNU's turns, Intel's and LLVM's ms. Beside
# another busy program, spinning takes the cores from the very threads that are waited for.
SHORT = {"GOMP_SPINCOUNT": "1500", "KMP_BLOCKTIME": "1"}
# Where nothing else works, the threads wait for each other alone: small products follow so soon
# that to wake a thread takes longer. benchmarks/results/busy_laptop.json
LONG = SHORT | {"GOMP_SPINCOUNT": "10000"}
NAMES = (*SHORT, "OMP_WAIT_POLICY")
LOOKED = 0.05  # seconds: five of the system's ticks a core
BUSY = 0.5  # cores


def limit_spinning() -> None:
    """Let waiting threads sleep soon, unless the user decided. Call before torch is loaded."""
    chosen = {name: os.environ[name] for name in NAMES if name in os.environ}
    if chosen in ({}, SHORT, LONG):  # by nobody, or by the process of ours that started this one
        os.environ.update(LONG if is_quiet() else SHORT)


def is_quiet(stat: Path = Path("/proc/stat")) -> bool:
    """Whether the cores that this process may use are free; False where the system does not say."""
    try:
        before = ticks(stat.read_text())
        time.sleep(LOOKED)
        after = ticks(stat.read_text())
        cores = len(os.sched_getaffinity(0))
    except (OSError, AttributeError, ValueError, IndexError):  # not Linux, or one that hides it
        return False
    work, total = (now - then for now, then in zip(after, before, strict=True))
    return work * cores < BUSY * total


def ticks(stat: str) -> tuple[int, int]:
    """From Linux's /proc/stat: ticks in which this process's cores worked, and all of them."""
    cores = {f"cpu{n}" for n in os.sched_getaffinity(0)}
    lines = [line.split() for line in stat.splitlines()]
    counts = [list(map(int, line[1:9])) for line in lines if line and line[0] in cores]
    total = sum(map(sum, counts))
    return total - sum(each[3] + each[4] for each in counts), total  # idle, and waiting for disks
