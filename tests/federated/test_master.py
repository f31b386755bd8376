"""Server steps of half-precision models: too small to be seen at once, and not lost."""

import pytest
import torch
from torch import nn

from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.federated import strategies
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset
from fedproc.federated.fold import Received
from tests.federated.worlds import bits, cross_entropy, linear, sgd, shards

ULP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # of what lies in [1, 2)
STEPPERS = [
    strategies.FedAvg(lr=0.125),
    strategies.FedAvgM(lr=0.03125, momentum=0.5),
    strategies.FedAdam(lr=0.001),
    strategies.FedYogi(lr=0.001),
    strategies.FedAdagrad(lr=0.003),
]


@pytest.fixture(scope="module", params=["process", "inline"])
def cluster(request):
    with Cluster(2, transport=request.param) as cluster:
        yield cluster


def ones(dtype):
    model = linear().to(dtype)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    return model


def one_ulp_up(model, x, y, ctx):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.finfo(parameter.dtype).eps


def make(cluster, model, strategy, train=one_ulp_up, load=None):
    data = FederatedDataset(shards([4, 6]), cluster)
    if load is not None:
        return Aggregator.load(load, model, data, train, strategy=strategy)
    return Aggregator(model, data, train, strategy=strategy)


def plain_loop(strategy, dtype, rounds):
    """One parameter at 1.0 under ``one_ulp_up``, with its master written out."""
    master = torch.ones(1, dtype=torch.float32)
    state, seen = strategy.initial(master.double()), []
    for _ in range(rounds):
        sent = master.to(dtype)
        mean = (sent + torch.finfo(dtype).eps).double()
        received = Received(mean, None, (4.0, 6.0), (None, None), 0)
        new, state = strategy.step(sent.double(), received, state)
        master = (master.double() + (new - sent.double())).float()
        seen.append(master.to(dtype).item())
    return seen


@pytest.mark.parametrize("dtype", list(ULP))
def test_an_eighth_of_a_unit_in_the_last_place_moves_the_weight_in_the_fifth_round(cluster, dtype):
    aggregator = make(cluster, ones(dtype), strategies.FedAvg(lr=0.125))
    seen = []
    for _ in range(5):
        aggregator.run_round()
        seen.append(set(aggregator.model.weight.flatten().tolist()))
    # after four rounds half of it: a tie, which goes to the even 1.0
    assert seen == [{1.0}, {1.0}, {1.0}, {1.0}, {1.0 + ULP[dtype]}]
    assert aggregator.model.weight.dtype is dtype


@pytest.mark.parametrize("strategy", STEPPERS, ids=repr)
def test_every_server_optimizer_has_a_master(cluster, strategy):
    expected = plain_loop(strategy, torch.bfloat16, 12)
    assert expected[0] == 1.0 < expected[-1]  # the first step is too small to be seen
    aggregator = make(cluster, ones(torch.bfloat16), strategy)
    seen = []
    for _ in range(12):
        aggregator.run_round()
        assert bits(aggregator.model)["weight"][0] is torch.bfloat16
        (value,) = set(aggregator.model.weight.flatten().tolist())
        seen.append(value)
    assert seen == expected


def test_scaffold_has_one_too(cluster):
    rows = {client: (x.bfloat16(), y) for client, (x, y) in shards([4, 6]).items()}
    data = FederatedDataset(rows, cluster)
    local = LocalTraining(cross_entropy, sgd)
    models = []
    for lr in (2.0**-12, 1.0):
        strategy = strategies.Scaffold(lr=lr)
        aggregator = Aggregator(linear().bfloat16(), data, local, strategy=strategy)
        aggregator.run(2)
        models.append(aggregator._course.state)
    assert models[0]["fp32 master"].dtype is torch.float32
    assert models[0]["c"].shape == models[1]["c"].shape == models[0]["fp32 master"].shape
    assert set(models[1]) == {"c"}


def test_a_resumed_run_has_the_same_master(cluster, tmp_path):
    strategy, path = strategies.FedAvg(lr=0.125), tmp_path / "state"
    straight = make(cluster, ones(torch.bfloat16), strategy)
    straight.run(7)
    for after in range(1, 7):
        stopped = make(cluster, ones(torch.bfloat16), strategy)
        stopped.run(after)
        stopped.save(path)
        again = make(cluster, linear().bfloat16(), strategy, load=path)
        again.run(7 - after)
        assert bits(again.model) == bits(straight.model)
        assert (
            again._course.state["fp32 master"].tolist()
            == straight._course.state["fp32 master"].tolist()
        )


def test_what_the_user_writes_into_the_model_is_where_the_next_round_starts(cluster):
    aggregator = make(cluster, ones(torch.bfloat16), strategies.FedAvg(lr=0.125))
    aggregator.run(4)  # half a unit on the way
    nn.init.constant_(aggregator.model.bias, 1.5)
    aggregator.run(1)
    assert set(aggregator.model.weight.flatten().tolist()) == {1.0 + 2**-7}
    assert set(aggregator.model.bias.tolist()) == {1.5}  # an eighth again, from 1.5 on


@pytest.mark.parametrize("strategy", [strategies.FedAvg(), strategies.Median()], ids=repr)
def test_a_mean_is_cast_as_it_is_and_has_no_master(cluster, strategy):
    aggregator = make(cluster, ones(torch.bfloat16), strategy)
    aggregator.run(3)
    assert set(aggregator.model.weight.flatten().tolist()) == {1.0 + 3 * 2**-7}
    assert dict(aggregator._course.state) == {}


def test_float32_parameters_beside_half_precision_ones_are_as_without(cluster):
    def mixed():
        torch.manual_seed(0)
        return nn.ModuleDict({"wide": linear(), "narrow": linear(seed=1).bfloat16()})

    def train(model, x, y, ctx):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.rand(parameter.shape, generator=ctx.generator)

    strategy = strategies.FedAvgM(lr=0.3)
    both = make(cluster, mixed(), strategy, train)
    alone = make(cluster, mixed()["wide"], strategy, train)
    both.run(3), alone.run(3)
    assert bits(both.model["wide"]) == bits(alone.model)
    assert set(alone._course.state) == {"v"}
    assert len(both._course.state["fp32 master"]) == 21
    assert all(p.dtype is torch.bfloat16 for p in both.model["narrow"].parameters())
