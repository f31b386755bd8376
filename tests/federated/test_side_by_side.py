"""Several aggregators at once, each in a thread of its own, on the same workers."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn

import fedproc as fp

CLIENTS = 24


@pytest.fixture(scope="module")
def shards():
    generator = torch.Generator().manual_seed(1)
    return {
        f"c{n:02d}": (torch.randn(40, 8, generator=generator), torch.arange(40) % 2)
        for n in range(CLIENTS)
    }


def aggregator(data, seed):
    torch.manual_seed(0)
    local = fp.LocalTraining(nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1))
    return fp.Aggregator(nn.Linear(8, 2), data, local, seed=seed, clients_per_round=0.5)


def trained(aggregator):
    aggregator.run(2)
    return aggregator.model.weight.detach().clone()


def test_aggregators_do_not_wait_for_each_other_and_train_on_their_own_rows(shards):
    with fp.Cluster(1) as cluster:
        data = fp.FederatedDataset(shards, cluster)
        expected = [trained(aggregator(data, seed)) for seed in range(4)]
    for _ in range(4):
        with ThreadPoolExecutor(4) as pool, fp.Cluster(4) as cluster:
            data = fp.FederatedDataset(shards, cluster)
            started = [pool.submit(trained, aggregator(data, seed)) for seed in range(4)]
            found = [future.result(20) for future in started]
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
