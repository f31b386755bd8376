"""Rounds that any worker may train: the same bits, whoever trains, and who may."""

import functools
import operator
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.federated import supply
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset, federate
from fedproc.federated.partition import Dirichlet
from fedproc.federated.secure_aggregation import SecureAggregation
from fedproc.federated.strategies import FedAvg, FedProx, Scaffold
from tests.federated import sharing_worlds as there
from tests.federated.oracle import sequential_fedavg
from tests.federated.worlds import bits, cross_entropy, dropout_net, linear, sgd, shards

pytestmark = pytest.mark.usefixtures("one_thread")
LOCAL = LocalTraining(cross_entropy, sgd, epochs=2, batch_size=8)
NAMES = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module", params=["inline-3", "process-1", "process-2", "process-4"])
def anywhere(request):
    """Clusters that must all give the same result."""
    transport, count = request.param.split("-")
    with Cluster(int(count), transport=transport) as cluster:
        yield cluster


@pytest.fixture(params=[1, 2, 4], ids="cores-{}".format)
def cores(request, monkeypatch):
    there.many_cores(monkeypatch, request.param)
    return request.param


def run(cluster, local=LOCAL, rounds=3, data=None, **options):
    data = data or FederatedDataset(shards(there.UNEVEN), cluster)
    aggregator = Aggregator(dropout_net(), data, local, seed=7, **options)
    history = aggregator.run(rounds, progress=False)
    assert [record.failures for record in history] == [{}] * rounds
    return aggregator


# ---------------------------------------------------------------- the same bits


def test_uneven_clients_are_the_sequential_loop(anywhere, cores):
    data = shards(there.UNEVEN)
    options = {"rounds": 3, "seed": 7, "epochs": 2, "batch_size": 8}
    expected = sequential_fedavg(dropout_net(), data, cross_entropy, sgd, **options)
    assert bits(run(anywhere).model) == bits(expected)


@pytest.mark.parametrize("strategy", [FedAvg(), FedProx(0.3), Scaffold()], ids=str)
@pytest.mark.parametrize("drawn", [1, 3, 0.75])
def test_partial_cohorts_of_strategies(anywhere, monkeypatch, strategy, drawn):
    there.many_cores(monkeypatch)
    options = {"strategy": strategy, "clients_per_round": drawn}
    found = run(anywhere, rounds=4, **options)
    assert bits(found.model) == there.alone(LOCAL, 4, **options)
    assert {len(record.accepted) for record in found.history} == {drawn if drawn >= 1 else 6}


def test_all_live_on_one_worker(transport, cores):
    """Clients go where they are named for; nobody lives on the others."""
    data = {"w0" if client == "a" else client: rows for client, rows in shards([50, 3]).items()}
    with Cluster(["w0", "w1", "w2"], transport=transport) as cluster:
        found = bits(run(cluster, data=FederatedDataset(data, cluster)).model)
    with Cluster(1, transport="inline") as cluster:
        assert found == bits(run(cluster, data=FederatedDataset(data, cluster)).model)


@pytest.mark.parametrize("sizes", [[0, 20, 0, 5], [0, 0, 20, 0]])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_clients_without_rows(transport, cores, sizes, batch_size):
    """A worker that is named as a client has no other: "a" holds nothing at all."""
    local = LocalTraining(cross_entropy, sgd, batch_size=batch_size)
    with Cluster(["a", "b", "c"], transport=transport) as cluster:
        found = run(cluster, local, data=FederatedDataset(shards(sizes), cluster))
    assert bits(found.model) == there.alone(local, 3, sizes)
    empty = tuple(client for client, size in zip("abcd", sizes, strict=True) if not size)
    assert [record.skipped for record in found.history] == [empty] * 3


def test_a_partition_that_leaves_clients_empty(transport, cores):
    rows = shards([60])["a"]
    how = {"clients": 12, "partition": Dirichlet(0.05, min_size=0), "seed": 1}
    models = []
    for count in (1, 3):
        with Cluster(count, transport=transport) as cluster:
            data = federate(rows, cluster, **how)
            assert 0 in data.sizes.values()
            models.append(bits(run(cluster, data=data).model))
    assert models[0] == models[1]


