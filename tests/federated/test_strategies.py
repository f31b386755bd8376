"""Each strategy against an independent NumPy version, and its invariants."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedproc.client.training import LocalTraining
from fedproc.client.update import Update
from fedproc.cluster.cluster import Cluster
from fedproc.errors import QuorumError
from fedproc.federated import strategies
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset, federate
from fedproc.federated.fold import Received
from fedproc.federated.partition import IID
from fedproc.federated.strategies.krum import krum_scores
from tests.federated.worlds import bits, cross_entropy, linear, sgd, shards

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(10, 7))
WEIGHTS = RNG.integers(1, 50, 10).astype(float)
X = RNG.normal(size=7)
TRAINED = "v m c".split()


def received(rows, weights, keeps_rows, non_finite=0):
    rows, weights = np.asarray(rows, float), np.asarray(weights, float)
    mean = (rows * weights[:, None]).sum(0) / weights.sum()
    return Received(
        mean=None if keeps_rows else torch.tensor(mean),
        rows=torch.tensor(rows) if keeps_rows else None,
        weights=tuple(weights),
        step_norms=(1.0,) * len(rows),
        non_finite=non_finite,
    )


def steps(strategy, rounds):
    """The parameters after each round of means, from X."""
    x = torch.tensor(X)
    state = strategy.initial(x)
    path = []
    for rows in rounds:
        x, state = strategy.step(x, received(rows, WEIGHTS, strategy.keeps_rows), state)
        path.append(x.numpy())
    return path


def one_step(strategy, rows, weights=None, non_finite=0):
    weights = np.ones(len(rows)) if weights is None else weights
    given_rows = received(rows, weights, strategy.keeps_rows, non_finite)
    return strategy.step(torch.zeros(np.shape(rows)[1], dtype=torch.float64), given_rows, {})[
        0
    ].numpy()


ROUNDS = [RNG.normal(size=(10, 7)) for _ in range(4)]
MEANS = [(rows * WEIGHTS[:, None]).sum(0) / WEIGHTS.sum() for rows in ROUNDS]


# ---------------------------------------------------------------- server optimizers


def numpy_adaptive(second_moment, lr, beta1, tau):
    x, m, v = X.copy(), np.zeros(7), np.full(7, tau**2)
    path = []
    for mean in MEANS:
        delta = mean - x
        m = beta1 * m + (1 - beta1) * delta
        v = second_moment(v, delta**2)
        x = x + lr * m / (np.sqrt(v) + tau)
        path.append(x)
    return path


@pytest.mark.parametrize(
    ("strategy", "second_moment"),
    [
        (strategies.FedAdagrad(0.1, 0.8, 0.01), lambda v, d: v + d),
        (strategies.FedAdam(0.1, 0.8, 0.95, 0.01), lambda v, d: 0.95 * v + 0.05 * d),
        (strategies.FedYogi(0.1, 0.8, 0.95, 0.01), lambda v, d: v - 0.05 * d * np.sign(v - d)),
    ],
)
def test_adaptive_optimizers(strategy, second_moment):
    np.testing.assert_allclose(
        steps(strategy, ROUNDS), numpy_adaptive(second_moment, 0.1, 0.8, 0.01), rtol=1e-12
    )


def test_momentum():
    x, v, path = X.copy(), np.zeros(7), []
    for mean in MEANS:
        v = 0.7 * v + (mean - x)
        x = x + 0.5 * v
        path.append(x)
    np.testing.assert_allclose(steps(strategies.FedAvgM(0.5, 0.7), ROUNDS), path, rtol=1e-12)


def test_fedavg_with_a_rate_and_fedavgm_without_momentum():
    assert np.array_equal(steps(strategies.FedAvg(), ROUNDS), MEANS)
    half = steps(strategies.FedAvg(lr=0.5), ROUNDS)
    np.testing.assert_allclose(half[0], X + 0.5 * (MEANS[0] - X), rtol=1e-12)
    assert np.array_equal(steps(strategies.FedAvgM(0.5, 0.0), ROUNDS), half)


@pytest.mark.parametrize(
    ("strategy", "defaults"),
    [
        (strategies.FedAvg(), {"lr": 1.0}),
        (strategies.FedAvgM(), {"lr": 1.0, "momentum": 0.9}),
        (strategies.FedAdam(), {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}),
        (strategies.FedYogi(), {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}),
        (strategies.FedAdagrad(), {"lr": 0.01, "beta1": 0.9, "tau": 1e-3}),
        (strategies.Scaffold(), {"lr": 1.0}),
    ],
)
def test_defaults_and_immutability(strategy, defaults):
    assert {name: getattr(strategy, name) for name in defaults} == defaults
    with pytest.raises((AttributeError, TypeError)):
        strategy.lr = 3.0


# ---------------------------------------------------------------- robust rules


def test_median_of_odd_and_even_numbers():
    np.testing.assert_allclose(one_step(strategies.Median(), ROWS), np.median(ROWS, 0), rtol=1e-15)
    np.testing.assert_allclose(
        one_step(strategies.Median(), ROWS[:9]), np.median(ROWS[:9], 0), rtol=1e-15
    )


@pytest.mark.parametrize(
    ("fraction", "dropped"), [(0.0, 0), (0.1, 1), (0.29, 2), (0.3, 3), (0.49, 4)]
)
def test_trimmed_mean(fraction, dropped):
    expected = np.sort(ROWS, axis=0)[dropped : 10 - dropped].mean(0)
    np.testing.assert_allclose(
        one_step(strategies.TrimmedMean(fraction), ROWS), expected, rtol=1e-12
    )


def test_trimmed_mean_drops_the_number_that_is_meant():
    rows = RNG.normal(size=(100, 2))  # 0.29 * 100 is 28.999999999999996
    expected = np.sort(rows, axis=0)[29:71].mean(0)
    np.testing.assert_allclose(one_step(strategies.TrimmedMean(0.29), rows), expected, rtol=1e-12)


def numpy_krum(rows, byzantine, keep):
    count = len(rows)
    scores = []
    for i in range(count):
        squared = sorted(((rows[i] - rows[j]) ** 2).sum() for j in range(count) if j != i)
        scores.append(sum(squared[: count - byzantine - 2]))
    return np.mean(
        [rows[i] for i in sorted(range(count), key=lambda i: (scores[i], i))[:keep]], axis=0
    )


@pytest.mark.parametrize(("byzantine", "keep"), [(0, 1), (2, 1), (3, 1), (3, 5), (0, 8), (2, 3)])
def test_krum(byzantine, keep):
    found = one_step(strategies.Krum(byzantine, keep), ROWS)
    np.testing.assert_allclose(found, numpy_krum(ROWS, byzantine, keep), rtol=1e-12)


def test_krum_far_from_zero_does_not_cancel():
    rows = 1e8 + ROWS
    found = krum_scores(torch.tensor(rows), 2).argsort().tolist()
    assert found == krum_scores(torch.tensor(rows - 1e8), 2).argsort().tolist()


def test_krum_counts_removed_updates_as_byzantine():
    found = one_step(strategies.Krum(2), ROWS[:6], non_finite=1)
    np.testing.assert_allclose(found, numpy_krum(ROWS[:6], 1, 1))
    with pytest.raises(QuorumError, match="7 updates"):
        one_step(strategies.Krum(2), ROWS[:6])
    np.testing.assert_allclose(
        one_step(strategies.Krum(1), ROWS[:5], non_finite=3), numpy_krum(ROWS[:5], 0, 1)
    )


def test_geometric_median_has_the_least_weighted_distance():
    found = one_step(strategies.GeometricMedian(), ROWS, WEIGHTS)

    def cost(z):
        return (WEIGHTS * np.linalg.norm(ROWS - z, axis=1)).sum()

    gradient = (
        WEIGHTS[:, None] * (found - ROWS) / np.linalg.norm(ROWS - found, axis=1)[:, None]
    ).sum(0)
    assert np.linalg.norm(gradient) < 1e-6 * WEIGHTS.sum()
    for direction in np.eye(7):
        assert cost(found) <= min(cost(found + 0.01 * direction), cost(found - 0.01 * direction))


@pytest.mark.parametrize("size", [10.0, 1e6, 1e12])
def test_geometric_median_stays_with_the_honest_however_far_the_others_are(size):
    rows = np.concatenate([ROWS[:7], np.full((3, 7), size)])
    found = one_step(strategies.GeometricMedian(), rows)
    assert np.linalg.norm(found - ROWS[:7].mean(0)) < 5.0


ROBUST = [
    strategies.Median(),
    strategies.TrimmedMean(0.3),
    strategies.Krum(2),
    strategies.GeometricMedian(),
]


@pytest.mark.parametrize("strategy", ROBUST, ids=lambda s: type(s).__name__)
@given(value=st.floats(-1e3, 1e3), count=st.integers(7, 12))
def test_copies_give_the_copy(strategy, value, count):
    rows = np.full((count, 3), value)
    np.testing.assert_allclose(one_step(strategy, rows), rows[0], rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("strategy", ROBUST[:3], ids=lambda s: type(s).__name__)
def test_weights_are_ignored(strategy):
    assert np.array_equal(one_step(strategy, ROWS), one_step(strategy, ROWS, WEIGHTS))


# ---------------------------------------------------------------- clients that correct gradients


@pytest.fixture(scope="module")
def inline():
    with Cluster(2, transport="inline") as cluster:
        yield cluster


SIZES = [20, 33, 7, 12]


def run(cluster, strategy, rounds=3, optimizer=sgd, clients_per_round=1.0, **epochs):
    data = FederatedDataset(shards(SIZES), cluster)
    local = LocalTraining(cross_entropy, optimizer, **epochs)
    aggregator = Aggregator(
        linear(), data, local, strategy=strategy, clients_per_round=clients_per_round
    )
    aggregator.run(rounds)
    return aggregator


def test_fedprox_with_mu_zero_is_fedavg_to_the_bit(inline):
    prox, plain = (run(inline, s) for s in (strategies.FedProx(0.0), strategies.FedAvg()))
    assert bits(prox.model) == bits(plain.model)


def softmax_gradient(w, b, x, y):
    scores = x @ w.T + b
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    return p.T @ x / len(y), p.mean(0)


def numpy_clients():
    given_rows = shards(SIZES)
    return {c: (x.double().numpy(), y.numpy()) for c, (x, y) in given_rows.items()}


def start():
    model = linear()
    return model.weight.detach().double().numpy(), model.bias.detach().double().numpy()


def found(model):
    return model.weight.detach().numpy(), model.bias.detach().numpy()


def test_fedprox_pulls_towards_the_global_model(inline):
    mu, w, b = 0.7, *start()
    for _ in range(3):
        results = []
        for x, y in numpy_clients().values():
            lw, lb = w.copy(), b.copy()
            for _ in range(4):
                gw, gb = softmax_gradient(lw, lb, x, y)
                lw, lb = lw - 0.1 * (gw + mu * (lw - w)), lb - 0.1 * (gb + mu * (lb - b))
            results.append((lw, lb))
        w, b = (np.average([r[i] for r in results], axis=0, weights=SIZES) for i in (0, 1))
    model = run(inline, strategies.FedProx(mu), batch_size=None, epochs=4).model
    np.testing.assert_allclose(found(model)[0], w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found(model)[1], b, rtol=1e-4, atol=1e-6)


def test_scaffold_against_numpy(inline):
    rate, local_steps, (w, b) = 0.1, 3, start()
    clients = numpy_clients()
    zero = np.zeros_like(w), np.zeros_like(b)
    c, controls = zero, dict.fromkeys(clients, zero)
    for _ in range(4):
        ends, changes = [], []
        for client, (x, y) in clients.items():
            ci, (lw, lb) = controls[client], (w.copy(), b.copy())
            for _ in range(local_steps):
                gw, gb = softmax_gradient(lw, lb, x, y)
                lw = lw - rate * (gw - ci[0] + c[0])
                lb = lb - rate * (gb - ci[1] + c[1])
            new = tuple(
                old - cc + (g - end) / (local_steps * rate)
                for old, cc, g, end in zip(ci, c, (w, b), (lw, lb), strict=True)
            )
            changes.append([n - o for n, o in zip(new, ci, strict=True)])
            controls[client] = new
            ends.append((lw, lb))
        w, b = (np.mean([end[i] for end in ends], axis=0) for i in (0, 1))
        c = tuple(c[i] + sum(change[i] for change in changes) / len(clients) for i in (0, 1))
    model = run(inline, strategies.Scaffold(), rounds=4, batch_size=None, epochs=local_steps).model
    np.testing.assert_allclose(found(model)[0], w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found(model)[1], b, rtol=1e-4, atol=1e-5)


def test_scaffolds_control_is_the_mean_of_the_clients_controls(inline):
    aggregator = run(inline, strategies.Scaffold(), rounds=5, clients_per_round=2, epochs=2)
    controls = [kept["c_i"].double() for kept in aggregator._course.kept.values()]
    assert len(controls) >= 3
    mean = torch.stack(controls).sum(0) / len(SIZES)
    torch.testing.assert_close(aggregator._course.state["c"], mean, rtol=0, atol=1e-14)


def test_scaffold_averages_uniformly(inline):
    data = FederatedDataset(shards(SIZES), inline)
    models = []
    for weighting in ("examples", "uniform"):
        aggregator = Aggregator(
            linear(), data, LocalTraining(cross_entropy, sgd),
            strategy=strategies.Scaffold(), weighting=weighting,
        )  # fmt: skip
        aggregator.run(2)
        models.append(bits(aggregator.model))
    assert models[0] == models[1]


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.Adam,
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        functools.partial(torch.optim.SGD, lr=0.1, maximize=True),
        functools.partial(torch.optim.SGD, lr=0.1, weight_decay=0.1),
        functools.partial(torch.optim.SGD, lr=0.1, dampening=0.1),
        lambda p: torch.optim.SGD([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], lr=0.2),
    ],
    ids=["adam", "momentum", "nesterov", "maximize", "decay", "dampening", "two rates"],
)
def test_scaffold_refuses_what_its_formula_does_not_hold_for(inline, optimizer):
    with pytest.raises(ValueError, match="SGD"):
        run(inline, strategies.Scaffold(), optimizer=optimizer)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_with_equal_steps_is_fedavg_to_the_bit(inline, momentum):
    optimizer = functools.partial(torch.optim.SGD, lr=0.1, momentum=momentum)
    options = {"optimizer": optimizer, "max_steps": 2, "batch_size": 4, "clients_per_round": 3}
    nova, plain = (run(inline, s, **options) for s in (strategies.FedNova(), strategies.FedAvg()))
    assert bits(nova.model) == bits(plain.model)


def test_fednova_against_numpy(inline):
    shift = {"a": 1.0, "b": -2.0, "c": 0.5, "d": 4.0}
    taus = {"a": 1, "b": 5, "c": 2, "d": 9}

    def train(model, x, y, ctx):
        with torch.no_grad():
            model.weight += shift[ctx.client]
        return {"steps": taus[ctx.client]}

    data = FederatedDataset(shards(SIZES), inline)
    aggregator = Aggregator(linear(), data, train, strategy=strategies.FedNova())
    aggregator.run(1)
    p = np.array(SIZES) / sum(SIZES)
    a = np.array(list(taus.values()))
    expected = (p * a).sum() * (p * np.array(list(shift.values())) / a).sum()
    np.testing.assert_allclose(found(aggregator.model)[0] - start()[0], expected, rtol=1e-6)
    assert np.array_equal(found(aggregator.model)[1], start()[1].astype(np.float32))


def test_fednova_fails_clients_that_do_not_tell_their_steps(inline):
    data = FederatedDataset(shards(SIZES), inline)
    aggregator = Aggregator(linear(), data, lambda *_: {}, strategy=strategies.FedNova())
    with pytest.raises(QuorumError, match="steps"):
        aggregator.run(1)


def test_buffers_do_not_go_through_the_server_optimizer(inline):
    model = nn.Sequential(nn.BatchNorm1d(6), linear())

    def train(model, x, y, ctx):
        with torch.no_grad():
            model[0].running_var.fill_(2.0)

    data = FederatedDataset(shards(SIZES), inline)
    aggregator = Aggregator(model, data, train, strategy=strategies.FedAdam(lr=1.0))
    aggregator.run(1)
    assert aggregator.model[0].running_var.tolist() == [2.0] * 6


# ---------------------------------------------------------------- real data, and those who lie


def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    return (x[360:], y[360:]), (x[:360], y[:360])


def attacked(how):
    def train(model, x, y, ctx):
        start = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(10):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        if ctx.client in ("client-001", "client-004", "client-008"):
            with torch.no_grad():
                for p, s in zip(model.parameters(), start, strict=True):
                    p.copy_(how(p, s))

    return train


ATTACKS = {
    "noise": lambda p, s: s + 100 * torch.randn_like(p),
    "sign flip": lambda p, s: s - 20 * (p - s),
    "nan": lambda p, s: p * float("nan"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_three_of_ten_attackers_break_the_mean_but_not_the_robust_rules(inline, attack):
    train_set, test_set = digits()
    data = federate(train_set, inline, clients=10, partition=IID())

    def accuracy(strategy):
        torch.manual_seed(0)
        train = attacked(ATTACKS[attack])
        aggregator = Aggregator(nn.Linear(64, 10), data, train, strategy=strategy)
        return aggregator.run(8, evaluate_on=test_set)[-1].evaluation.accuracy

    for strategy in (
        strategies.Median(),
        strategies.TrimmedMean(0.3),
        strategies.Krum(3, keep=5),
        strategies.GeometricMedian(),
    ):
        assert accuracy(strategy) > 0.85, strategy
    if attack != "nan":  # a NaN update is removed before any rule sees it
        assert accuracy(strategies.FedAvg()) < 0.6


@pytest.mark.parametrize(
    "make",
    [
        lambda: strategies.FedAvg(0),
        lambda: strategies.FedAvg(float("nan")),
        lambda: strategies.FedAvgM(momentum=1.0),
        lambda: strategies.FedAdam(beta2=-0.1),
        lambda: strategies.FedYogi(tau=0),
        lambda: strategies.FedAdagrad(lr=True),
        lambda: strategies.FedProx(-1),
        lambda: strategies.FedProx(float("inf")),
        lambda: strategies.Scaffold(lr=-1),
        lambda: strategies.TrimmedMean(0.5),
        lambda: strategies.TrimmedMean(-0.1),
        lambda: strategies.Krum(-1),
        lambda: strategies.Krum(1.0),
        lambda: strategies.Krum(1, keep=0),
        lambda: strategies.GeometricMedian(steps=0),
    ],
)
def test_values_out_of_range(make):
    with pytest.raises(ValueError, match="must be"):
        make()


def test_krum_needs_enough_clients(inline):
    data = FederatedDataset(shards(SIZES), inline)
    local = LocalTraining(cross_entropy, sgd)
    with pytest.raises(ValueError, match="need 5 updates"):
        Aggregator(linear(), data, local, strategy=strategies.Krum(1))
    with pytest.raises(ValueError, match="keep=3"):
        Aggregator(linear(), data, local, strategy=strategies.Krum(0, keep=3))


def test_updates_are_what_fednova_weighs():
    first = Update(torch.zeros(0), 5, 4, 4.0, 5, 0.0)
    second = Update(torch.zeros(0), 5, 8, 8.0, 5, 0.0)
    nova = strategies.FedNova()
    assert nova.mean_weight(3.0, first, first) == 3.0
    assert nova.mean_weight(3.0, second, first) == 1.5


@pytest.mark.parametrize("workers", [1, 2])
def test_scaffold_on_private_rows_is_the_same(workers):
    def losses(*, private):
        with Cluster(workers) as cluster:
            data = FederatedDataset(shards([12, 15, 11, 20]), cluster, private=private)
            local = LocalTraining(cross_entropy, sgd, batch_size=4)
            aggregator = Aggregator(linear(), data, local, strategy=strategies.Scaffold(), seed=1)
            history = aggregator.run(3, progress=False)
            assert [dict(record.failures) for record in history] == [{}, {}, {}]
            return bits(aggregator.model), [record.loss for record in history]

    assert losses(private=True) == losses(private=False)
