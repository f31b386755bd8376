"""Many clients on two workers: time, memory of every process, and bytes that went where.

Logistic regression of 7,850 parameters. 1,000 clients of which ten train in each of 100 rounds;
10,000 clients that all train in one round; and what a client costs whose training does nothing.
"""

import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import nn

import fedproc as fp
from benchmarks.measure import Row, main, row, seconds_of

FEATURES, CLASSES, ROWS = 784, 10, 10
MIB, MICROSECONDS = 2**20, 1e6
SAMPLE_SECONDS = 0.02


@dataclass
class Peaks:
    """The largest resident memory seen, in bytes: of this process, of one worker, shared."""

    parent: int = 0
    worker: int = 0
    shared: int = 0

    def look(self, cluster: fp.Cluster) -> None:
        self.parent = max(self.parent, psutil.Process().memory_info().rss)
        for worker in cluster:
            memory = psutil.Process(worker.pid).memory_info()
            self.worker = max(self.worker, memory.rss)
            self.shared = max(self.shared, memory.shared)


@contextmanager
def watched(cluster: fp.Cluster) -> Iterator[Peaks]:
    """Looks at the memory of all processes until the block ends."""
    peaks, over = Peaks(), threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_SECONDS):
            peaks.look(cluster)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        over.set()
        watcher.join()
        peaks.look(cluster)


def rows_of(clients: int):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS * clients, FEATURES, generator=generator)
    return x, torch.randint(CLASSES, (len(x),), generator=generator)


def measure(clients: int, each_round: int, rounds: int) -> list[Row]:
    """Trains; the clients are put on the workers before the clock starts."""
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    local = fp.LocalTraining(nn.CrossEntropyLoss(), sgd, batch_size=ROWS)
    with fp.Cluster(2) as cluster:
        data = fp.federate(rows_of(clients), cluster, clients=clients)
        model = nn.Linear(FEATURES, CLASSES)
        aggregator = fp.Aggregator(model, data, local, clients_per_round=each_round)
        with watched(cluster) as peaks:
            seconds = seconds_of(lambda: aggregator.run(rounds, progress=False))
        messages = [float(record.message_bytes or 0) for record in aggregator.history]
        arenas = sum(worker.stats().arena_bytes for worker in cluster)
        moved = float(sum(record.bytes_moved for record in aggregator.history))
    trained = each_round * rounds
    return [
        row(f"{clients:,} clients, {each_round:,} a round, {rounds} round(s)", "s", [seconds]),
        row("  a client", "us", [seconds / trained], scale=MICROSECONDS),
        row("  peak RSS of the parent", "MiB", [peaks.parent], scale=1 / MIB),
        row("  peak RSS of a worker", "MiB", [peaks.worker], scale=1 / MIB),
        row("    of that, shared pages", "MiB", [peaks.shared], scale=1 / MIB),
        row("  in the workers' shared memory at the end", "MiB", [arenas], scale=1 / MIB),
        row("  through the pipes, all rounds", "MiB", [sum(messages)], scale=1 / MIB),
        row("  if clients were remote (bytes_moved)", "MiB", [moved], scale=1 / MIB),
    ]


def nothing(*_: object) -> dict[str, float]:
    """A client that does not train: what is left is the cost of having clients."""
    return {}


def cpu_seconds(cluster: fp.Cluster) -> float:
    return sum(worker.stats().cpu_s for worker in cluster)


def overhead(clients: int, runs: int) -> list[Row]:
    """Seconds and CPU seconds of a client that does nothing, in all processes."""
    wall, parent, workers = [], [], []
    with fp.Cluster(2) as cluster:
        data = fp.federate(rows_of(clients), cluster, clients=clients)
        aggregator = fp.Aggregator(nn.Linear(FEATURES, CLASSES), data, nothing)
        aggregator.run(1, progress=False)  # learns how quick they are
        for _ in range(runs):
            mine, theirs = time.process_time(), cpu_seconds(cluster)
            wall.append(seconds_of(lambda: aggregator.run(1, progress=False)) / clients)
            parent.append((time.process_time() - mine) / clients)
            workers.append((cpu_seconds(cluster) - theirs) / clients)
    return [
        row("a client that does nothing", "us", wall, scale=MICROSECONDS),
        row("  CPU time of the parent", "us", parent, scale=MICROSECONDS),
        row("  CPU time of the workers", "us", workers, scale=MICROSECONDS),
    ]


def benchmark(quick: bool) -> list[Row]:
    if quick:
        return [*measure(20, 5, 2), *overhead(50, 2)]
    return [*measure(1_000, 10, 100), *measure(10_000, 10_000, 1), *overhead(1_000, 9)]


if __name__ == "__main__":
    main("clients", benchmark)
