"""Rounds whose clients train at once, against rounds whose clients train one by one."""

import functools
import logging
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from fedproc.client.row_loss import NotVectorizableError
from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.errors import CommandTimeoutError, QuorumError, WorkerLostError
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset
from fedproc.federated.privacy import DifferentialPrivacy
from fedproc.federated.secure_aggregation import SecureAggregation
from fedproc.federated.strategies import FedAvg, FedNova, FedProx, Median, Scaffold
from tests.federated.worlds import batchnorm_net, bits, cross_entropy, linear, sgd, shards

SIZES = [12, 9, 6, 15, 1, 8, 10, 33, 7]
momentum = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
adam = functools.partial(torch.optim.Adam, lr=0.01)
LOCAL = LocalTraining(cross_entropy, sgd, batch_size=4, epochs=2)
ONE_STEP = LocalTraining(cross_entropy, sgd, batch_size=None)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture(scope="module", params=["inline-2", "process-1", "process-2"])
def anywhere(request):
    transport, count = request.param.split("-")
    with Cluster(int(count), transport=transport) as cluster:
        yield cluster


def run(cluster, local=LOCAL, rounds=3, data=None, **options):
    data = FederatedDataset(data or shards(SIZES), cluster)
    aggregator = Aggregator(mlp(), data, local, seed=7, **options)
    aggregator.run(rounds, progress=False)
    return aggregator


def values(aggregator):
    return torch.cat([p.detach().reshape(-1) for p in aggregator.model.parameters()])


def require_same(ours, theirs):
    torch.testing.assert_close(values(ours), values(theirs), rtol=0, atol=1e-5)
    for mine, other in zip(ours.history, theirs.history, strict=True):
        assert (mine.clients, mine.accepted) == (other.clients, other.accepted)
        assert (mine.examples, mine.bytes_moved) == (other.examples, other.bytes_moved)
        assert mine.loss == pytest.approx(other.loss, rel=1e-4)
        assert mine.metrics == pytest.approx(other.metrics, rel=1e-4)
        assert mine.vectorized
        assert not other.vectorized


@pytest.mark.parametrize("optimizer", [sgd, momentum, adam])
@pytest.mark.parametrize("options", [{"epochs": 2, "batch_size": 4}, {"batch_size": None}], ids=str)
def test_the_model_is_the_sequential_one(anywhere, optimizer, options):
    local = LocalTraining(cross_entropy, optimizer, **options)
    require_same(run(anywhere, local, vectorize=True), run(anywhere, local))


@pytest.mark.parametrize(
    "strategy", [FedAvg(), FedProx(0.3), Scaffold(), FedNova(), Median()], ids=str
)
def test_strategies_see_the_same_updates(anywhere, strategy):
    options = {"strategy": strategy, "clients_per_round": 6}
    require_same(run(anywhere, vectorize=True, **options), run(anywhere, **options))


def test_equal_runs_are_equal_bits(anywhere):
    first, second = (run(anywhere, vectorize=True) for _ in range(2))
    assert bits(first.model) == bits(second.model)


def test_it_goes_on_from_a_checkpoint(anywhere, tmp_path):
    first = run(anywhere, vectorize=True, strategy=Scaffold())
    first.save(tmp_path / "state")
    options = {"seed": 7, "strategy": Scaffold(), "vectorize": True}
    again = Aggregator.load(tmp_path / "state", mlp(), first.data, LOCAL, **options)
    first.run(2, progress=False), again.run(2, progress=False)
    assert bits(first.model) == bits(again.model)
    assert [record.vectorized for record in again.history] == [True] * 5


def test_clients_whose_rows_were_made_in_the_workers(anywhere):
    pieces = shards(SIZES)
    makers = {name: functools.partial(tuple, pair) for name, pair in pieces.items()}
    data = FederatedDataset.from_factories(makers, anywhere)
    ours = Aggregator(mlp(), data, LOCAL, seed=7, vectorize=True)
    ours.run(3, progress=False)
    require_same(ours, run(anywhere))


def test_a_callback_a_deadline_and_a_profile_see_a_round_like_any_other(tmp_path):
    with Cluster(2) as cluster:
        data = FederatedDataset(shards(SIZES), cluster)
        aggregator = Aggregator(mlp(), data, LOCAL, seed=7, vectorize=True, deadline=60.0)
        record = aggregator.profile(tmp_path / "trace.json")
        assert record.failures == {}
        assert record.vectorized
        require_same(aggregator, run(cluster, rounds=1))
    assert "train" in (tmp_path / "trace.json").read_text()


