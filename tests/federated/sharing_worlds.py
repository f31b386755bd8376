"""What the tests of rounds that any worker trains share: losses that tell who trained whom.

A client is known in a loss by its number of rows: all of a client's rows are one batch, and no two
clients have the same number.
"""

import gc
import os
import threading
import time
from pathlib import Path

import torch
from torch import nn

from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.federated import crew
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset
from tests.federated.worlds import bits, cross_entropy, dropout_net, sgd, shards

PATIENCE_S = 20.0
# very uneven, in steps too: one client has most of the rows
UNEVEN = [300, 7, 18, 1, 40, 12, 5, 9]


def many_cores(monkeypatch, cores=4):
    """Lets so many workers train, whatever this machine has."""
    monkeypatch.setattr(crew, "usable_cores", lambda: cores)


def poll(is_so, seconds=PATIENCE_S):
    """Waits until it is so; returns whether it came to that."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


class Noting(nn.Module):
    """Cross entropy that notes in a folder which process trained a client, once each."""

    def __init__(self, folder):
        super().__init__()
        self.folder = str(folder)

    def forward(self, outputs, targets):
        Path(self.folder, f"{len(targets)}.{os.getpid()}").touch()
        return cross_entropy(outputs, targets)

    def noted(self):
        """Pairs of rows and process."""
        return {tuple(map(int, path.name.split("."))) for path in Path(self.folder).iterdir()}

    def trained_by(self):
        """Rows -> the process that trained that client; each was trained in one."""
        found = dict(self.noted())
        assert len(found) == len(self.noted())
        return found


class Awaiting(Noting):
    """One client is done only when so many others were trained."""

    def __init__(self, folder, rows, others):
        super().__init__(folder)
        self.rows, self.others = rows, others

    def forward(self, outputs, targets):
        if len(targets) == self.rows:
            assert poll(lambda: len(self.noted()) >= self.others), "the others wait, too"
        return super().forward(outputs, targets)


class Killing(Noting):
    """Kills a process when a client is trained: the first time, or each time."""

    def __init__(self, folder, rows, pid=None, *, again=False):
        super().__init__(folder)
        self.rows, self.pid, self.again = rows, pid, again

    def forward(self, outputs, targets):
        flag = Path(f"{self.folder}-killed")
        if len(targets) == self.rows and (self.again or not flag.exists()):
            flag.touch()
            os.kill(self.pid or os.getpid(), 9)
        return super().forward(outputs, targets)


class Endless(Noting):
    """One client is never done once a file is there."""

    def __init__(self, folder, rows, flag):
        super().__init__(folder)
        self.rows, self.flag = rows, str(flag)

    def forward(self, outputs, targets):
        if len(targets) == self.rows and Path(self.flag).exists():
            threading.Event().wait()
        return super().forward(outputs, targets)


def noting(folder):
    folder.mkdir(exist_ok=True)
    return Noting(folder)


def whole(loss, **options):
    """One step with all rows of a client."""
    return LocalTraining(loss, sgd, batch_size=None, **options)


def alone(local, rounds, sizes=UNEVEN, between=None, **options):
    """The bits after rounds of one worker, which trains one client after the other."""
    with Cluster(1, transport="inline") as cluster:
        data = FederatedDataset(shards(sizes), cluster)
        aggregator = Aggregator(dropout_net(), data, local, seed=7, **options)
        for _ in range(rounds):
            aggregator.run(1, progress=False)
            if between is not None:
                between(data)
        return bits(aggregator.model)


def arena_use(cluster):
    gc.collect()
    return [worker.stats().arena_bytes for worker in cluster]


def reads_of_others(cluster):
    """Names of the workers that have the memory of another worker attached."""
    arenas = {worker.link.arena_name for worker in cluster}
    return [worker.name for worker in cluster if worker.link.attached & arenas]


def double_when(rows, note, seconds):
    """Doubles rows as soon as something was noted, or after a while; runs in a worker."""
    poll(lambda: any(Path(note).iterdir()), seconds)
    with torch.no_grad():
        rows.mul_(2)


class ToLong(nn.Module):
    """Cross entropy of targets that are any integers."""

    def forward(self, outputs, targets):
        return cross_entropy(outputs, targets.long())
