"""How quickly an end is noticed: a killed worker by its parent, a killed parent by its workers.

The time runs from just before SIGKILL. The worst sample stands in a line of its own: a median hides
the one that matters. Under load, as many busy processes as there are cores run beside.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fedproc as fp
from benchmarks.measure import ROOT, Row, main, row
from fedproc.memory.pages import usable_cores

MILLISECONDS = 1e3
GIVE_UP_S = 30.0
BUSY = "while True: pass"
PARENT = """
import json, os, time
import fedproc as fp
cluster = fp.Cluster(4)
held = [cluster.workers[0].run(lambda: [None for _ in iter(int, 1)])]
held.append(cluster.workers[1].run(time.sleep, 1000))
print(json.dumps([worker.pid for worker in cluster]), flush=True)
time.sleep(1000)
"""


def lose_a_worker(cluster: fp.Cluster) -> float:
    """Seconds from SIGKILL to the error in this thread, which waits for a result."""
    worker = cluster["bob"]
    pointer = worker.run(time.sleep, 1000)
    worker.link.flush()
    started = time.perf_counter()
    os.kill(worker.pid, signal.SIGKILL)
    try:
        pointer.wait()
    except fp.WorkerLostError:
        return time.perf_counter() - started
    raise RuntimeError("a killed worker has answered")


def lose_the_parent() -> float:
    """Seconds from the parent's SIGKILL to the end of its last worker."""
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = json.loads(parent.stdout.readline())
        started = time.perf_counter()
        parent.kill()
        while any(runs(pid) for pid in pids):
            if time.perf_counter() - started > GIVE_UP_S:
                raise RuntimeError(f"workers outlived their parent by {GIVE_UP_S:g} s: {pids}")
            time.sleep(0.0002)
        return time.perf_counter() - started


def runs(pid: int) -> bool:
    """Whether a process has not ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


@contextlib.contextmanager
def load() -> Iterator[None]:
    """A busy process per core."""
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(usable_cores())]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def rows(what: str, samples: list[float]) -> list[Row]:
    """The median with its quartiles, and the worst."""
    return [
        row(what, "ms", samples, scale=MILLISECONDS),
        row("  the worst of them", "ms", [max(samples)], scale=MILLISECONDS),
    ]


def benchmark(quick: bool) -> list[Row]:
    workers, parents = (3, 1) if quick else (100, 50)
    with fp.Cluster(["alice", "bob"], restart=True) as cluster:
        lose_a_worker(cluster)
        idle = [lose_a_worker(cluster) for _ in range(workers)]
        with load():
            loaded = [lose_a_worker(cluster) for _ in range(workers)]
    ends = [lose_the_parent() for _ in range(parents)]
    return [
        *rows("SIGKILL of a worker to WorkerLostError", idle),
        *rows("  the same beside a busy process per core", loaded),
        *rows("SIGKILL of the parent to the end of 4 workers", ends),
    ]


if __name__ == "__main__":
    main("detection", benchmark)
