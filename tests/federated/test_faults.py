"""Workers that die in the middle of a round."""

import os
import signal
from pathlib import Path

import pytest
import torch

from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.errors import QuorumError, RemoteError, WorkerLostError
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset
from tests.federated.worlds import bits, cross_entropy, dropout_net, linear, sgd, shards

pytestmark = pytest.mark.faults

SIZES = [12, 9, 6, 15, 8, 10]
LOCAL = LocalTraining(cross_entropy, sgd, epochs=2)


def undisturbed(train, rounds):
    with Cluster(1, transport="inline") as cluster:
        aggregator = Aggregator(dropout_net(), FederatedDataset(shards(SIZES), cluster), train)
        aggregator.run(rounds)
        return bits(aggregator.model)


def gradient_step(model, x, y):
    cross_entropy(model(x), y).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad


def dies_once(flag, client):
    """A train function that kills its process the first time it trains ``client``."""

    def train(model, x, y, ctx):
        ctx.state["n"] = ctx.state.get("n", 0) + 1
        if ctx.client == client and not Path(flag).exists():
            Path(flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        gradient_step(model, x, y)
        return {"n": ctx.state["n"]}

    return train


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("client", "acf")
def test_a_lost_worker_changes_no_bit_of_the_result(tmp_path, restart, client):
    train = dies_once(str(tmp_path / "died"), client)
    with Cluster(2, restart=restart) as cluster:
        data = FederatedDataset(shards(SIZES), cluster)
        aggregator = Aggregator(dropout_net(), data, train)
        history = aggregator.run(3)
        assert (tmp_path / "died").exists()
        assert [record.failures for record in history] == [{}, {}, {}]
        assert [record.metrics["n"] for record in history] == [1.0, 2.0, 3.0]
        assert all(data.worker_of(name).alive for name in data.clients)
        assert sum(worker.alive for worker in cluster) == (2 if restart else 1)
    assert bits(aggregator.model) == undisturbed(train, 3)


def poison(model, x, y, ctx):
    if ctx.client == "c":
        os.kill(os.getpid(), signal.SIGKILL)
    gradient_step(model, x, y)


def test_a_client_that_kills_every_worker_is_given_up_and_the_others_count():
    with Cluster(2, restart=True) as cluster:
        data = FederatedDataset(shards(SIZES), cluster)
        record = Aggregator(linear(), data, poison, retries=1).run_round()
        assert list(record.failures) == ["c"]
        assert isinstance(record.failures["c"], WorkerLostError)
        assert record.accepted == ("a", "b", "d", "e", "f")


def test_without_retries_one_loss_is_enough():
    with Cluster(3) as cluster:
        data = FederatedDataset(shards(SIZES), cluster)
        record = Aggregator(linear(), data, poison, retries=0).run_round()
        assert list(record.failures) == ["c"]
        assert sum(worker.alive for worker in cluster) == 2


def test_when_no_worker_is_left_the_round_fails_and_says_so():
    with Cluster(1) as cluster:
        data = FederatedDataset(shards(SIZES), cluster)
        aggregator = Aggregator(linear(), data, poison, min_clients=4)
        before = bits(aggregator.model)
        with pytest.raises(QuorumError, match="c: WorkerLostError"):
            aggregator.run(1)
        assert bits(aggregator.model) == before


def test_workers_killed_between_rounds(transport):
    with Cluster(3, transport=transport) as cluster:
        data = FederatedDataset(shards(SIZES), cluster)
        aggregator = Aggregator(dropout_net(), data, LOCAL)
        aggregator.run(1)
        cluster["worker-1"].kill()
        aggregator.run(1)
        cluster["worker-0"].kill()
        aggregator.run(1)
        assert [record.failures for record in aggregator.history] == [{}, {}, {}]
        found = aggregator.evaluate_clients()
        assert sum(one.examples for one in found.values()) == sum(SIZES)
    with Cluster(1, transport="inline") as cluster:
        alone = Aggregator(dropout_net(), FederatedDataset(shards(SIZES), cluster), LOCAL)
        alone.run(3)
    assert bits(aggregator.model) == bits(alone.model)


def test_rows_come_back_on_another_worker(cluster):
    given = shards([4, 4, 4])
    data = FederatedDataset(given, cluster)
    home = data.worker_of("b")
    home.kill()
    assert data.worker_of("b") is not home
    x, y = data["b"]
    assert torch.equal(x.get(), given["b"][0])
    assert torch.equal(y.get(), given["b"][1])


def test_evaluation_survives_a_loss(cluster, alice):
    data = FederatedDataset(shards([4, 4]), cluster)
    aggregator = Aggregator(linear(), data, LOCAL)
    x, y = shards([900])["a"]
    before = aggregator.evaluate((x, y))
    alice.kill()
    assert aggregator.evaluate((x, y)) == before


@pytest.mark.parametrize("restart", [False, True])
def test_evaluation_after_rounds_survives_a_loss(restart):
    """The trainers are made again from the rows of the lost worker, which are sent again."""
    x, y = shards([900])["a"]
    with Cluster(2, restart=restart) as cluster:
        aggregator = Aggregator(linear(), FederatedDataset(shards(SIZES), cluster), LOCAL)
        aggregator.run(1)
        before = aggregator.evaluate((x, y))
        cluster.workers[1].kill()
        assert aggregator.evaluate((x, y)) == before
        cluster.workers[0].kill() if restart else None
        (record,) = aggregator.run(1, evaluate_on=(x, y))[1:]
        assert record.evaluation.examples == 900


def test_failures_of_clients_are_no_unseen_errors_of_the_cluster():
    def train(model, x, y, ctx):
        raise RuntimeError("all fail")

    with Cluster(2, transport="inline") as cluster:
        data = FederatedDataset(shards(SIZES), cluster)
        with pytest.raises(QuorumError, match="all fail"):
            Aggregator(linear(), data, train).run(1)
        cluster.wait()


def test_a_factory_that_fails_is_raised_where_it_was_given(cluster):
    def broken():
        raise OSError("no such hospital")

    with pytest.raises(RemoteError, match="no such hospital"):
        FederatedDataset.from_factories({"a": broken}, cluster)


def test_an_interrupt_leaves_the_model_as_it_was_and_the_cluster_usable(cluster):
    class Interrupting(LookupError):
        pass

    data = FederatedDataset(shards(SIZES), cluster)
    aggregator = Aggregator(linear(), data, LOCAL)
    before = bits(aggregator.model)
    from fedproc.federated import round as round_module

    original = round_module._accepted

    def interrupted(part, *rest):
        if any(task.client == "c" for task, _ in part):
            raise KeyboardInterrupt
        return original(part, *rest)

    round_module._accepted = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            aggregator.run(1)
    finally:
        round_module._accepted = original
    assert bits(aggregator.model) == before
    assert aggregator.run_round().failures == {}
    cluster.wait()
