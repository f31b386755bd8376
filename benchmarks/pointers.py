"""A million pointers made and dropped: does anything grow?

By turns a small tensor is sent, an operation is run on it, and a function is run; every pointer is
dropped at once, like the results of a loop that nobody keeps. Afterwards the worker's table must be
empty, and memory of parent and worker in the last tenth that of the first.
"""

import gc
import time

import psutil
import torch

import fedproc as fp
from benchmarks.measure import Row, main, row

POINTERS = 1_000_000
TENTHS = 10
AT_ONCE = 10_000  # on their way before they are waited for: else their number sets the peak
MIB = 2**20


def turns(worker, kept, count: int) -> None:
    """``count`` pointers, dropped as they come."""
    small = torch.ones(4)
    for number in range(0, count, 4):
        worker.send(small)
        kept + number
        worker.run(abs, -number)
        kept.neg()


def some(cluster, kept, count: int) -> None:
    """``count`` of them, waited for now and then."""
    for _ in range(0, count, AT_ONCE):
        turns(kept.worker, kept, min(count, AT_ONCE))
        cluster.wait()


def resident(pid: int) -> float:
    """Bytes of a process that it shares with nobody (PSS would move with what others share)."""
    return float(psutil.Process(pid).memory_full_info().uss)


def benchmark(quick: bool) -> list[Row]:
    tenth = (4_000 if quick else POINTERS) // TENTHS
    seconds, parent, there = [], [], []
    with fp.Cluster(1) as cluster:
        (worker,) = cluster
        kept = worker.send(torch.ones(4))
        some(cluster, kept, tenth)  # what is allocated once is not counted
        for _ in range(TENTHS):
            started = time.perf_counter()
            some(cluster, kept, tenth)
            seconds.append(time.perf_counter() - started)
            gc.collect()
            parent.append(resident(psutil.Process().pid))
            there.append(resident(worker.pid))
        left, arena = len(worker.objects) - 1, worker.stats().arena_bytes
        handles = len(worker.link.outbox.handles) - 1
    pointers = tenth * TENTHS
    return [
        row(f"{pointers:,} pointers made and dropped", "s", [sum(seconds)]),
        row("  one of them", "us", [one / tenth for one in seconds], scale=1e6),
        row("  left in the worker's table", "ids", [float(left)]),
        row("  left in the parent's table", "ids", [float(handles)]),
        row("  worker's shared memory at the end", "MiB", [float(arena)], scale=1 / MIB),
        row(
            "  private memory of the parent after the first tenth", "MiB", parent[:1], scale=1 / MIB
        ),
        row("    after the last", "MiB", parent[-1:], scale=1 / MIB),
        row(
            "  private memory of the worker after the first tenth", "MiB", there[:1], scale=1 / MIB
        ),
        row("    after the last", "MiB", there[-1:], scale=1 / MIB),
    ]


if __name__ == "__main__":
    main("pointers", benchmark)
