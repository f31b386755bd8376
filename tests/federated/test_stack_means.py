"""Rounds in which stacks return the mean of their clients: what comes back, and who asks for it."""

import functools

import pytest
import torch

from fedproc.client import vectorizable
from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.errors import QuorumError
from fedproc.federated import stacking, supply
from fedproc.federated.fold import Fold
from fedproc.federated.lane import Lane
from fedproc.federated.strategies import (
    FedAdam,
    FedAvg,
    FedAvgM,
    FedNova,
    FedProx,
    Krum,
    Median,
    Scaffold,
)
from tests.federated.test_vectorize import (
    LOCAL,
    ONE_STEP,
    SIZES,
    mlp,
    require_same,
    run,
    values,
)
from tests.federated.worlds import cross_entropy, sgd, shards

adam = functools.partial(torch.optim.Adam, lr=0.01)


@pytest.fixture(scope="module", params=["inline", "process"])
def two(request):
    with Cluster(2, transport=request.param) as cluster:
        yield cluster


@pytest.fixture
def folded(monkeypatch):
    """How many blocks each call of the fold got."""
    seen, add = [], Fold.add

    def noting(fold, updates):
        seen.append(len(updates))
        add(fold, updates)

    monkeypatch.setattr(Fold, "add", noting)
    return seen


@pytest.fixture
def batches(monkeypatch):
    """The batches that were submitted."""
    seen, submit = [], Lane.submit

    def noting(lane, batch):
        seen.append(batch)
        submit(lane, batch)

    monkeypatch.setattr(Lane, "submit", noting)
    return seen


class Doubled(FedAvg):
    """Weighs updates by twice their rows: the mean is that of FedAvg."""

    def mean_weight(self, weight, update, first):
        return 2 * weight


class Late(FedAvg):
    """Takes updates with at least nine rows only."""

    def mean_weight(self, weight, update, first):
        if update.examples < 9:
            raise ValueError("too few rows")
        return weight


@pytest.mark.parametrize("local", [LOCAL, ONE_STEP])
@pytest.mark.parametrize(
    "strategy", [FedAvg(), FedAvg(lr=0.5), FedAvgM(), FedAdam(), FedProx(0.3), Scaffold()], ids=str
)
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_a_worker_sends_one_block(two, folded, strategy, local, weighting):
    options = {"strategy": strategy, "weighting": weighting, "clients_per_round": 8}
    ours = run(two, local, rounds=2, vectorize=True, **options)
    assert sum(folded) == 2 * len(two.workers)
    require_same(ours, run(two, local, rounds=2, **options))


@pytest.mark.parametrize("local", [LOCAL, ONE_STEP])
@pytest.mark.parametrize("strategy", [FedNova(), Median(), Krum(1), Doubled(), Late()], ids=repr)
def test_who_looks_at_updates_gets_each(two, folded, strategy, local):
    ours = run(two, local, rounds=1, vectorize=True, strategy=strategy)
    assert sum(folded) == len(ours.history[0].accepted)
    theirs = run(two, local, rounds=1, strategy=strategy)
    require_same(ours, theirs)
    few = [name for name, size in zip(shards(SIZES), SIZES, strict=True) if size < 9]
    assert list(ours.history[0].failures) == (few if isinstance(strategy, Late) else [])


def test_a_strategy_with_a_weight_of_another_kind_gets_each_update(two, folded):
    kind = type("Instance", (FedAvg,), {"mean_weight": staticmethod(lambda w, u, f: w)})
    run(two, rounds=1, vectorize=True, strategy=kind())
    assert sum(folded) == len(SIZES)


@pytest.mark.parametrize(
    ("local", "together"),
    [
        (ONE_STEP, True),
        (LocalTraining(cross_entropy, sgd, batch_size=max(SIZES)), True),
        (LocalTraining(cross_entropy, sgd, batch_size=4, max_steps=1), True),
        (LocalTraining(cross_entropy, sgd, batch_size=max(SIZES) - 1), False),
        (LocalTraining(cross_entropy, sgd, batch_size=None, epochs=2), False),
        (LocalTraining(cross_entropy, adam, batch_size=None), False),
        (LocalTraining(cross_entropy, sgd, batch_size=None, clip_grad_norm=1.0), False),
    ],
)
def test_a_model_of_any_size_takes_one_step_for_all(two, batches, monkeypatch, local, together):
    monkeypatch.setattr(vectorizable, "_MOST_BYTES", 1)  # so that no two models fit into a stack
    ours = run(two, local, rounds=2, vectorize=True)
    sizes = [len(batch.clients) for batch in batches]
    assert len(sizes) == (2 * len(two.workers) if together else 2 * len(SIZES))
    assert sum(sizes) == 2 * len(SIZES)
    assert all(batch.stacked is together for batch in batches)
    require_same(ours, run(two, local, rounds=2))