def images(like):
    torch.manual_seed(0)
    x = torch.randn(36, 3, 6, 6).to(memory_format=like)
    y = torch.randint(3, (36,))
    return {f"c{n}": (x[n * 6 : n * 6 + 6], y[n * 6 : n * 6 + 6]) for n in range(6)}


def convolution():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize("like", [torch.channels_last, torch.contiguous_format], ids=str)
def test_images_keep_their_memory_format(transport, cores, like):
    models = []
    for count in (1, 3):
        with Cluster(count, transport=transport) as cluster:
            aggregator = Aggregator(convolution(), FederatedDataset(images(like), cluster), LOCAL)
            aggregator.run(2)
            models.append(bits(aggregator.model))
    assert models[0] == models[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_in_several_blocks(monkeypatch, dtype):
    """Of 2 MiB each: more than one block of a worker, of two kinds of rows."""
    there.many_cores(monkeypatch)
    torch.manual_seed(0)
    columns = (2 << 20) // 64 // dtype.itemsize
    data = {c: (torch.randn(64, columns).to(dtype), torch.randint(3, (64,))) for c in NAMES[:11]}
    data["a"] = data["a"][0], data["a"][1].int()
    local = LocalTraining(there.ToLong(), functools.partial(torch.optim.SGD, lr=1e-3))
    models = []
    for count in (1, 2):
        with Cluster(count) as cluster:
            placed = FederatedDataset(data, cluster)
            assert all(len(held.blocks) > 1 for held in placed.holdings().values())
            aggregator = Aggregator(linear(columns).to(dtype), placed, local)
            aggregator.run(2)
            models.append(bits(aggregator.model))
    assert models[0] == models[1]


# ---------------------------------------------------------------- rows that change


@pytest.mark.parametrize("count", [1, 2, 4])
def test_rows_changed_in_place_are_what_trains_next(transport, cores, count):
    def double(data):
        for client in data.clients[:5]:
            data[client][0].mul_(2)

    with Cluster(count, transport=transport) as cluster:
        data = FederatedDataset(shards(there.UNEVEN), cluster)
        aggregator = Aggregator(dropout_net(), data, LOCAL, seed=7)
        for _ in range(3):
            aggregator.run(1)
            double(data)
    assert bits(aggregator.model) == there.alone(LOCAL, 3, between=double)
    assert bits(aggregator.model) != there.alone(LOCAL, 3)


def test_a_round_sees_what_was_asked_of_rows_before_it(tmp_path, monkeypatch):
    """Their worker is still at it: whoever else trains them must not be quicker."""
    there.many_cores(monkeypatch, 1)  # one trains all: the rows of the other are read elsewhere
    loss, sizes = there.noting(tmp_path / "noted"), [8, 9, 10, 11]
    with Cluster(2) as cluster:
        data = FederatedDataset(shards(sizes), cluster)
        aggregator = run(cluster, there.whole(loss), 1, data)
        (trainer,) = set(loss.trained_by().values())
        away = [c for c in data.clients if data.worker_of(c).pid != trainer]
        assert len(away) == 2
        for note in Path(loss.folder).iterdir():
            note.unlink()
        for client in away:
            data.worker_of(client).run(there.double_when, data[client][0], loss.folder, 0.5)
        aggregator.run(1)

    def double(data):
        for client in away:
            data[client][0].mul_(2)

    assert bits(aggregator.model) == there.alone(there.whole(cross_entropy), 2, sizes, double)


# ---------------------------------------------------------------- who may train


@pytest.mark.parametrize(("cores", "threads", "trainers"), [
    (1, None, 1), (2, None, 2), (3, None, 3), (4, None, 4), (9, None, 4), (1, 2, 1), (4, 2, 2),
    (5, 2, 2), (2, 4, 1),
])  # fmt: skip
def test_no_more_train_than_there_are_cores(tmp_path, monkeypatch, cores, threads, trainers):
    there.many_cores(monkeypatch, cores)
    loss = there.noting(tmp_path / "noted")
    with Cluster(4, threads=threads) as cluster:
        data = FederatedDataset(shards(list(range(4, 16))), cluster)
        run(cluster, there.whole(loss), 2, data)
        pids = {worker.pid for worker in cluster}
    found = {pid for _, pid in loss.noted()}
    assert len(found) == trainers
    assert found <= pids


def train_and_note(folder, model, x, y, ctx):
    Path(folder, f"{len(y)}.{os.getpid()}").touch()
    cross_entropy(model(x), y).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad


@pytest.mark.parametrize("kind", ["private", "factories", "function"])
def test_clients_that_only_their_own_worker_trains(tmp_path, monkeypatch, kind):
    """A single core would have one worker train all, were it allowed to."""
    there.many_cores(monkeypatch, 1)
    loss = there.noting(tmp_path / "noted")
    given, local = shards([11, 12, 13, 14, 15]), there.whole(loss)
    if kind == "function":
        local = functools.partial(train_and_note, loss.folder)
    with Cluster(3) as cluster:
        data = FederatedDataset(given, cluster, private=kind == "private")
        if kind == "factories":
            makers = {
                c: functools.partial(operator.getitem, [pair], 0) for c, pair in given.items()
            }
            data = FederatedDataset.from_factories(makers, cluster)
        run(cluster, local, 2, data)
        homes = {data.sizes[client]: data.worker_of(client).pid for client in data.clients}
        assert len(set(homes.values())) == 3
        assert loss.trained_by() == homes
        assert there.reads_of_others(cluster) == []


@pytest.mark.parametrize("options", [{"vectorize": True}, {"secure": SecureAggregation()}], ids=str)
def test_aggregators_whose_workers_read_no_rows_of_others(transport, monkeypatch, options):
    there.many_cores(monkeypatch, 1)
    with Cluster(3, transport=transport) as cluster:
        data = FederatedDataset(shards([11, 12, 13, 14, 15]), cluster)
        aggregator = Aggregator(linear(), data, LOCAL, **options)
        aggregator.run(2)
        assert there.reads_of_others(cluster) == []


# ---------------------------------------------------------------- taking over


def test_whoever_is_done_takes_clients_over(tmp_path, monkeypatch):
    """The first client waits for more than its worker's neighbour holds."""
    there.many_cores(monkeypatch, 2)
    sizes = list(range(30, 10, -1))
    noting = there.noting(tmp_path / "noted")
    loss = there.Awaiting(noting.folder, 30, others=15)
    with Cluster(2) as cluster:
        data = FederatedDataset(shards(sizes), cluster)
        aggregator = run(cluster, there.whole(loss), 1, data)
        trained_by = noting.trained_by()
        kept = [rows for rows, pid in trained_by.items() if pid == trained_by[30]]
    assert sorted(trained_by) == sorted(sizes)
    assert len(kept) <= 5
    assert bits(aggregator.model) == there.alone(there.whole(cross_entropy), 1, sizes)


def test_the_memory_window_is_kept(tmp_path, monkeypatch):
    """Nothing is folded before the first client, whose worker has time."""
    there.many_cores(monkeypatch, 2)
    monkeypatch.setattr(supply, "_WINDOW_BYTES", 0)
    monkeypatch.setattr(supply, "_WINDOW_LEAST", 3)
    seen, submit = [], supply.Supply.submit

    def spying(self, name, lane, *rest):
        submit(self, name, lane, *rest)
        seen.append(lane.blocks)

    monkeypatch.setattr(supply.Supply, "submit", spying)
    sizes = list(range(30, 10, -1))
    noting = there.noting(tmp_path / "noted")
    with Cluster(2) as cluster:
        data = FederatedDataset(shards(sizes), cluster)
        loss = there.Awaiting(noting.folder, 30, others=3)
        # with a deadline clients go one by one
        aggregator = run(cluster, there.whole(loss), 1, data, deadline=50)
    assert max(seen) == 3
    assert bits(aggregator.model) == there.alone(there.whole(cross_entropy), 1, sizes)
