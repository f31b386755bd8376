# ruff: noqa: NPY002 - the global stream is the subject
"""The model is the same bits as a plain sequential loop's, on any number of workers."""

import functools
import random

import numpy as np
import pytest
import torch
from torch import nn

from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset
from fedproc.federated.determinism import verify_determinism
from tests.federated.oracle import sequential_fedavg
from tests.federated.worlds import (
    batchnorm_net,
    bits,
    cross_entropy,
    dropout_net,
    linear,
    sgd,
    shards,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = [30, 7, 18, 1, 40, 12]


@pytest.fixture(scope="module", params=["inline-2", "process-1", "process-2", "process-3"])
def anywhere(request):
    """Clusters that must all give the same result."""
    transport, count = request.param.split("-")
    with Cluster(int(count), transport=transport) as cluster:
        yield cluster


def run(model, data, cluster, rounds=3, optimizer=sgd, weighting="examples", **epochs):
    local = LocalTraining(cross_entropy, optimizer, **epochs)
    data = FederatedDataset(data, cluster)
    aggregator = Aggregator(model, data, local, weighting=weighting, seed=7)
    aggregator.run(rounds, progress=False)
    return bits(aggregator.model)


def oracle(model, data, rounds=3, optimizer=sgd, uniform=False, **epochs):
    trained = sequential_fedavg(
        model, data, cross_entropy, optimizer, rounds=rounds, seed=7, uniform=uniform, **epochs
    )
    return bits(trained)


def test_dropout_and_shuffling(anywhere):
    epochs = {"epochs": 2, "batch_size": 8}
    found = run(dropout_net(), shards(SIZES), anywhere, **epochs)
    assert found == oracle(dropout_net(), shards(SIZES), **epochs)


def test_rows_in_order_and_one_full_batch(anywhere):
    for epochs in ({"shuffle": False, "batch_size": 5}, {"batch_size": None, "epochs": 3}):
        found = run(linear(), shards(SIZES), anywhere, **epochs)
        assert found == oracle(linear(), shards(SIZES), **epochs)


def test_momentum_starts_anew_for_every_client_and_round(anywhere):
    momentum = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    found = run(linear(), shards(SIZES), anywhere, optimizer=momentum, epochs=2)
    assert found == oracle(linear(), shards(SIZES), optimizer=momentum, epochs=2)


def test_uniform_weights(anywhere):
    found = run(linear(), shards(SIZES), anywhere, weighting="uniform")
    assert found == oracle(linear(), shards(SIZES), uniform=True)
    assert found != oracle(linear(), shards(SIZES))


def test_batchnorm_buffers(anywhere):
    sizes = [16, 24, 8]
    found = run(batchnorm_net(), shards(sizes), anywhere, batch_size=8)
    assert found == oracle(batchnorm_net(), shards(sizes), batch_size=8)
    assert found["1.num_batches_tracked"] == (torch.int64, 3 + 3 + 3)


def test_tied_parameters_count_once_and_stay_tied(anywhere):
    def tied():
        torch.manual_seed(0)
        first, second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        second.weight = first.weight
        return nn.Sequential(first, nn.ReLU(), second, nn.Linear(6, 3))

    data = shards([10, 20])
    found = run(tied(), data, anywhere)
    assert found == oracle(tied(), data)
    assert found["0.weight"] == found["2.weight"] != bits(tied())["0.weight"]


def test_frozen_parameters_stay_and_do_not_travel(anywhere):
    def frozen():
        model = dropout_net()
        model[0].requires_grad_(False)
        return model

    found = run(frozen(), shards(SIZES), anywhere)
    assert found == oracle(frozen(), shards(SIZES))
    assert found["0.weight"] == bits(frozen())["0.weight"]


class Replacing(torch.optim.SGD):
    """Puts parameters into other memory, where they lie otherwise."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                moved = parameter.data - group["lr"] * parameter.grad
                parameter.data = moved.t().contiguous().t() if moved.ndim == 2 else moved


def test_an_optimizer_that_replaces_the_data_of_parameters(anywhere):
    data, optimizer = shards(SIZES), functools.partial(Replacing, lr=0.05)
    options = {"optimizer": optimizer, "epochs": 2, "batch_size": 5}
    assert run(dropout_net(), data, anywhere, **options) == oracle(dropout_net(), data, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(anywhere, dtype):
    data = {client: (x.to(dtype), y) for client, (x, y) in shards(SIZES).items()}
    found = run(linear().to(dtype), data, anywhere)
    assert found == oracle(linear().to(dtype), data)
    assert found["weight"][0] == dtype


def test_empty_clients_are_skipped(anywhere):
    found = run(linear(), shards([0, 20, 0, 5]), anywhere)
    filled = {name: rows for name, rows in shards([0, 20, 0, 5]).items() if len(rows[0])}
    assert found == oracle(linear(), filled)


class Noisy(nn.Module):
    """Augments its input with every generator there is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        if self.training:
            x = x + 0.1 * torch.randn_like(x) * random.random() + np.random.normal()
        return self.layer(x)


def test_augmentation_from_python_numpy_and_torch(anywhere):
    found = run(Noisy(), shards(SIZES), anywhere)
    assert found == oracle(Noisy(), shards(SIZES))


def test_the_streams_of_the_caller_are_untouched(anywhere):
    def draw():
        return random.random(), np.random.random(), torch.rand(1).item()

    model = Noisy()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    run(model, shards(SIZES), anywhere, rounds=1)
    assert draw() == expected


def test_other_seeds_give_other_models(anywhere):
    data = FederatedDataset(shards(SIZES), anywhere)
    local = LocalTraining(cross_entropy, sgd)
    models = []
    for seed in (0, 1, 0):
        aggregator = Aggregator(linear(), data, local, seed=seed)
        aggregator.run(1)
        models.append(bits(aggregator.model))
    assert models[0] == models[2] != models[1]


def make_aggregator(cluster, seed=0):
    data = FederatedDataset(shards(SIZES), cluster)
    return Aggregator(dropout_net(), data, LocalTraining(cross_entropy, sgd), seed=seed)


def test_verify_determinism_compares_clusters():
    report = verify_determinism(make_aggregator, workers=(1, 3), rounds=2, transport="inline")
    assert report
    assert sorted(report.digests) == [1, 3]


def test_verify_determinism_notices_a_difference():
    def depends_on_the_cluster(cluster):
        return make_aggregator(cluster, seed=len(cluster))

    assert not verify_determinism(depends_on_the_cluster, workers=(1, 2), transport="inline")
