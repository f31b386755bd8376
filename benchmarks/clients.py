"""Many clients on two workers: time and memory of one client more, in every process.

Logistic regression of 7,850 parameters; every client has 10 rows. 1,000 and 10,000 clients that
all train in one round, 1,000 of which 10 train in each of 100 rounds; what a client costs that does
nothing, and what the same training costs in a plain loop. Every case has processes of its own, and
a peak is what the kernel counted over the whole life of a process, so it includes how the rows came
to the workers. What is data is subtracted: all rows from the parent's peak, for they are the
user's, and the half that a worker holds from the worker's.
"""

import functools
import json
import subprocess
import sys
import time
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fedproc as fp
from benchmarks.measure import ROOT, Row, main, row, seconds_of

FEATURES, CLASSES, ROWS, WORKERS = 784, 10, 10, 2
MIB, MICROSECONDS = 2**20, 1e6
SGD = functools.partial(torch.optim.SGD, lr=0.1)
LOCAL = fp.LocalTraining(nn.CrossEntropyLoss(), SGD, batch_size=ROWS)


@dataclass(frozen=True, slots=True)
class Case:
    """So many clients, of which some train in each round."""

    clients: int
    each_round: int
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.clients:,} clients, {self.each_round:,} a round, {self.rounds} round(s)"


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a client; peaks of memory without the data, and shared memory, in bytes."""

    wall: float
    parent_cpu: float
    workers_cpu: float
    parent_peak: int
    worker_peak: int
    data: int
    shared: int
    messages: int


def rows_of(clients: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS * clients, FEATURES, generator=generator)
    return x, torch.randint(CLASSES, (len(x),), generator=generator)


def peak_bytes(pid: int | str) -> int:
    """The most resident memory a process ever had."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    found = next(line for line in lines if line.startswith("VmHWM:"))
    return int(found.split()[1]) << 10


def cpu_seconds(cluster: fp.Cluster) -> float:
    return sum(worker.stats().cpu_s for worker in cluster)


def nothing(*_: object) -> dict[str, float]:
    """A client that does not train: what is left is the cost of having clients."""
    return {}


def measure(case: Case, local: Any) -> Cost:
    """Plays one round, which makes the trainers, then those that count."""
    with fp.Cluster(WORKERS) as cluster:
        rows = rows_of(case.clients)
        data = fp.federate(rows, cluster, clients=case.clients)
        model = nn.Linear(FEATURES, CLASSES)
        aggregator = fp.Aggregator(model, data, local, clients_per_round=case.each_round)
        aggregator.run(1, progress=False)
        mine, theirs = time.process_time(), cpu_seconds(cluster)
        wall = seconds_of(lambda: aggregator.run(case.rounds, progress=False))
        mine, theirs = time.process_time() - mine, cpu_seconds(cluster) - theirs
        trained = case.each_round * case.rounds
        nbytes = sum(part.numel() * part.element_size() for part in rows)
        return Cost(
            wall=wall / trained,
            parent_cpu=mine / trained,
            workers_cpu=theirs / trained,
            parent_peak=peak_bytes("self") - nbytes,
            worker_peak=max(peak_bytes(worker.pid) for worker in cluster) - nbytes // WORKERS,
            data=nbytes,
            shared=sum(worker.stats().arena_bytes for worker in cluster) - nbytes,
            messages=sum(record.message_bytes or 0 for record in list(aggregator.history)[1:]),
        )


def plain(clients: int) -> float:
    """Seconds of a client in a loop without fedproc: the model is loaded, trained and added up."""
    torch.set_num_threads(1)
    x, y = rows_of(clients)
    model, total = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES).double()
    parameters = list(model.parameters())
    start = [parameter.detach().clone() for parameter in parameters]

    def loop() -> None:
        for first in range(0, len(x), ROWS):
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
            optimizer = SGD(parameters)
            order = torch.randperm(ROWS) + first
            loss = LOCAL.loss(model(x[order]), y[order])
            optimizer.zero_grad()
            loss.item()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for mean, parameter in zip(total.parameters(), parameters, strict=True):
                    mean.add_(parameter.double().mul_(ROWS))

    loop()
    return seconds_of(loop) / clients


def tell(case: Case, local: Any) -> None:
    """Prints what a case costs, for the process that asked."""
    print(json.dumps(asdict(measure(case, local))))


def apart(case: Case, local: str) -> Cost:
    """Measures a case in a new process."""
    code = f"from benchmarks import clients as c; c.tell(c.Case(*{astuple(case)}), c.{local})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True
    )
    return Cost(**json.loads(done.stdout))


def told(case: Case, cost: Cost) -> list[Row]:
    return [
        row(case.name, "us", [cost.wall], scale=MICROSECONDS),
        row("  CPU time of the parent, a client", "us", [cost.parent_cpu], scale=MICROSECONDS),
        row("  CPU time of the workers, a client", "us", [cost.workers_cpu], scale=MICROSECONDS),
        row("  peak of the parent, without the rows", "MiB", [cost.parent_peak], scale=1 / MIB),
        row("  peak of a worker, without its rows", "MiB", [cost.worker_peak], scale=1 / MIB),
        row("  the rows", "MiB", [cost.data], scale=1 / MIB),
        row("  shared memory after it, without the rows", "MiB", [cost.shared], scale=1 / MIB),
        row("  through the pipes", "MiB", [cost.messages], scale=1 / MIB),
    ]


def compared(many: Case, few: Case, found: dict[Case, Cost]) -> list[Row]:
    more, less = found[many], found[few]
    names = {
        "time of a client": "wall",
        "CPU time of the parent, a client": "parent_cpu",
        "CPU time of the workers, a client": "workers_cpu",
        "peak of the parent, without the rows": "parent_peak",
        "peak of a worker, without its rows": "worker_peak",
    }
    between = f"{many.each_round:,} : {few.each_round:,} in a round"
    return [
        row(f"{between}: {what}", "x", [getattr(more, name) / getattr(less, name)])
        for what, name in names.items()
    ]


def empty(case: Case) -> list[Row]:
    cost = apart(case, "nothing")
    return [
        row(f"nothing done: {case.name}", "us", [cost.wall], scale=MICROSECONDS),
        row("  CPU time of the parent, a client", "us", [cost.parent_cpu], scale=MICROSECONDS),
        row("  CPU time of the workers, a client", "us", [cost.workers_cpu], scale=MICROSECONDS),
    ]


def benchmark(quick: bool) -> list[Row]:
    few, many = (20, 60) if quick else (1_000, 10_000)
    each_round, rounds = (5, 2) if quick else (10, 100)
    once, more = Case(few, few, 1), Case(many, many, 1)
    drawn = Case(few, each_round, rounds)
    found = {case: apart(case, "LOCAL") for case in (once, more, drawn)}
    rows = [line for case, cost in found.items() for line in told(case, cost)]
    rows += compared(more, once, found)
    rows.append(row("the same in a plain loop", "us", [plain(few)], scale=MICROSECONDS))
    return rows + empty(once) + empty(drawn)


if __name__ == "__main__":
    main("clients", benchmark)
