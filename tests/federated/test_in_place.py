"""Updates are folded where the trainer left them: the worker has its memory back afterwards."""

import gc
import time

import pytest
import torch
from torch import nn

import fedproc as fp
from tests.federated.worlds import bits, cross_entropy, sgd, shards

LOCAL = fp.LocalTraining(cross_entropy, sgd, batch_size=8)


def large():
    """Updates of 150 KB: too large for a message."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4000), nn.ReLU(), nn.Linear(4000, 3))


def nothing_is_held(cluster, seconds=10):
    """Whether the workers have given back all updates: what is left are rows and a model."""
    deadline = time.monotonic() + seconds
    gc.collect()
    while any(worker.stats().arena_bytes > 200_000 for worker in cluster):
        if time.monotonic() > deadline:
            return False
    return True


@pytest.mark.parametrize("strategy", [fp.FedAvg(), fp.Median()])
def test_nothing_is_held_after_a_round(transport, strategy):
    with fp.Cluster(2, transport=transport) as cluster:
        data = fp.FederatedDataset(shards((8, 9, 10, 11, 12)), cluster)
        aggregator = fp.Aggregator(large(), data, LOCAL, strategy=strategy)
        aggregator.run(4)
        assert nothing_is_held(cluster)


def test_nothing_is_held_after_a_round_without_quorum(transport):
    def train(model, x, y, ctx):
        if ctx.client == "c":
            raise ValueError("not I")
        with torch.no_grad():
            model[0].weight.add_(1.0)

    with fp.Cluster(2, transport=transport) as cluster:
        data = fp.FederatedDataset(shards((8, 9, 10, 11, 12)), cluster)
        aggregator = fp.Aggregator(large(), data, train, min_clients=5)
        before = bits(aggregator.model)
        for _ in range(3):
            with pytest.raises(fp.QuorumError, match="not I"):
                aggregator.run(1)
        assert nothing_is_held(cluster)
        assert bits(aggregator.model) == before


def test_what_a_client_keeps_is_its_own(transport):
    """It outlives the update that it came with, whose memory is used again."""

    def train(model, x, y, ctx):
        kept = ctx.state.setdefault("kept", torch.zeros(5000))
        assert kept.unique().tolist() == [float(ctx.round - 1)]
        kept += 1
        return {"rounds": float(kept[0])}

    with fp.Cluster(2, transport=transport) as cluster:
        data = fp.FederatedDataset(shards((8, 9, 10)), cluster)
        aggregator = fp.Aggregator(large(), data, train)
        aggregator.run(3)
        assert aggregator.history[-1].metrics["rounds"] == 3.0


def test_what_a_client_keeps_may_be_whatever_can_be_pickled(transport):
    def train(model, x, y, ctx):
        import math

        class Uncopied:
            def __deepcopy__(self, memo):
                raise TypeError("no copies")

        ctx.state.setdefault("kept", [math, Uncopied(), torch.zeros(9000)])
        return {"count": float(len(ctx.state))}

    with fp.Cluster(2, transport=transport) as cluster:
        data = fp.FederatedDataset(shards((8, 9, 10)), cluster)
        aggregator = fp.Aggregator(large(), data, train)
        aggregator.run(3)
        assert aggregator.history[-1].metrics == {"count": 1.0}


def test_failures_in_the_history_hold_nothing_of_their_rounds(transport):
    def train(model, x, y, ctx):
        if ctx.client == "c":
            raise ValueError("not I")

    with fp.Cluster(2, transport=transport) as cluster:
        data = fp.FederatedDataset(shards((8, 9, 10, 11, 12)), cluster)
        aggregator = fp.Aggregator(large(), data, train)
        aggregator.run(8)
        assert all(list(record.failures) == ["c"] for record in aggregator.history)
        assert nothing_is_held(cluster)


def test_all_workers_read_one_copy_of_the_model(transport, monkeypatch):
    with fp.Cluster(3, transport=transport) as cluster:
        data = fp.FederatedDataset(shards((8, 9, 10, 11, 12)), cluster)
        aggregator = fp.Aggregator(large(), data, LOCAL)
        aggregator.run(1)
        size = 4 * sum(p.numel() for p in aggregator.model.parameters())
        arena = cluster._supervisor.arena
        allocated, allocate = [], arena.allocate

        def noting(nbytes):
            allocated.append(nbytes)
            return allocate(nbytes)

        monkeypatch.setattr(arena, "allocate", noting)
        before = bits(aggregator.model)
        aggregator.run(2)
        aggregator.evaluate(shards((8,))["a"])
        # what the first round starts with, what each round makes, what the evaluation looks at
        assert [nbytes for nbytes in allocated if nbytes >= size] == [size] * (1 + 2 + 1)
        assert bits(aggregator.model) != before
        gc.collect()
        cluster.wait()
        assert arena.used_bytes < size  # blocks end with what shows them