# ---------------------------------------------------------------- auto


def test_auto_takes_the_faster_way_and_says_so_once(anywhere, caplog):
    caplog.set_level(logging.INFO, logger="fedproc")
    aggregator = run(anywhere, vectorize="auto")
    (message,) = [record.getMessage() for record in caplog.records]
    chosen = {"at once": True, "one by one": False}
    assert "ms a client at once" in message
    way = message.partition("trains clients ")[2].partition(":")[0]
    assert [record.vectorized for record in aggregator.history] == [chosen[way]] * 3
    expected = run(anywhere, vectorize=chosen[way])
    assert bits(aggregator.model) == bits(expected.model)


def test_auto_leaves_alone_what_cannot_be_vectorized(anywhere, caplog):
    caplog.set_level(logging.INFO, logger="fedproc")
    data = FederatedDataset(shards([4, 5, 6]), anywhere)
    aggregator = Aggregator(batchnorm_net(), data, LOCAL, vectorize="auto")
    assert not aggregator.run_round().vectorized
    assert "running statistics" in caplog.text
    tried = Aggregator(Branching(), data, LOCAL, vectorize="auto")
    assert not tried.run_round().vectorized
    assert "vmap cannot run" in caplog.text or "depends on the other rows" in caplog.text


# ---------------------------------------------------------------- refused


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        out = self.layer(x)
        return out if out.sum() > 0 else -out


@pytest.mark.parametrize("wanted", ["yes", 1, 0, None, 2.0])
def test_other_values_are_refused(anywhere, wanted):
    data = FederatedDataset(shards([4, 5]), anywhere)
    with pytest.raises(ValueError, match="vectorize must be True, False or 'auto'"):
        Aggregator(linear(), data, LOCAL, vectorize=wanted)


def test_a_model_is_refused_when_it_is_given(anywhere):
    data = FederatedDataset(shards([4, 5]), anywhere)
    with pytest.raises(NotVectorizableError, match=r"1 \(BatchNorm1d\) .* use GroupNorm"):
        Aggregator(batchnorm_net(), data, LOCAL, vectorize=True)


def test_backward_hooks_are_refused(anywhere):
    data = FederatedDataset(shards([4, 5]), anywhere)
    model = mlp()
    model[0].register_full_backward_hook(lambda module, inner, outer: None)
    with pytest.raises(NotVectorizableError, match=r"0 \(Linear\) .* backward hooks"):
        Aggregator(model, data, LOCAL, vectorize=True)


def test_a_model_is_refused_in_its_first_round(anywhere):
    data = FederatedDataset(shards([4, 5, 6, 7]), anywhere)
    aggregator = Aggregator(Branching(), data, LOCAL, vectorize=True)
    with pytest.raises(ValueError, match=r"vmap cannot run|depends on the other rows"):
        aggregator.run_round()
    assert len(aggregator.history) == 0
    anywhere.wait()  # no worker has an error that nobody has seen


# ---------------------------------------------------------------- failures


@pytest.fixture(params=[LOCAL, ONE_STEP], ids=["several-steps", "one-step"])
def local(request):
    return request.param


def test_nan_rows_of_one_client_touch_no_other(anywhere, local):
    pieces = shards(SIZES)
    broken = {name: (x.clone(), y) for name, (x, y) in pieces.items()}
    broken["d"][0][3] = math.nan
    ours = run(anywhere, local, data=broken, vectorize=True, rounds=1)
    (record,) = ours.history
    assert list(record.failures) == ["d"]
    assert isinstance(record.failures["d"], FloatingPointError)
    assert "the loss is nan at step" in str(record.failures["d"])
    require_same(ours, run(anywhere, local, data=broken, rounds=1))


def test_rows_that_raise_fail_for_their_client_only(anywhere, local):
    pieces = shards(SIZES)
    broken = {name: (x, y.clone()) for name, (x, y) in pieces.items()}
    broken["h"][1][30] = 3
    ours = run(anywhere, local, data=broken, vectorize=True, rounds=1)
    (record,) = ours.history
    assert list(record.failures) == ["h"]
    assert isinstance(record.failures["h"], IndexError)
    require_same(ours, run(anywhere, local, data=broken, rounds=1))


