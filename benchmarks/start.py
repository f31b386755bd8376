"""What it takes to have workers: time until they serve, and memory of each.

The first cluster of a process pays for a helper process that imports torch; every worker after it
is forked from that helper. The first ones are therefore started in new interpreters, in turns with
an interpreter that only imports torch.
"""

import subprocess
import sys

import psutil
import torch
from torch import nn

import fedproc as fp
from benchmarks.measure import ROOT, Row, main, paired, ratio, row, seconds_of

MILLISECONDS = 1e3
MIB = 2**20

FIRST = """
import time
started = time.perf_counter()
import fedproc as fp
with fp.Cluster({workers}):
    print(time.perf_counter() - started)
"""
TORCH = """
import time
started = time.perf_counter()
import torch
print(time.perf_counter() - started)
"""


def in_new_interpreter(code: str) -> float:
    """The seconds that ``code`` tells about itself."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return float(done.stdout)


def start_another(workers: int) -> float:
    """Seconds until a cluster is ready in a process that has had one."""
    clusters: list[fp.Cluster] = []
    seconds = seconds_of(lambda: clusters.append(fp.Cluster(workers)))
    clusters[0].close()
    return seconds


def step_once(worker: fp.Worker) -> tuple[object, ...]:
    """One step of SGD on a small net; what it needs stays in the worker."""
    x, y = worker.send(torch.randn(32, 64)), worker.send(torch.randint(10, (32,)))
    model = worker.send(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
    optimizer = worker.run(torch.optim.SGD, model.parameters(), lr=0.1, momentum=0.9)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return x, y, model, optimizer


def memory(workers: int) -> tuple[list[float], float]:
    """Bytes (PSS) of each worker after its first step, and of all processes of the cluster."""
    with fp.Cluster(workers) as cluster:
        kept = [step_once(worker) for worker in cluster]
        cluster.wait()
        each = [psutil.Process(worker.pid).memory_full_info().pss for worker in cluster]
        processes = psutil.Process().children(recursive=True)
        total = sum(process.memory_full_info().pss for process in processes)
        del kept
    return each, total


def benchmark(quick: bool) -> list[Row]:
    runs, first_runs, sizes, most = (2, 1, [2], 2) if quick else (15, 5, [1, 2, 8], 8)
    first = paired(
        first_runs,
        warm_up=not quick,
        torch=lambda: in_new_interpreter(TORCH),
        **{str(n): lambda n=n: in_new_interpreter(FIRST.format(workers=n)) for n in sizes},
    )
    later = paired(runs, **{str(n): lambda n=n: start_another(n) for n in sorted({1, *sizes})})
    each, total = memory(most)
    return [
        row("import torch, new interpreter", "s", first["torch"]),
        *(row(f"first cluster, of {n}, import included", "s", first[str(n)]) for n in sizes),
        ratio(f"  of {most} / import torch", first[str(most)], first["torch"]),
        row("one worker after the first", "ms", later["1"], scale=MILLISECONDS),
        *(
            row(f"another cluster, of {n}", "ms", later[str(n)], scale=MILLISECONDS)
            for n in sizes
            if n > 1
        ),
        row(f"PSS of one of {most} workers after a step", "MiB", each, scale=1 / MIB),
        row("  and of all their processes together", "MiB", [total], scale=1 / MIB),
    ]


if __name__ == "__main__":
    main("start", benchmark)
