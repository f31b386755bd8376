"""What secure aggregation costs a client, against plain rounds: CPU time and wall time.

A client does not train, so a round is nothing but the model down and the update up; masks cost
streams of pseudorandom bytes, one per other client and parameter. Ten clients with 10 thousand,
1 million and 10 million parameters; then 10, 50 and 100 clients with 10 thousand. Two workers,
plain and secure rounds in turns. A drop-out costs the parent one stream per survivor.
"""

import time
from collections.abc import Callable

import torch
from torch import nn

import fedproc as fp
from benchmarks.measure import Row, main, paired, row

MICROSECONDS = 1e6
FULL = [(10, 10_000, 9), (50, 10_000, 5), (100, 10_000, 3), (10, 1_000_000, 5), (10, 10_000_000, 2)]
QUICK = [(4, 1_000, 2)]


class Flat(nn.Module):
    """So many parameters, and nothing to compute."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(numel))


def moved(model: nn.Module, *_: object) -> None:
    """A client that does not train, but has an update."""
    with torch.no_grad():
        model.values += 0.001


def stubborn(model: nn.Module, _x: object, _y: object, ctx: fp.TrainContext) -> None:
    """The same, but one client fails."""
    if ctx.client == "client-1":
        raise RuntimeError("drops out")
    moved(model)


class Clock:
    """Seconds of one round: CPU time of the workers, of the parent, and by the wall."""

    def __init__(self, cluster: fp.Cluster, aggregator: fp.Aggregator) -> None:
        self.cluster, self.aggregator = cluster, aggregator
        self.workers: list[float] = []
        self.parent: list[float] = []

    def __call__(self) -> float:
        before, here = self.cpu(), time.process_time()
        started = time.perf_counter()
        self.aggregator.run_round()
        wall = time.perf_counter() - started
        self.parent.append(time.process_time() - here)
        self.workers.append(self.cpu() - before)
        return wall

    def cpu(self) -> float:
        return sum(worker.stats().cpu_s for worker in self.cluster)


def measure(clients: int, numel: int, runs: int) -> list[Row]:
    """Rounds of all clients, plain and secure, in turns."""
    shards = {f"client-{n}": (torch.zeros(2, 1), torch.zeros(2)) for n in range(clients)}
    with fp.Cluster(2) as cluster:
        data = fp.FederatedDataset(shards, cluster)

        def clock(train: Callable[..., None], secure: fp.SecureAggregation | None) -> Clock:
            # a model of its own for each: the aggregators must not see each other's
            return Clock(cluster, fp.Aggregator(Flat(numel), data, train, secure=secure))

        clocks = {
            "plain": clock(moved, None),
            "secure": clock(moved, fp.SecureAggregation()),
            "dropped": clock(stubborn, fp.SecureAggregation()),
        }
        walls = paired(runs, **clocks)
    rows = []
    for name, found in clocks.items():
        title = f"{clients} clients, {numel:,} parameters, {name}"
        rows += [
            row(f"{title}: wall", "us", walls[name], scale=MICROSECONDS / clients),
            row("  CPU, workers", "us", found.workers[1:], scale=MICROSECONDS / clients),
            row("  CPU, parent", "us", found.parent[1:], scale=MICROSECONDS / clients),
        ]
    return rows


def benchmark(quick: bool) -> list[Row]:
    return [line for size in (QUICK if quick else FULL) for line in measure(*size)]


if __name__ == "__main__":
    main("privacy", benchmark)
