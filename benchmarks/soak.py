"""Rounds of federated learning while workers are killed and stopped at random: is the model right?

A saboteur kills a worker every two seconds on average (SIGKILL), and stops one every five
(SIGSTOP). Most of the stopped ones go on after a moment, some never do. What must come of it:

* A client whose worker was killed trains again on another worker, from the same rows and the same
  random state: ``retries`` is so large that none is ever given up.
* A short stall only costs time: it ends long before the deadline.
* A worker that is stopped for good is ended at the round's deadline and replaced. What it had not
  delivered is a failure of the round, by contract. So the run that the model is compared with, one
  undisturbed worker in this process, leaves exactly these clients out of exactly these rounds.
  With ``--stuck 0`` nobody is stopped for good, and nobody is left out.

The bits of the two models must be equal, and memory and descriptors of the parent the same in the
last part of the run as in the first.
"""

import argparse
import functools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

import fedproc as fp
from benchmarks.exact import FEATURES, digest, model
from benchmarks.measure import Row, row, table
from fedproc.transport.process import zygote_pid

WORKERS, CLIENTS, ROWS = 4, 24, 40
STEP_SECONDS = 0.02  # a client takes a moment, so that many are hit while they train
DEADLINE_SECONDS = 5.0
KILL_SECONDS, STOP_SECONDS, PAUSE_SECONDS = 2.0, 5.0, 1.0
MIB = 2**20


def data_on(cluster: fp.Cluster) -> fp.FederatedDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS * CLIENTS, FEATURES, generator=generator)
    y = torch.randint(10, (len(x),), generator=generator)
    return fp.federate((x, y), cluster, clients=CLIENTS)


def train(net, x, y, ctx, *, pause: float, absent: frozenset[tuple[int, str]], trail: str):
    """Two noisy steps, and a count kept between rounds.

    Args:
        pause: seconds to wait at the end.
        absent: (round, client) that fail.
        trail: a file that gets a byte for each training that is begun.
    """
    with open(trail, "ab", buffering=0) as file:  # noqa: PTH123 - runs in a worker
        file.write(b".")
    if (ctx.round, ctx.client) in absent:
        raise RuntimeError("left out, as in the run with faults")
    ctx.state["rounds"] = ctx.state.get("rounds", 0) + 1
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    time.sleep(pause)
    return {"rounds": ctx.state["rounds"]}


class Saboteur(threading.Thread):
    """Kills and stops workers at random moments until ``stop``."""

    def __init__(self, cluster: fp.Cluster, seed: int, stuck: float) -> None:
        super().__init__(name="saboteur")
        self.kills = self.stalls = self.stuck = 0
        self._cluster = cluster
        self._random = random.Random(seed)
        self._stuck = stuck
        self._over = threading.Event()
        self._stopped: list[tuple[float, int]] = []  # when they shall go on, and who

    def run(self) -> None:
        now = time.monotonic()
        kill, stall = self._next(now, KILL_SECONDS), self._next(now, STOP_SECONDS)
        while not self._over.wait(0.02):
            now = time.monotonic()
            if now >= kill:
                kill = self._next(now, KILL_SECONDS)
                self.kills += self._signal(signal.SIGKILL) > 0
            if now >= stall:
                stall = self._next(now, STOP_SECONDS)
                self._stall(now)
            for when, pid in [one for one in self._stopped if one[0] <= now]:
                self._stopped.remove((when, pid))
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _next(self, now: float, mean: float) -> float:
        return now + self._random.expovariate(1 / mean)

    def _stall(self, now: float) -> None:
        pid = self._signal(signal.SIGSTOP)
        if pid and self._random.random() < self._stuck:
            self.stuck += 1
        elif pid:
            self.stalls += 1
            self._stopped.append((now + self._random.uniform(0, PAUSE_SECONDS), pid))

    def _signal(self, number: int) -> int:
        """Send a signal to a worker drawn at random; its pid, 0 if that one is gone."""
        worker = self._cluster.workers[self._random.randrange(WORKERS)]
        with suppress(ProcessLookupError):
            os.kill(worker.pid, number)
            return worker.pid
        return 0

    def stop(self) -> None:
        self._over.set()
        self.join()
        for _, pid in self._stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def sabotaged(cluster: fp.Cluster, seed: int, stuck: float) -> Iterator[Saboteur]:
    saboteur = Saboteur(cluster, seed, stuck)
    saboteur.start()
    try:
        yield saboteur
    finally:
        saboteur.stop()


