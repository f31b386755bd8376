"""Rounds that end at a deadline: who is late fails, the others count, the next round works."""

import threading

import pytest
import torch

from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.errors import CommandTimeoutError, QuorumError
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset
from tests.federated.worlds import bits, cross_entropy, dropout_net, linear, sgd, shards

SIZES = [12, 9, 6, 15]
LOCAL = LocalTraining(cross_entropy, sgd)


def endless_in_round(number, client):
    """A train function in which ``client`` never returns in round ``number``."""

    def train(model, x, y, ctx):
        if (ctx.round, ctx.client) == (number, client):
            threading.Event().wait()
        cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad

    return train


def failing(number, client):
    """The same without waiting: the client raises."""
    endless = endless_in_round(number, client)

    def train(model, x, y, ctx):
        if (ctx.round, ctx.client) == (number, client):
            raise RuntimeError("given up")
        return endless(model, x, y, ctx)

    return train


def expected(train, rounds):
    with Cluster(1, transport="inline") as cluster:
        aggregator = Aggregator(dropout_net(), FederatedDataset(shards(SIZES), cluster), train)
        aggregator.run(rounds)
        return bits(aggregator.model)


@pytest.mark.faults
@pytest.mark.parametrize("restart", [False, True])
def test_an_endless_client_fails_and_the_others_are_folded_bit_for_bit(restart):
    # one worker per client, so nobody is queued behind the endless one
    with Cluster(["a", "b", "c", "d"], restart=restart) as cluster:
        data = FederatedDataset(shards(SIZES), cluster)
        aggregator = Aggregator(dropout_net(), data, endless_in_round(2, "b"), deadline=10.0)
        assert aggregator.run_round().failures == {}
        before = {worker.name: worker for worker in cluster}
        late = aggregator.run_round()
        assert late.accepted == ("a", "c", "d")
        error = late.failures["b"]
        assert isinstance(error, CommandTimeoutError)
        assert "client 'b' missed the deadline of 10 s in round 2" in str(error)
        assert "still training" in str(error)
        assert [w.name for w in cluster if w is not before[w.name]] == ["b"]
        assert all(worker.alive for worker in cluster)
        x, y = data["b"]
        assert torch.equal(x.get(), shards(SIZES)["b"][0])
        assert torch.equal(y.get(), shards(SIZES)["b"][1])
        assert aggregator.run_round().failures == {}
    assert bits(aggregator.model) == expected(failing(2, "b"), 3)
    assert late.message_bytes > 0


@pytest.mark.faults
def test_clients_queued_behind_an_endless_one_are_failures():
    with Cluster(1) as cluster:
        data = FederatedDataset(shards(SIZES), cluster)
        aggregator = Aggregator(linear(), data, endless_in_round(1, "b"), deadline=8.0)
        record = aggregator.run_round()
        assert record.accepted == ("a",)
        texts = {client: str(error) for client, error in record.failures.items()}
        assert "still training" in texts["b"]
        assert "still queued" in texts["c"]
        assert "client 'd' missed the deadline of 8 s" in texts["d"]
        assert aggregator.run_round().accepted == ("a", "b", "c", "d")
        cluster.wait()


@pytest.mark.faults
def test_a_round_in_which_all_are_late_has_no_quorum_and_changes_nothing():
    def endless(model, x, y, ctx):
        threading.Event().wait()

    with Cluster(2) as cluster:
        aggregator = Aggregator(
            linear(), FederatedDataset(shards(SIZES), cluster), endless, deadline=0.5
        )
        before = bits(aggregator.model)
        with pytest.raises(QuorumError, match=r"a: .*deadline of 0\.5 s"):
            aggregator.run_round()
        assert bits(aggregator.model) == before


def test_a_deadline_that_nobody_misses_changes_nothing():
    with Cluster(2) as cluster:
        data = FederatedDataset(shards(SIZES), cluster)
        aggregator = Aggregator(dropout_net(), data, LOCAL, deadline=60)
        aggregator.run(2)
    assert bits(aggregator.model) == expected(LOCAL, 2)


def test_inline_workers_cannot_be_ended_and_refuse_a_deadline():
    with Cluster(1, transport="inline") as cluster:
        data = FederatedDataset(shards(SIZES), cluster)
        with pytest.raises(ValueError, match="deadline needs worker processes"):
            Aggregator(linear(), data, LOCAL, deadline=1.0)


@pytest.mark.parametrize("value", [0, -1.0, True, "soon", float("inf"), float("nan")])
def test_bad_deadlines(value):
    with Cluster(1, transport="inline") as cluster:
        data = FederatedDataset(shards(SIZES), cluster)
        with pytest.raises(ValueError, match="deadline must be a finite number above 0"):
            Aggregator(linear(), data, LOCAL, deadline=value)