def test_all_failed_is_a_quorum_error(anywhere, local):
    data = {name: (x * math.nan, y) for name, (x, y) in shards(SIZES).items()}
    with pytest.raises(QuorumError) as caught:
        run(anywhere, local, data=data, vectorize=True)
    assert len(caught.value.failures) == len(SIZES)


class Killing(nn.Module):
    """Kills its process when it sees a row with 777 in it; ``flag``: only the first time."""

    def __init__(self, flag=None):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.flag = flag

    def forward(self, x):
        raw = x
        while torch._C._functorch.is_batchedtensor(raw):
            raw = torch._C._functorch.get_unwrapped(raw)
        if bool((raw == 777).any()) and not (self.flag and Path(self.flag).exists()):
            if self.flag:
                Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layer(x / 1000)


def poisoned():
    pieces = {name: (x.clone(), y) for name, (x, y) in shards(SIZES).items()}
    pieces["c"][0][0, 0] = 777
    return pieces


def play(cluster, model, local, **options):
    data = FederatedDataset(poisoned(), cluster)
    model.layer = linear()
    aggregator = Aggregator(model, data, local, vectorize=True, **options)
    return aggregator, aggregator.run_round()


@pytest.mark.faults
@pytest.mark.parametrize("restart", [False, True])
def test_a_lost_worker_costs_no_client(tmp_path, restart, local):
    (tmp_path / "never").touch()
    with Cluster(2, restart=restart) as cluster:
        ours, record = play(cluster, Killing(str(tmp_path / "died")), local)
        assert (tmp_path / "died").exists()
        assert record.failures == {}
    with Cluster(1) as cluster:
        expected, _ = play(cluster, Killing(str(tmp_path / "never")), local)
    torch.testing.assert_close(values(ours), values(expected), rtol=0, atol=1e-5)


@pytest.mark.faults
def test_a_client_that_kills_every_worker_takes_nobody_along(local):
    with Cluster(2, restart=True) as cluster:
        _, record = play(cluster, Killing(), local)
        assert list(record.failures) == ["c"]
        assert isinstance(record.failures["c"], WorkerLostError)
        assert len(record.accepted) == len(SIZES) - 1


@pytest.mark.faults
def test_without_retries_all_who_trained_at_once_are_lost(local):
    with Cluster(2, restart=True) as cluster:
        data = FederatedDataset(poisoned(), cluster)
        lost = {c for c in data.clients if data.worker_of(c) is data.worker_of("c")}
        _, record = play(cluster, Killing(), local, retries=0)
        assert set(record.failures) == lost


