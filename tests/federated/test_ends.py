"""Federated learning on a cluster that is closed, or whose workers are all lost."""

import signal

import pytest
import torch

from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.cluster.placing import none_left
from fedproc.errors import ClosedError, WorkerLostError
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset, federate
from fedproc.federated.loader import FederatedDataLoader
from tests.federated.worlds import bits, blobs, cross_entropy, linear, sgd, shards

LOCAL = LocalTraining(cross_entropy, sgd)

USES = {
    "run": lambda data, aggregator: aggregator.run(1),
    "run_round": lambda data, aggregator: aggregator.run_round(),
    "evaluate": lambda data, aggregator: aggregator.evaluate(blobs(20)),
    "evaluate_clients": lambda data, aggregator: aggregator.evaluate_clients(),
    "rows": lambda data, aggregator: data["a"],
    "worker_of": lambda data, aggregator: data.worker_of("a"),
    "homes": lambda data, aggregator: data.homes(data.clients),
    "summary": lambda data, aggregator: data.summary(),
    "loader": lambda data, aggregator: list(FederatedDataLoader(data, 2)),
    "shuffled": lambda data, aggregator: list(FederatedDataLoader(data, 2, shuffle=True)),
}
ONLY_CLOSED = {
    "profile": lambda data, aggregator: aggregator.profile("trace.json"),
    "Aggregator": lambda data, aggregator: Aggregator(linear(), data, LOCAL),
    "FederatedDataset": lambda data, aggregator: FederatedDataset(shards([4]), data.cluster),
    "federate": lambda data, aggregator: federate(blobs(), data.cluster, clients=2),
    "enter": lambda data, aggregator: data.cluster.__enter__(),
}


def world(cluster):
    """Data on three workers, and an aggregator that has trained and evaluated once."""
    data = FederatedDataset(shards([4, 6, 8]), cluster)
    aggregator = Aggregator(linear(), data, LOCAL)
    aggregator.run(1, evaluate_on=blobs(20))
    return data, aggregator


def met(uses, kind, there):
    """What a use raised instead of ``kind``, by use."""
    wrong = {}
    for name, use in uses.items():
        try:
            use(*there)
        except Exception as error:
            if type(error) is not kind:
                wrong[name] = repr(error)
        else:
            wrong[name] = "no error"
    return wrong


@pytest.mark.parametrize("lost_before", [False, True])
def test_everything_of_a_closed_cluster_says_so(cluster, lost_before):
    there = world(cluster)
    if lost_before:
        for worker in cluster:
            worker.kill()
    cluster.close()
    assert met(USES | ONLY_CLOSED, ClosedError, there) == {}


def test_it_says_what_to_do_and_no_round_was_begun(cluster, tmp_path):
    _, aggregator = world(cluster)
    before = bits(aggregator.model)
    cluster.close()
    with pytest.raises(ClosedError) as caught:
        aggregator.run(1)
    assert str(caught.value) == (
        "run: the cluster is closed; its workers and what they held are gone. Do it before the "
        "end of the `with` block, or make a new Cluster."
    )
    assert (len(aggregator.history), bits(aggregator.model)) == (1, before)
    aggregator.save(tmp_path / "saved")
    with Cluster(2, transport=cluster.transport) as other:
        again = FederatedDataset(shards([4, 6, 8]), other)
        found = Aggregator.load(tmp_path / "saved", linear(), again, LOCAL)
        assert found.run_round().round == 2


def test_a_loader_that_is_on_its_way_says_it_too(cluster):
    batches = iter(FederatedDataLoader(world(cluster)[0], 2))
    next(batches)
    cluster.close()
    with pytest.raises(ClosedError, match="closed"):
        next(batches)


def test_where_all_workers_are_lost_they_are_named_with_the_remedy(cluster):
    there = world(cluster)
    for worker in cluster:
        worker.kill()
    how = "" if cluster.transport == "inline" else " by SIGKILL"
    assert met(USES, WorkerLostError, there) == {}
    for name in ("run", "evaluate", "rows", "summary"):
        with pytest.raises(WorkerLostError) as caught:
            USES[name](*there)
        text = str(caught.value)
        assert text.startswith("no worker of the cluster is alive: ")
        for lost in ("alice", "bob", "carol"):
            assert f"'{lost}' ended{how}" in text
        assert "Cluster(restart=True)" in text
        assert f"cluster.replace(cluster[{caught.value.worker!r}])" in text


def test_the_last_one_comes_first_and_its_facts_are_told(cluster):
    data, aggregator = world(cluster)
    for name in ("carol", "alice", "bob"):  # each loss moves the rows to those that are left
        cluster[name].kill()
        if name != "bob":
            assert "bob" in data.homes(data.clients).values()
    with pytest.raises(WorkerLostError, match=r"is alive: 'bob' ended") as caught:
        aggregator.run(1)
    assert caught.value.worker == "bob"
    inline = cluster.transport == "inline"
    assert caught.value.signal == (None if inline else signal.SIGKILL)


def test_the_remedy_helps(cluster):
    data, aggregator = world(cluster)
    for worker in cluster:
        worker.kill()
    with pytest.raises(WorkerLostError) as caught:
        data.worker_of("a")
    cluster.replace(cluster[caught.value.worker])
    assert {data.worker_of(client).name for client in data.clients} == {caught.value.worker}
    assert torch.equal(data["b"][1].fetch(), shards([4, 6, 8])["b"][1])
    assert aggregator.run_round().accepted == ("a", "b", "c")


def test_who_has_restart_already_is_not_told_to_use_it():
    with Cluster(6, transport="inline", restart=True) as cluster:
        for worker in cluster.workers:
            worker.kill()
        text = str(none_left(cluster, "worker-4"))
    assert "'worker-4' ended, 'worker-0' ended, 'worker-1' ended, 'worker-2' ended, and 2 more" in (
        text
    )
    assert "restart=True" not in text
    assert "look at what ends them" in text
