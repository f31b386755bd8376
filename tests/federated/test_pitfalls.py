"""The numeric pitfalls of federated learning, one test each, with the values that are right.

Other files test the parts; here every pitfall has its number, seen from outside: a run, and what
comes out of it.
"""

import copy
import functools
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedproc.client.seeding import derive_seed
from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.errors import QuorumError
from fedproc.federated import strategies
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset, federate
from fedproc.federated.partition import Dirichlet
from fedproc.federated.sampling import cohort_size, draw_cohort
from tests.federated.worlds import batchnorm_net, bits, blobs, cross_entropy, linear, sgd, shards


@pytest.fixture
def inline():
    with Cluster(2, transport="inline") as cluster:
        yield cluster


def setting(values, name=None):
    """A train function: client "a" fills parameters (or what ``name`` says) with values["a"]."""

    def train(model, x, y, ctx):
        chosen = [model.get_buffer(name)] if name else model.parameters()
        with torch.no_grad():
            for tensor in chosen:
                tensor.fill_(values[ctx.client])

    return train


def after(cluster, model, train, sizes, rounds=1, **options):
    """The model after some rounds over clients "a", "b", … of these sizes."""
    aggregator = Aggregator(model, FederatedDataset(shards(sizes), cluster), train, **options)
    aggregator.run(rounds)
    return aggregator.model


def test_01_statistics_of_batchnorm_are_averaged_with_the_weights_and_nothing_else(inline):
    variances = {"a": 1.0, "b": 2.0, "c": 8.0}
    expected = [(20 * 1.0 + 10 * 2.0 + 5 * 8.0) / 35] * 8
    sizes = [20, 10, 5]
    for strategy in (strategies.FedAdam(), strategies.Median(), strategies.Krum(0)):
        train = setting(variances, "1.running_var")
        model = after(inline, batchnorm_net(), train, sizes, strategy=strategy)
        assert model[1].running_var.tolist() == torch.tensor(expected).tolist()
        assert model[1].running_mean.tolist() == [0.0] * 8


def test_02_counters_are_exact_integers_without_a_dimension(inline):
    train = setting({"a": 16_777_217, "b": 16_777_216}, "1.num_batches_tracked")
    counter = after(inline, batchnorm_net(), train, [4, 8])[1].num_batches_tracked
    assert (counter.item(), counter.dtype, counter.shape) == (16_777_217, torch.int64, ())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_03_half_precision_is_summed_wide_and_rounded_once(inline, dtype):
    clients = {f"c{number}": (torch.zeros(1, 6), torch.zeros(1)) for number in range(400)}

    def train(model, x, y, ctx):
        nn.init.constant_(model.weight, 400.0 if ctx.client == "c399" else 1.0)

    aggregator = Aggregator(linear().to(dtype), FederatedDataset(clients, inline), train)
    aggregator.run(1)
    expected = torch.tensor(799 / 400, dtype=torch.float64).to(dtype)
    assert aggregator.model.weight.dtype is dtype
    assert set(aggregator.model.weight.flatten().tolist()) == {expected.item()}


def test_04_nobody_with_rows_is_no_mean_and_sizes_are_rounded(inline):
    assert [cohort_size(f, n) for f, n in ((0.29, 100), (0.057, 1000), (0.001, 10))] == [29, 57, 1]
    aggregator = Aggregator(linear(), FederatedDataset(shards([0, 0]), inline), setting({}))
    with pytest.raises(QuorumError):
        aggregator.run(1)
    assert bits(aggregator.model) == bits(linear())
    aggregator = Aggregator(
        linear(), FederatedDataset(shards([0, 3]), inline), setting({"a": float("nan"), "b": 2.0})
    )
    record = aggregator.run_round()
    assert (record.skipped, record.accepted, record.examples) == (("a",), ("b",), 3)
    assert set(aggregator.model.weight.flatten().tolist()) == {2.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_05_one_value_that_is_not_finite_removes_its_client_before_the_sum(inline, bad):
    def train(model, x, y, ctx):
        setting({"a": 1.0, "b": 5.0, "c": 3.0})(model, x, y, ctx)
        if ctx.client == "b":
            model.weight.data[1, 2] = bad

    for strategy in (strategies.FedAvg(), strategies.Median(), strategies.GeometricMedian()):
        data = FederatedDataset(shards([4, 4, 4]), inline)
        aggregator = Aggregator(linear(), data, train, strategy=strategy)
        record = aggregator.run_round()
        assert list(record.failures) == ["b"]
        assert set(aggregator.model.weight.flatten().tolist()) == {2.0}


class Tied(nn.Module):
    """One matrix under two names."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.decode.weight = self.encode.weight


class Masked(nn.Module):
    """A mask of -inf is a buffer as it should be."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf"), 0.0]))
        self.spoils = False

    def forward(self, x):
        if self.spoils:
            self.mask[0] = float("nan")
        return self.layer(x).where(torch.isfinite(self.mask), torch.zeros(3))