@pytest.mark.parametrize("strategy", [FedProx(0.3), Scaffold(), Median()], ids=str)
def test_it_takes_each_alone_where_that_is_not_the_mean(two, batches, monkeypatch, strategy):
    monkeypatch.setattr(vectorizable, "_MOST_BYTES", 1)
    run(two, ONE_STEP, rounds=1, vectorize=True, strategy=strategy)
    assert [len(batch.clients) for batch in batches] == [1] * len(SIZES)


def test_auto_finds_that_one_step_for_all_is_faster_or_not(two, batches, monkeypatch):
    monkeypatch.setattr(vectorizable, "_MOST_BYTES", 1)
    ours = run(two, ONE_STEP, rounds=2, vectorize="auto")
    (way,) = {record.vectorized for record in ours.history}
    assert all(batch.stacked is way for batch in batches if len(batch.clients) > 1)
    torch.testing.assert_close(
        values(ours), values(run(two, ONE_STEP, rounds=2)), rtol=0, atol=1e-5
    )


def test_a_factory_that_raises_is_told_as_ever(two):
    def broken(parameters):
        raise RuntimeError("no rate today")

    local = LocalTraining(cross_entropy, broken, batch_size=None)
    with pytest.raises(QuorumError, match=r"a: RuntimeError .*no rate today"):
        run(two, local, rounds=1, vectorize=True)
    two.wait()  # the question that nobody could answer left nothing unseen


def test_a_worker_is_given_blocks_not_clients(monkeypatch, batches):
    monkeypatch.setattr(stacking, "MOST_CLIENTS", 2)
    monkeypatch.setattr(supply, "_WINDOW_BYTES", 0)
    monkeypatch.setattr(supply, "_WINDOW_LEAST", 3)
    ahead, submit = [], Lane.submit

    def noting(lane, batch):
        submit(lane, batch)
        ahead.append((lane.blocks, lane.on_the_way))

    monkeypatch.setattr(Lane, "submit", noting)
    with Cluster(1) as cluster:
        run(cluster, ONE_STEP, rounds=1, data=shards([4] * 20), vectorize=True)
    assert max(ahead) == (3, 6)


class Reading(FedAvg):
    """FedAvg with a step that looks at where the round started."""

    seen: list = []  # noqa: RUF012

    def step(self, x, received, state):
        self.seen.append(x.clone())
        return super().step(x, received, state)


@pytest.mark.parametrize("vectorize", [False, True])
def test_a_step_that_looks_at_x_gets_it(two, vectorize):
    Reading.seen.clear()
    ours = run(two, rounds=2, vectorize=vectorize, strategy=Reading())
    torch.testing.assert_close(values(ours), values(run(two, rounds=2)), rtol=0, atol=1e-5)
    first, second = Reading.seen
    start = torch.cat([p.detach().reshape(-1) for p in mlp().parameters()]).double()
    assert torch.equal(first, start)
    assert not torch.equal(first, second)
    assert bool(torch.isfinite(second).all())


def test_fedavg_alone_is_not_shown_x():
    assert not FedAvg().looks_at_x()
    assert FedAvg(lr=0.5).looks_at_x()
    assert Reading().looks_at_x()
    other = type("Other", (FedAvg,), {})()
    assert not other.looks_at_x()
    object.__setattr__(other, "step", lambda x, received, state: (x, state))
    assert other.looks_at_x()


def test_a_step_that_replaced_the_one_of_fedavg_gets_x(two, monkeypatch):
    def halfway(strategy, x, received, state):
        return x + 0.5 * (received.mean - x), state

    expected = run(two, rounds=1, strategy=FedAvg(lr=0.5))
    monkeypatch.setattr(FedAvg, "step", halfway)
    found = run(two, rounds=1)
    torch.testing.assert_close(values(found), values(expected), rtol=0, atol=1e-6)
    assert Median().looks_at_x()


def test_a_model_with_one_row_a_client(two):
    data = shards([1] * 7)
    local = LocalTraining(cross_entropy, sgd, batch_size=1)
    ours = run(two, local, data=data, vectorize=True)
    require_same(ours, run(two, local, data=data))