class Endless(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        raw = x
        while torch._C._functorch.is_batchedtensor(raw):
            raw = torch._C._functorch.get_unwrapped(raw)
        while bool((raw == 777).any()):
            signal.pause()
        return self.layer(x)


@pytest.mark.faults
@pytest.mark.parametrize("vectorize", [True, "auto"])
def test_a_deadline_ends_those_who_train_with_an_endless_client(vectorize):
    pieces = {"worker-0": poisoned()["c"], "worker-1": shards(SIZES)["a"]}
    pieces |= {"x": shards(SIZES)["b"], "y": shards(SIZES)["d"]}
    with Cluster(2) as cluster:
        data = FederatedDataset(pieces, cluster)
        homes = {client: data.worker_of(client).name for client in data.clients}
        aggregator = Aggregator(Endless(), data, LOCAL, vectorize=vectorize, deadline=16.0)
        record = aggregator.run_round()
        late = {client for client, home in homes.items() if home == "worker-0"}
        assert late <= set(record.failures)
        assert all(isinstance(e, CommandTimeoutError) for e in record.failures.values())
        assert all(worker.alive for worker in cluster)


@pytest.mark.parametrize("vectorize", [True, "auto"])
def test_what_protects_single_updates_is_refused(anywhere, vectorize):
    pytest.importorskip("dp_accounting")
    pytest.importorskip("cryptography")
    data = FederatedDataset(shards(SIZES), anywhere)
    privacy = DifferentialPrivacy(clip_norm=1.0, noise_multiplier=1.0, delta=1e-3)
    for protection in ({"privacy": privacy}, {"secure": SecureAggregation()}):
        (name,) = protection
        with pytest.raises(ValueError, match=f"{name}= protects each"):
            Aggregator(mlp(), data, LOCAL, weighting="uniform", vectorize=vectorize, **protection)


# ---------------------------------------------------------------- what a stack does not share


def two_groups(kind, **options):
    def factory(parameters):
        weights, biases = parameters[::2], parameters[1::2]
        groups = [{"params": weights}, {"params": biases, "lr": 0.01}]
        return kind(groups, lr=0.05, **options)

    return factory


@pytest.mark.parametrize(
    "factory",
    [
        two_groups(torch.optim.SGD, momentum=0.9, fused=True),
        two_groups(torch.optim.Adam, fused=True),
        two_groups(torch.optim.Adagrad, fused=True),
        lambda parameters: torch.optim.Adam(parameters[::2], lr=0.01, fused=True),
        functools.partial(torch.optim.Adagrad, lr=0.1, initial_accumulator_value=1.0),
    ],
)
def test_groups_and_initial_values_of_optimizers(anywhere, factory):
    local = LocalTraining(cross_entropy, factory, batch_size=4, epochs=2)
    require_same(run(anywhere, local, vectorize=True), run(anywhere, local))


def scheduled(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    optimizer.step = lambda closure=None: None
    return optimizer


def changing(parameters):
    parameters[0].data.mul_(2.0)  # counts no version
    return sgd(parameters)


def hooking(parameters):
    parameters[0].register_hook(lambda gradient: 0.5 * gradient)
    return sgd(parameters)


@pytest.mark.parametrize(
    ("factory", "reason"),
    [(scheduled, "step of the optimizer was replaced"), (changing, "hooks"), (hooking, "hooks")],
)
def test_factories_that_do_more_are_refused(anywhere, factory, reason):
    local = LocalTraining(cross_entropy, factory, batch_size=4)
    with pytest.raises(NotVectorizableError, match=reason):
        run(anywhere, local, rounds=1, vectorize=True)
    assert run(anywhere, local, rounds=1, vectorize="auto").history[0].vectorized is False


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    "kind",
    [nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.MultiLabelSoftMarginLoss],
)
def test_losses_that_broadcast_over_the_batch_are_refused(anywhere, kind):
    data = {client: (x, x[:, 0]) for client, (x, _) in shards(SIZES).items()}
    local = LocalTraining(kind(), sgd, batch_size=8)
    aggregator = Aggregator(
        nn.Linear(6, 1), FederatedDataset(data, anywhere), local, vectorize=True
    )
    with pytest.raises(NotVectorizableError, match=r"broadcasts outputs of shape \(\d+, 1\)"):
        aggregator.run(1)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_targets_that_broadcast_within_a_row_are_right(anywhere):
    data = {client: (x, x[:, :1]) for client, (x, _) in shards(SIZES).items()}
    local = LocalTraining(nn.MSELoss(), sgd, batch_size=4)
    require_same(run(anywhere, local, data=data, vectorize=True), run(anywhere, local, data=data))


def test_targets_that_an_unknown_loss_leaves_out_are_found(anywhere):
    data = {client: (x, y.clone()) for client, (x, y) in shards(SIZES).items()}
    data["e"][1][0] = -100
    local = LocalTraining(lambda o, y: nn.functional.cross_entropy(o, y), sgd, batch_size=4)
    aggregator = Aggregator(mlp(), FederatedDataset(data, anywhere), local, vectorize=True)
    with pytest.raises(NotVectorizableError, match="leaves them out of its mean"):
        aggregator.run(1)


@pytest.mark.parametrize("options", [{"batch_size": 4, "epochs": 2}, {"batch_size": None}], ids=str)
def test_a_sum_that_leaves_targets_out_is_right(anywhere, options):
    data = {client: (x, y.clone()) for client, (x, y) in shards(SIZES).items()}
    data["e"][1][0] = data["h"][1][5] = -100
    loss = nn.CrossEntropyLoss(reduction="sum", weight=torch.tensor([1.0, 2.0, 0.5]))
    local = LocalTraining(loss, functools.partial(torch.optim.SGD, lr=0.01), **options)
    require_same(run(anywhere, local, data=data, vectorize=True), run(anywhere, local, data=data))


def test_negative_targets_that_count_are_right(anywhere):
    """As of a hinge loss."""
    data = {client: (x, 2 * (y > 1).long() - 1) for client, (x, y) in shards(SIZES).items()}
    local = LocalTraining(hinge, sgd, batch_size=4)
    ours = run(anywhere, local, data=data, vectorize=True, rounds=2)
    require_same(ours, run(anywhere, local, data=data, rounds=2))


def hinge(outputs, targets):
    return (1 - outputs[:, 0] * targets).clamp(min=0).mean()
