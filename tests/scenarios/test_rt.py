"""Scenarios RT: whole local epochs on the worker."""

import copy
import functools
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import fedproc as fp
from tests.scenarios.toy import INPUTS, TARGETS, Branchy, linear, numbers

SGD = functools.partial(torch.optim.SGD, lr=0.1)
MOMENTUM = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def _table(rows):
    x = torch.linspace(-1, 1, 2 * rows).reshape(rows, 2)
    return x, x.sum(dim=1, keepdim=True)


def _locally(model, x, y, *, optimizer, epochs, batch_size, max_steps=None):
    """The plain loop: a new optimizer, rows in order."""
    model = copy.deepcopy(model)
    opt, steps = optimizer(model.parameters()), 0
    for _ in range(epochs):
        for start in range(0, len(x), batch_size):
            if steps == max_steps:
                return model
            opt.zero_grad()
            stop = start + batch_size
            nn.functional.mse_loss(model(x[start:stop]), y[start:stop]).backward()
            opt.step()
            steps += 1
    return model


def _in_order(**options):
    return fp.LocalTraining(loss=nn.MSELoss(), shuffle=False, **options)


def test_rt1_the_loss_falls_and_new_weights_come_back(cluster):
    model = linear(0)
    before = numbers(model)
    data = fp.federate(_table(30), cluster)
    local = fp.LocalTraining(loss=nn.MSELoss(), optimizer=SGD, epochs=2, batch_size=5)
    aggregator = fp.Aggregator(model, data, local)
    losses = [record.loss for record in aggregator.run(rounds=4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 4
    assert numbers(model) == before
    assert numbers(aggregator.model) != before


def test_rt1_one_round_is_the_exact_weighted_mean(cluster):
    shards = {"a": _table(6), "b": _table(4), "c": _table(10)}
    local = _in_order(optimizer=SGD, epochs=2, batch_size=4)
    aggregator = fp.Aggregator(linear(0), fp.FederatedDataset(shards, cluster), local)
    aggregator.run(rounds=1)
    options = {"optimizer": SGD, "epochs": 2, "batch_size": 4}
    trained = [_locally(linear(0), x, y, **options) for x, y in shards.values()]
    assert numbers(aggregator.model) == numbers(fp.weighted_average(trained, [6, 4, 10]))


def test_rt1_messages_of_a_round_depend_on_neither_epochs_nor_rows(pair):
    def spent(epochs, rows):
        local = _in_order(optimizer=SGD, epochs=epochs, batch_size=2)
        aggregator = fp.Aggregator(linear(0), fp.federate(_table(rows), pair), local)
        aggregator.run_round()
        before = pair.messages
        aggregator.run_round()
        return pair.messages - before

    assert spent(1, 8) == spent(5, 8) == spent(1, 64)
    assert spent(1, 8) <= 4 * len(pair)


def test_rt1_an_unknown_client_is_an_error_and_the_workers_live(cluster):
    data = fp.federate(_table(6), cluster)
    with pytest.raises((KeyError, ValueError), match="nobody"):
        data["nobody"]
    assert all(worker.alive for worker in cluster)


def test_rt2_every_round_starts_a_new_optimizer(transport):
    with fp.Cluster(["bob"], transport=transport) as cluster:
        x, y = _table(6)
        data = fp.FederatedDataset({"only": (x, y)}, cluster)
        local = _in_order(optimizer=MOMENTUM, epochs=2, batch_size=2)
        aggregator = fp.Aggregator(linear(0), data, local)
        aggregator.run(rounds=2)
        expected = linear(0)
        for _ in range(2):
            expected = _locally(expected, x, y, optimizer=MOMENTUM, epochs=2, batch_size=2)
        assert numbers(aggregator.model) == numbers(expected)


@pytest.mark.parametrize("max_steps", [1, 4, 9, 100])
def test_rt2_the_cap_ends_the_whole_run(max_steps):
    with fp.Cluster(["bob"], transport="inline") as cluster:
        x, y = _table(6)
        options = {"optimizer": MOMENTUM, "epochs": 3, "batch_size": 2, "max_steps": max_steps}
        data = fp.FederatedDataset({"only": (x, y)}, cluster)
        aggregator = fp.Aggregator(linear(0), data, _in_order(**options))
        aggregator.run(rounds=1)
        assert numbers(aggregator.model) == numbers(_locally(linear(0), x, y, **options))


def test_rt3_workers_train_at_the_same_time(tmp_path):
    def meet(model, x, y, ctx):
        """Each waits for the other: one after the other would never end."""
        folder = Path(directory)
        (folder / ctx.client).touch()
        deadline = time.monotonic() + 10
        while len(list(folder.iterdir())) < 2:
            if time.monotonic() > deadline:
                raise TimeoutError("trained alone")
            time.sleep(0.002)
        return {"rows": len(x)}

    directory = str(tmp_path)
    with fp.Cluster(["bob", "alice"]) as cluster:
        data = fp.federate(_table(6), cluster)
        record = fp.Aggregator(Branchy(), data, meet).run_round()
    assert record.failures == {}
    assert sorted(record.clients) == ["alice", "bob"]
    assert record.metrics["rows"] == 3


def test_rt3_models_need_not_be_traceable(pair):
    local = fp.LocalTraining(loss=nn.MSELoss(), optimizer=SGD, epochs=3, batch_size=4)
    history = fp.Aggregator(Branchy(), fp.federate(_table(12), pair), local).run(rounds=3)
    assert history[-1].loss < history[0].loss
    assert history[-1].failures == {}


def test_rt4_evaluation_counts_and_means_over_examples(cluster):
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
        model.bias.zero_()
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [1.0, 5.0], [2.0, 0.0]])
    y = torch.tensor([0, 1, 1, 1, 0])
    local = fp.LocalTraining(loss=nn.CrossEntropyLoss(), optimizer=SGD)
    aggregator = fp.Aggregator(model, fp.federate((x, y), cluster), local)
    result = aggregator.evaluate((x, y))
    assert result.examples == 5
    assert result.accuracy == 4 / 5
    expected = nn.functional.cross_entropy(model(x), y).item()
    assert result.loss == pytest.approx(expected, rel=1e-6)
    per_client = aggregator.evaluate_clients()
    assert {name: e.examples for name, e in per_client.items()} == dict(
        fp.federate((x, y), cluster).sizes
    )
    total = sum(e.accuracy * e.examples for e in per_client.values())
    assert total == pytest.approx(4)


def test_rt4_a_regression_has_no_accuracy(pair):
    local = fp.LocalTraining(loss=nn.MSELoss(), optimizer=SGD)
    aggregator = fp.Aggregator(linear(0), fp.federate((INPUTS, TARGETS), pair), local)
    result = aggregator.evaluate((INPUTS, TARGETS))
    expected = nn.functional.mse_loss(linear(0)(INPUTS), TARGETS).item()
    assert result.accuracy is None
    assert result.loss == pytest.approx(expected, rel=1e-6)