@dataclass(frozen=True, slots=True)
class Look:
    """The parent at one moment: bytes, and counts."""

    rss: int
    pss: int
    arena: int
    descriptors: int
    threads: int


def look(cluster: fp.Cluster) -> Look:
    me = psutil.Process()
    memory = me.memory_full_info()
    arena = cluster.workers[0].link.arena.used_bytes
    return Look(memory.rss, memory.pss, arena, me.num_fds(), me.num_threads())


@dataclass(slots=True)
class Found:
    """What happened in the run with faults."""

    rounds: int
    missed: frozenset[tuple[int, str]]  # (round, client) that the deadline cut off
    again: int  # clients that trained more than once in a round
    saboteur: Saboteur
    looks: list[tuple[float, Look]]  # seconds since the start, after each round
    model: str


def disturbed(seconds: float, seed: int, stuck: float, trail: Path) -> Found:
    """Train for so long under sabotage."""
    local = functools.partial(train, pause=STEP_SECONDS, absent=frozenset(), trail=str(trail))
    looks: list[tuple[float, Look]] = []
    with fp.Cluster(WORKERS, restart=True) as cluster:
        aggregator = fp.Aggregator(
            model(), data_on(cluster), local, clients_per_round=0.5, seed=seed,
            retries=1_000_000, deadline=DEADLINE_SECONDS,
        )  # fmt: skip
        started = time.monotonic()
        with sabotaged(cluster, seed, stuck) as saboteur:
            while (passed := time.monotonic() - started) < seconds:
                aggregator.run_round()
                looks.append((passed, look(cluster)))
    history = aggregator.history
    missed = frozenset((one.round, client) for one in history for client in one.failures)
    delivered = sum(len(one.accepted) for one in history)
    again = trail.stat().st_size - delivered
    return Found(len(history), missed, again, saboteur, looks, digest(aggregator.model))


def undisturbed(rounds: int, seed: int, absent: frozenset[tuple[int, str]]) -> str:
    """The model of the same rounds without faults, on one worker of this process."""
    local = functools.partial(train, pause=0.0, absent=absent, trail=os.devnull)
    with fp.Cluster(1, transport="inline") as cluster:
        aggregator = fp.Aggregator(
            model(), data_on(cluster), local, clients_per_round=0.5, seed=seed
        )
        aggregator.run(rounds, progress=False)
    return digest(aggregator.model)


def left_processes() -> int:
    """Processes that this one started and that still run, without the start helper."""
    children = psutil.Process().children(recursive=True)
    return sum(child.pid != zygote_pid() for child in children)


def rows_of(found: Found, equal: bool, seconds: float) -> list[Row]:
    """The numbers as lines; of the looks: medians over the first and the last part of the run."""
    part = min(60.0, seconds / 3)
    first = [each for passed, each in found.looks if passed <= part]
    last = [each for passed, each in found.looks if passed >= found.looks[-1][0] - part]
    counts = {
        "rounds finished": found.rounds,
        "workers killed": found.saboteur.kills,
        "workers stopped for a moment": found.saboteur.stalls,
        "workers stopped for good": found.saboteur.stuck,
        "trainings begun in vain": found.again,
        "clients cut off by the deadline": len(found.missed),
        "model equal to the undisturbed run's (1: yes)": int(equal),
        "processes left": left_processes(),
    }
    lines = [row(name, "count", [float(count)]) for name, count in counts.items()]
    for name, unit, scale in (
        ("rss", "MiB", 1 / MIB), ("pss", "MiB", 1 / MIB), ("arena", "MiB", 1 / MIB),
        ("descriptors", "count", 1.0), ("threads", "count", 1.0),
    ):  # fmt: skip
        for when, looks in (("first", first), ("last", last)):
            samples = [float(getattr(each, name)) for each in looks]
            lines.append(row(f"  parent's {name}, {when} {part:.0f} s", unit, samples, scale=scale))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long; default: 10")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and of the training")
    parser.add_argument("--stuck", type=float, default=0.1, help="part of stops that are for good")
    parser.add_argument("--quick", action="store_true", help="a few seconds: shows that it runs")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    options = parser.parse_args()
    seconds = 4.0 if options.quick else 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        found = disturbed(seconds, options.seed, options.stuck, Path(folder) / "trail")
    equal = undisturbed(found.rounds, options.seed, found.missed) == found.model
    rows = rows_of(found, equal, seconds)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(line) for line in rows]), encoding="utf-8")
    print(table("soak", rows))
    sys.exit(not equal)


if __name__ == "__main__":
    main()