@pytest.mark.parametrize("vectorize", [False, True])
def test_05_a_mask_of_infinities_is_no_reason(inline, vectorize):
    data = FederatedDataset(shards((4, 5, 6)), inline)
    local = LocalTraining(cross_entropy, sgd, batch_size=4)
    aggregator = Aggregator(Masked(), data, local, vectorize=vectorize)
    before = bits(aggregator.model.layer)
    for record in aggregator.run(2, progress=False):
        assert not record.failures
    assert torch.equal(aggregator.model.mask, torch.tensor([0.0, float("-inf"), 0.0]))
    assert bits(aggregator.model.layer) != before


def test_05_a_mask_that_training_spoils_is_one(inline):
    data = FederatedDataset(shards((4, 5, 6)), inline)
    model = Masked()
    model.spoils = True
    aggregator = Aggregator(model, data, LocalTraining(cross_entropy, sgd, batch_size=4))
    with pytest.raises(QuorumError, match="1 of 3 values of 'mask' are not finite"):
        aggregator.run(1, progress=False)


def test_06_tied_parameters_count_once_and_stay_tied(inline, tmp_path):
    data = FederatedDataset(shards([3, 1]), inline)
    aggregator = Aggregator(Tied(), data, setting({"a": 1.0, "b": 5.0}))
    record = aggregator.run_round()
    assert record.bytes_moved == 2 * 2 * 4 * 15
    aggregator.save(tmp_path / "tied")
    loaded = Aggregator.load(tmp_path / "tied", Tied(), data, setting({}))
    for model in (aggregator.model, loaded.model):
        assert model.decode.weight is model.encode.weight
        assert set(model.decode.weight.flatten().tolist()) == {2.0}


class Odd(nn.Module):
    """Parameters of every form in memory: transposed, channels last, one number, none at all."""

    def __init__(self):
        super().__init__()
        self.transposed = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
        image = torch.arange(24.0).reshape(1, 2, 3, 4)
        self.image = nn.Parameter(image.to(memory_format=torch.channels_last))
        self.number = nn.Parameter(torch.tensor(3.0))
        self.nothing = nn.Parameter(torch.empty(0, 4))


def test_07_tensors_travel_by_shape_and_what_has_no_mean_is_refused(inline):
    def double(model, x, y, ctx):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)

    model = after(inline, Odd(), double, [3, 3])
    for name, value in Odd().state_dict().items():
        found = model.get_parameter(name)
        assert torch.equal(found, 2 * value), name
        assert found.stride() == value.stride()
    for bad in (
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(1).expand(3),
        torch.eye(2).to_sparse(),
    ):
        model = nn.Module()
        model.p = nn.Parameter(bad)
        with pytest.raises(ValueError, match="'p'"):
            after(inline, model, double, [3])


def test_08_frozen_parameters_stay_and_optimizers_start_anew(inline):
    (x, y), rounds = blobs(8), 3
    model = nn.Sequential(linear(6, 6), linear())
    model[0].requires_grad_(False)
    momentum = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    local = LocalTraining(cross_entropy, momentum, batch_size=None, shuffle=False)
    aggregator = Aggregator(model, FederatedDataset({"a": (x, y)}, inline), local)
    assert aggregator.run(rounds)[-1].bytes_moved == 2 * 4 * (6 * 3 + 3)
    plain = copy.deepcopy(model)
    for _ in range(rounds):  # a momentum that starts at 0 is plain descent for one step
        loss = cross_entropy(plain(x), y)
        for parameter, grad in zip(
            plain[1].parameters(), torch.autograd.grad(loss, plain[1].parameters()), strict=True
        ):
            parameter.data -= 0.1 * grad
    assert bits(aggregator.model)["0.weight"] == bits(model)["0.weight"]
    torch.testing.assert_close(aggregator.model[1].weight, plain[1].weight)


def test_09_sums_run_in_the_order_of_the_clients_whoever_comes_first(tmp_path):
    value = {"a": 2.0**53, "b": 1.0, "c": -(2.0**53)}
    for name in "bc":
        os.mkfifo(tmp_path / name)

    def last_first(model, x, y, ctx):
        successor = {"a": "b", "b": "c"}.get(ctx.client)
        if successor:  # opening a pipe waits for the other end
            (tmp_path / successor).read_bytes()
        if ctx.client != "a":
            (tmp_path / ctx.client).write_bytes(b"done")
        setting(value)(model, x, y, ctx)
        return {"threads": torch.get_num_threads()}

    def summed(cluster, names, train):
        clients = {name: shards([2, 2, 2])[name] for name in names}
        data = FederatedDataset(clients, cluster)
        aggregator = Aggregator(linear().double(), data, train)
        assert aggregator.run_round().metrics.get("threads") in (None, 1.0)
        return set(aggregator.model.weight.flatten().tolist())

    with Cluster(["a", "b", "c"]) as cluster:
        assert summed(cluster, "abc", last_first) == {0.0}
        assert summed(cluster, "acb", last_first) == {1 / 3}
    with Cluster(1, transport="inline") as cluster:
        assert summed(cluster, "abc", setting(value)) == {0.0}
        assert summed(cluster, "acb", setting(value)) == {1 / 3}


