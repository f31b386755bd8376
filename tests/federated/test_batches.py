"""Quick clients train several to a command: nobody can see it but by the clock."""

import os
import signal
from pathlib import Path

import pytest
import torch

from fedproc.client.trail import IDLE, Footprint, Trail
from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.errors import NotPermittedError, RemoteError, WorkerLostError
from fedproc.federated import commanding
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset
from fedproc.federated.lane import Pace
from fedproc.federated.strategies import FedAvg, Scaffold
from tests.federated.worlds import bits, cross_entropy, dropout_net, linear, sgd, shards

SIZES = [3 + n % 5 for n in range(24)]
NAMES = tuple("abcdefghijklmnopqrstuvwx")
LOCAL = LocalTraining(cross_entropy, sgd, batch_size=2)


@pytest.fixture(params=[1, 5, 32])
def together(request, monkeypatch):
    """How many clients one command trains."""
    monkeypatch.setattr(Pace, "batch_size", lambda self, nbytes: request.param)
    return request.param


def test_bits_do_not_depend_on_batches(together, transport):
    with Cluster(3, transport=transport) as cluster:
        data = FederatedDataset(shards(SIZES), cluster)
        aggregator = Aggregator(dropout_net(), data, LOCAL)
        before = cluster.messages
        history = aggregator.run(2)
        assert (cluster.messages - before < 2 * 24) == (together > 1)
        assert all(record.accepted == NAMES for record in history)
    with Cluster(1, transport="inline") as cluster:
        alone = Aggregator(dropout_net(), FederatedDataset(shards(SIZES), cluster), LOCAL)
        alone.run(2)
    assert bits(aggregator.model) == bits(alone.model)


@pytest.fixture
def objects(monkeypatch):
    """Workers that were sent the model as an object of their own."""
    found = []
    send = commanding.send_along

    def noted(worker, value):
        if isinstance(value, torch.Tensor):
            found.append(worker.name)
        return send(worker, value)

    monkeypatch.setattr(commanding, "send_along", noted)
    return found


@pytest.mark.parametrize(
    ("along", "strategy", "expected"),
    [
        (commanding.ALONG_BYTES, FedAvg, [0, 2, 2]),
        (8, FedAvg, [2, 2, 2]),
        (commanding.ALONG_BYTES, Scaffold, [2, 2, 2]),  # which sends tensors, too
    ],
)
def test_a_small_model_goes_with_the_first_command(
    along, strategy, expected, objects, monkeypatch, transport
):
    monkeypatch.setattr(commanding, "ALONG_BYTES", along)
    models = []
    for most, count in zip((32, 6, 1), expected, strict=True):  # one, two, twelve commands
        monkeypatch.setattr(Pace, "batch_size", lambda self, nbytes, most=most: most)
        monkeypatch.setattr(Pace, "are_many", lambda self, clients: False)  # else half is left
        with Cluster(2, transport=transport) as cluster:
            data = FederatedDataset(shards(SIZES), cluster)
            aggregator = Aggregator(linear(), data, LOCAL, strategy=strategy())
            for _ in range(2):
                objects.clear()
                aggregator.run(1)
                assert len(objects) == count
        models.append(bits(aggregator.model))
    assert models[0] == models[1] == models[2]


def test_state_of_clients_in_a_batch(together, transport):
    def train(model, x, y, ctx):
        assert ctx.state.get("who", ctx.client) == ctx.client
        ctx.state.update(who=ctx.client, n=ctx.state.get("n", 0) + 1)
        return {"n": ctx.state["n"]}

    with Cluster(2, transport=transport) as cluster:
        aggregator = Aggregator(linear(), FederatedDataset(shards(SIZES), cluster), train)
        assert [record.metrics["n"] for record in aggregator.run(3)] == [1.0, 2.0, 3.0]


