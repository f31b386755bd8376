"""Rounds that must not be shared: busy workers, private rows, no descriptors, cleared workers."""

import gc
import resource
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import fedproc as fp
from fedproc.client.trainer import Trainer
from tests.federated import sharing_worlds as there

LOCAL = fp.LocalTraining(nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1))


def shards():
    generator = torch.Generator().manual_seed(1)
    return {
        f"c{n:02d}": (torch.randn(20 + n % 7, 8, generator=generator), torch.arange(20 + n % 7) % 2)
        for n in range(12)
    }


def aggregator(data, **keywords):
    torch.manual_seed(0)
    return fp.Aggregator(nn.Linear(8, 2), data, LOCAL, **keywords)


def bits(model):
    return b"".join(value.numpy().tobytes() for value in model.state_dict().values())


def sleep_there(worker, seconds):
    return worker.run(time.sleep, seconds)


@pytest.fixture
def expected():
    with fp.Cluster(1) as cluster:
        found = aggregator(fp.FederatedDataset(shards(), cluster))
        found.run(2)
    return bits(found.model)


def test_a_busy_worker_does_not_hold_up_the_deadline():
    with fp.Cluster(2) as cluster:
        found = aggregator(fp.FederatedDataset(shards(), cluster), deadline=2.0)
        pending = sleep_there(cluster.workers[1], 30)
        record = found.run_round()
        assert len(record.accepted) == len(record.failures) == 6
        del pending


def largest_of_all():
    trainers = [found for found in gc.get_objects() if type(found) is Trainer]
    return max(float(x.abs().max()) for trainer in trainers for x, _ in trainer._blocks)


def test_public_rows_that_became_private_stay_in_their_worker():
    rows = torch.zeros(20, 8), torch.zeros(20, dtype=torch.long)
    with fp.Cluster(2) as cluster:
        data = fp.FederatedDataset({worker.name: rows for worker in cluster.workers}, cluster)
        secret = cluster.workers[1].send(torch.full((20, 8), 42.0), private=True)
        data["worker-1"][0].copy_(secret)
        found = aggregator(data)
        found.run(1)
        assert cluster.workers[0].run(largest_of_all).get() == 0


def leave_no_descriptors():
    most = len(list(Path("/proc/self/fd").iterdir()))  # one of them is that of the listing
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def test_a_worker_without_descriptors_trains_its_own_clients(expected):
    with fp.Cluster(2) as cluster:
        found = aggregator(fp.FederatedDataset(shards(), cluster))
        cluster.workers[0].run(leave_no_descriptors).get()
        found.run(2)
    assert bits(found.model) == expected


@pytest.mark.parametrize("cleared", [0, 1])
def test_rows_of_a_worker_that_was_cleared_are_not_read(monkeypatch, cleared):
    there.many_cores(monkeypatch, 1)  # one of the two trains all clients
    with fp.Cluster(2) as cluster:
        found = aggregator(fp.FederatedDataset(shards(), cluster))
        found.run(1)
        cluster.workers[cleared].clear()
        with pytest.raises(fp.ObjectGoneError, match=f"worker 'worker-{cleared}' was cleared"):
            found.run(1)


def test_clients_stay_at_home_once_there_is_something_private(tmp_path, monkeypatch):
    there.many_cores(monkeypatch, 1)
    with fp.Cluster(2) as cluster:
        data = fp.FederatedDataset(there.shards(there.UNEVEN), cluster)
        homes = {data.sizes[client]: data.worker_of(client).pid for client in data.clients}
        for folder, count in ("before", 1), ("after", 2):
            loss = there.noting(tmp_path / folder)
            fp.Aggregator(there.dropout_net(), data, there.whole(loss)).run(1)
            found = loss.trained_by()
            assert len(set(found.values())) == count
            secret = cluster.workers[1].send(torch.zeros(1), private=True)
        assert found == homes
        del secret