def test_10_streams_are_named_by_seed_round_and_client_alone():
    names = [(seed, number, f"c{client}") for seed in range(9) for number in range(9)
             for client in range(9)]  # fmt: skip
    assert len({derive_seed(*name) for name in names}) == 9**3

    def draw(model, x, y, ctx):
        own = torch.rand((), generator=ctx.generator).item()
        found = random.random(), np.random.rand(), torch.rand(()).item(), own  # noqa: NPY002
        return {f"{ctx.client}{place}": value for place, value in enumerate(found)}

    def drawn(workers, transport):
        with Cluster(workers, transport=transport) as cluster:
            data = FederatedDataset(shards([2] * 4), cluster)
            history = Aggregator(linear(), data, draw, clients_per_round=2).run(4)
            return [(record.clients, record.metrics) for record in history]

    first = drawn(1, "inline")
    assert drawn(2, "process") == first
    values = [value for _, metrics in first for value in metrics.values()]
    assert len(set(values)) == len(values) == 4 * 2 * 4
    assert [clients for clients, _ in first] == [draw_cohort("abcd", 2, 0, n) for n in (1, 2, 3, 4)]


def test_11_a_last_batch_of_one_row_fails_alone_and_steps_are_those_that_ran(inline):
    data = FederatedDataset(shards([9, 8]), inline)

    def run(**options):
        local = LocalTraining(cross_entropy, sgd, **options)
        return Aggregator(batchnorm_net(), data, local, weighting="uniform").run_round()

    record = run(batch_size=8)
    assert list(record.failures) == ["a"]
    assert record.metrics["steps"] == 1.0
    assert run(batch_size=3, epochs=2).metrics["steps"] == 6.0
    assert run(batch_size=3, epochs=2, max_steps=4).metrics["steps"] == 4.0


def test_12_means_are_weighted_by_rows_and_the_rest_sees_every_output(inline):
    x, y = blobs(600)
    aggregator = Aggregator(linear(), FederatedDataset(shards([6, 2]), inline), lambda *_: {})
    outputs = linear()(x).detach()
    found = aggregator.evaluate(
        (x, y), cross_entropy, {"p90": lambda o, t: o[:, 0].double().quantile(0.9).item()}
    )
    assert found.accuracy == (outputs.argmax(1) == y).sum().item() / 600
    assert found.loss == pytest.approx(cross_entropy(outputs, y).item(), rel=1e-6)
    assert found.metrics["p90"] == pytest.approx(np.quantile(outputs[:, 0].double(), 0.9))
    own = Aggregator(
        linear(),
        FederatedDataset(shards([6, 2]), inline),
        lambda model, x, y, ctx: {"loss": {"a": 1.0, "b": 5.0}[ctx.client]},
    )
    assert own.run_round().loss == (6 * 1.0 + 2 * 5.0) / 8


@pytest.mark.faults
def test_13_what_a_dying_worker_wrote_is_never_summed(tmp_path):
    flag = str(tmp_path / "died")

    def train(model, x, y, ctx):
        setting({"a": 1.0, "b": 3.0})(model, x, y, ctx)
        if ctx.client == "b" and not Path(flag).exists():
            model.weight.data[0].fill_(1e9)
            Path(flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    with Cluster(2, restart=True) as cluster:
        model = after(cluster, linear(), train, [2, 2])
    assert Path(flag).exists()
    assert set(model.weight.flatten().tolist()) == {2.0}


@pytest.mark.faults
def test_14_memory_belongs_to_who_made_it_and_outlives_the_workers_that_read_it():
    before = set(Path("/dev/shm").glob("*")) if Path("/dev/shm").is_dir() else set()
    x = torch.arange(300_000.0)
    with Cluster(["alice", "bob"]) as cluster:
        kept, read = cluster["alice"].send(x), cluster["bob"].send(x)
        assert read.sum().item() == x.sum().item()
        cluster["bob"].kill()
        assert torch.equal(kept.fetch(), x)
        mine = kept.fetch()
        cluster["alice"].kill()
        assert torch.equal(mine, x)
        if Path("/dev/shm").is_dir():
            assert set(Path("/dev/shm").glob("*")) == before


@pytest.mark.parametrize("alpha", [0.01, 0.1, 100.0])
def test_15_skewed_splits_end_are_exact_and_know_nothing_of_workers(alpha):
    x, y = torch.arange(90), torch.arange(90) % 3
    found = []
    for workers in (1, 3):
        with Cluster(workers, transport="inline") as cluster:
            data = federate((x, y), cluster, clients=15, partition=Dirichlet(alpha, min_size=4))
            found.append([data[client][0].fetch().tolist() for client in data.clients])
    assert found[0] == found[1]
    assert min(map(len, found[0])) >= 4
    assert sorted(row for rows in found[0] for row in rows) == list(range(90))