def test_scaffold_in_batches(together):
    models = []
    for count, transport in ((2, "process"), (1, "inline")):
        with Cluster(count, transport=transport) as cluster:
            data = FederatedDataset(shards(SIZES), cluster)
            aggregator = Aggregator(linear(), data, LOCAL, strategy=Scaffold())
            aggregator.run(3)
            models.append(bits(aggregator.model))
    assert models[0] == models[1]


def test_failures_of_a_batch_are_told_with_their_tracebacks(together, transport):
    def train(model, x, y, ctx):
        if ctx.client in "cdx":
            raise LookupError(f"no rows for {ctx.client}")
        if ctx.client == "e":
            model.weight.data.fill_(float("nan"))

    with Cluster(2, transport=transport) as cluster:
        aggregator = Aggregator(linear(), FederatedDataset(shards(SIZES), cluster), train)
        for _ in range(2):
            record = aggregator.run_round()
            assert list(record.failures) == ["c", "d", "e", "x"]
            assert isinstance(record.failures["c"], LookupError)
            assert isinstance(record.failures["c"], RemoteError)
            assert "no rows for x" in str(record.failures["x"])
            assert "in train" in record.failures["x"].remote_traceback
            assert isinstance(record.failures["e"], FloatingPointError)
            assert len(record.accepted) == 20
        cluster.wait()


def test_private_clients_in_a_batch_keep_nothing(together):
    def train(model, x, y, ctx):
        if ctx.client == "b":
            ctx.state["rows"] = x
        if ctx.client == "c":
            raise ValueError(f"the secret is {x[0]}")

    with Cluster(1) as cluster:
        data = FederatedDataset(shards(SIZES), cluster, private=True)
        record = Aggregator(linear(), data, train).run_round()
        assert list(record.failures) == ["b", "c"]
        assert isinstance(record.failures["b"], NotPermittedError)
        assert "secret" not in str(record.failures["c"])


@pytest.mark.faults
def test_a_death_in_a_batch_is_blamed_on_who_was_training(together):
    def train(model, x, y, ctx):
        if ctx.client == "j":
            os.kill(os.getpid(), signal.SIGKILL)

    with Cluster(2) as cluster:
        data = FederatedDataset(shards(SIZES), cluster)
        record = Aggregator(linear(), data, train, retries=0).run_round()
        assert list(record.failures) == ["j"]
        assert isinstance(record.failures["j"], WorkerLostError)
        assert sum(worker.alive for worker in cluster) == 1


@pytest.mark.faults
def test_a_death_in_a_batch_changes_no_bit(together, tmp_path):
    flag = str(tmp_path / "died")

    def train(model, x, y, ctx):
        if ctx.client == "k" and not Path(flag).exists():
            Path(flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        cross_entropy(model(x), y).backward()
        for parameter in model.parameters():
            parameter.data -= 0.1 * parameter.grad

    models = []
    for count in (2, 1):  # the second time it does not die
        with Cluster(count, restart=True) as cluster:
            aggregator = Aggregator(dropout_net(), FederatedDataset(shards(SIZES), cluster), train)
            assert aggregator.run_round().failures == {}
            models.append(bits(aggregator.model))
    assert models[0] == models[1]


def test_a_trail_is_read_on_the_other_side():
    trail = Trail()
    assert trail.read() == IDLE
    footprint = Footprint(trail.path)
    footprint.step(2**40)
    assert trail.read() == 2**40
    footprint.step(IDLE)
    assert trail.read() == IDLE
    Footprint("").step(3)
    assert trail.read() == IDLE


def test_the_pace_decides_how_many_clients_a_command_trains():
    pace = Pace()
    assert pace.batch_size(100) == 1
    pace.learn(0.001)
    assert pace.batch_size(100) == 30
    assert pace.batch_size(4 << 20) == 2
    assert pace.batch_size(1 << 30) == 1
    for _ in range(100):
        pace.learn(1e-5)
    assert pace.batch_size(100) == 32
    for _ in range(100):
        pace.learn(1.0)
    assert pace.batch_size(100) == 1
