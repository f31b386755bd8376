"""Scenarios F: complete flows of the tutorials and the course, with their numbers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fedproc as fp
from tests.scenarios.toy import (
    COURSE_INPUTS,
    COURSE_TARGETS,
    INPUTS,
    TARGETS,
    Cnn,
    branch,
    counts,
    double_then_abs,
    linear,
    numbers,
    seeded,
    shards,
    squared_error,
)


def _total(model, x=INPUTS, y=TARGETS):
    return squared_error(model, x, y).item()


def test_f1_the_first_tutorial(hooked, bob):
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    assert counts(bob) == (0,)
    px, py = x.send(bob), y.send(bob)
    assert counts(bob) == (2,)
    assert px.worker is bob
    assert px.shape == (2,)
    z = px + px
    assert counts(bob) == (3,)
    assert [p.get().tolist() for p in (px, py, z)] == [[1.0, 2.0], [10.0, 20.0], [2.0, 4.0]]
    assert counts(bob) == (0,)
    px, py = x.send(bob), y.send(bob)
    assert (px + py).get().tolist() == [11.0, 22.0]
    assert torch.add(px, py).get().tolist() == [11.0, 22.0]
    a, b = (torch.tensor(t.tolist(), requires_grad=True).send(bob) for t in (x, y))
    (a + b).sum().backward()
    assert a.get().grad.tolist() == b.get().grad.tolist() == [1.0, 1.0]


def _visit(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = squared_error(model, x, y)
    loss.backward()
    optimizer.step()
    return loss


def _turns(model, places, rounds):
    """Tutorial 2: the model visits each shard in turn."""
    for _ in range(rounds):
        for worker, x, y in places:
            m = worker.send(model)
            optimizer = worker.run(torch.optim.SGD, m.parameters(), lr=0.1)
            loss = _visit(m, optimizer, x, y)
            model = m.get()
            loss.get()
    return model


def _local_turns(model, x, y, rounds):
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(rounds):
        for rows, truth in shards(x, y):
            _visit(model, optimizer, rows, truth)
    return model


def _check_turns(pair, x, y, seed, bounds):
    places = [
        (worker, worker.send(rows), worker.send(truth))
        for worker, (rows, truth) in zip(pair, shards(x, y), strict=True)
    ]
    after10 = _turns(linear(seed), places, 10)
    assert _total(after10, x, y) < bounds[0]
    after20 = _turns(after10, places, 10)
    assert _total(after20, x, y) < bounds[1]
    assert numbers(after20) == numbers(_local_turns(linear(seed), x, y, 20))
    assert counts(*pair) == (2, 2)


@pytest.mark.parametrize("seed", [0, 1])
def test_f2_the_model_visits_the_data(pair, seed):
    baseline = linear(seed)
    optimizer = torch.optim.SGD(baseline.parameters(), lr=0.1)
    for _ in range(20):
        _visit(baseline, optimizer, INPUTS, TARGETS)
    assert _total(baseline) < 0.1
    _check_turns(pair, INPUTS, TARGETS, seed, (0.0712, 0.0035))


def test_f3_pointers_to_pointers(hooked, bob, alice, x):
    pp = x.send(bob).send(alice)
    assert counts(bob, alice) == (1, 1)
    p = pp.get()
    assert counts(bob, alice) == (1, 0)
    assert torch.equal(p.get(), x)
    assert counts(bob, alice) == (0, 0)
    pp = x.send(bob).send(alice)
    y = pp + pp
    assert y.get().tolist() == [2.0, 4.0]
    assert torch.equal(pp.get().get(), x)
    p = x.send(bob)
    assert counts(bob, alice) == (1, 0)
    p.move(alice)
    assert counts(bob, alice) == (0, 1)


def _averaged(model, places, sec, steps):
    """Tutorial 4: both train a copy, both copies move to sec, only the mean comes home."""
    trained = []
    for worker, x, y in places:
        m = worker.send(model)
        optimizer = worker.run(torch.optim.SGD, m.parameters(), lr=0.1)
        for _ in range(steps):
            _visit(m, optimizer, x, y)
        trained.append(m)
        del optimizer
    for m in trained:
        m.move(sec)
    one, two = trained
    mean = copy.deepcopy(model)
    for name in ("weight", "bias"):
        total = getattr(one, name).data + getattr(two, name).data
        getattr(mean, name).data = (total / 2).get()
    return mean


def _local_averaged(model, steps):
    trained = []
    for x, y in shards(INPUTS, TARGETS):
        m = copy.deepcopy(model)
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        for _ in range(steps):
            _visit(m, optimizer, x, y)
        trained.append(m)
    mean = copy.deepcopy(model)
    for name in ("weight", "bias"):
        getattr(mean, name).data = sum(getattr(m, name).data for m in trained) / 2
    return mean


def test_f4_the_trusted_aggregator(transport):
    with fp.Cluster(["bob", "alice", "sec"], transport=transport) as cluster:
        bob, alice, sec = cluster
        places = [
            (worker, worker.send(x), worker.send(y))
            for worker, (x, y) in zip((bob, alice), shards(INPUTS, TARGETS), strict=True)
        ]
        model = local = linear(0)
        for steps in [10] + [5] * 10:
            model = _averaged(model, places, sec, steps)
            local = _local_averaged(local, steps)
        assert numbers(model) == numbers(local)
        assert _total(model) < 0.15
        assert torch.equal(model(INPUTS) > 0.5, TARGETS > 0.5)
        assert counts(bob, alice, sec) == (2, 2, 0)
    for _ in range(40):
        local = _local_averaged(local, 5)
    assert _total(local) < 1e-4


def _images(rows):
    """Four classes: which quarter of the picture is bright."""
    labels = torch.arange(rows) % 4
    generator = torch.Generator().manual_seed(0)
    pictures = 0.3 * torch.randn(rows, 1, 8, 8, generator=generator)
    for quarter in range(4):
        top, left = 4 * (quarter // 2), 4 * (quarter % 2)
        pictures[labels == quarter, :, top : top + 4, left : left + 4] += 1
    return pictures, labels


def _accuracy(model, x, y):
    return (model(x).argmax(dim=1) == y).float().mean().item()


@pytest.mark.parametrize("transport", ["process"], indirect=True)  # long: not on both
def test_f5_a_convolutional_net_over_a_federated_loader(pair):
    data = fp.federate(_images(200), pair)
    loader = fp.FederatedDataLoader(data, 64, shuffle=True)
    model, central = seeded(Cnn), seeded(Cnn)
    optimizer = torch.optim.SGD(central.parameters(), lr=0.3)
    spent, order = set(), []
    for _ in range(6):
        for x, y in loader:
            order.append(x.worker.name)
            rows, truth = x.fetch(), y.fetch()
            before = pair.messages
            m = x.worker.send(model)
            opt = x.worker.run(torch.optim.SGD, m.parameters(), lr=0.3)
            F.cross_entropy(m(x), y).backward()
            opt.step()
            model = m.get()
            spent.add(pair.messages - before)
            model.zero_grad()
            optimizer.zero_grad()
            F.cross_entropy(central(rows), truth).backward()
            optimizer.step()
    assert order == ["bob", "bob", "alice", "alice"] * 6
    assert len(spent) == 1
    for mine, other in zip(model.parameters(), central.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-4)
    assert _accuracy(model, *_images(80)) == _accuracy(central, *_images(80)) > 0.9


def _regression(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=generator)
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 3


def _here(p):
    return p.clone() if isinstance(p, torch.Tensor) else p.fetch()


def _adam_epochs(models, optimizers, tables, epochs):
    """One model, one Adam per place; the weights travel as a state dict."""
    state, losses = None, []
    for _ in range(epochs):
        total = 0.0
        for model, optimizer, (x, y) in zip(models, optimizers, tables, strict=True):
            if state is not None:
                model.load_state_dict(state)
            total += _visit(model, optimizer, x, y).item()
            named = model.state_dict()
            state = {name: _here(p) for name, p in named.items()}
        losses.append(total)
    return losses, state


@pytest.mark.parametrize("transport", ["process"], indirect=True)  # long: not on both
def test_f6_tagged_shards_and_one_adam_per_worker(transport):
    with fp.Cluster(6, transport=transport) as cluster:
        tables = [_regression(5, seed) for seed in range(6)]
        held = [
            (worker.send(x, tags=("#data", "#table")), worker.send(y, tags=("#target", "#table")))
            for worker, (x, y) in zip(cluster, tables, strict=True)
        ]
        data, targets = cluster.search("#data", "#table"), cluster.search("#target", "#table")
        assert list(data) == list(targets) == [worker.name for worker in cluster]
        found = [(data[name][0], targets[name][0]) for name in data]
        make = lambda: nn.Linear(3, 1)  # noqa: E731
        models = [worker.send(seeded(make)) for worker in cluster]
        optimizers = [m.worker.run(torch.optim.Adam, m.parameters(), lr=0.1) for m in models]
        losses, state = _adam_epochs(models, optimizers, found, 50)
        local_models = [seeded(make) for _ in range(6)]
        local_optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in local_models]
        local_losses, local_state = _adam_epochs(local_models, local_optimizers, tables, 50)
        assert losses == local_losses
        assert losses[-1] < losses[0] / 100
        assert all(torch.equal(state[name], local_state[name]) for name in local_state)
        steps = optimizers[0].worker.run(
            lambda o: [int(s["step"]) for s in o.state.values()], optimizers[0]
        )
        assert steps.get() == [50, 50]
        del held


def test_f7_one_function_and_one_net_for_two_devices(cluster, bob, alice):
    local = {"bob": torch.tensor([-1.0, 2.0]), "alice": torch.tensor([3.0, -4.0])}
    held = []
    for worker in (bob, alice):
        held.append(worker.send(local[worker.name], tags=("#in", "#one")))
        held.append(worker.send(torch.ones(2), tags="#two"))
    net = seeded(lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))
    for worker in (bob, alice):
        (p,) = worker.search("#in", "#one")
        before = cluster.messages
        result = worker.run(double_then_abs, p)
        assert cluster.messages - before == 1
        assert torch.equal(result.get(), double_then_abs(local[worker.name]))
        assert torch.equal(worker.run(branch, p).get(), branch(local[worker.name]))
        out = worker.send(net)(p)
        assert torch.equal(out.get(), net(local[worker.name]).detach())
    del held


def test_f8_plain_federated_learning_lowers_the_test_loss(pair):
    loader = fp.FederatedDataLoader(fp.federate(_regression(40, 0), pair), 4)
    model, test = seeded(lambda: nn.Linear(3, 1)), _regression(20, 1)
    losses = [_total(model, *test)]
    for _ in range(10):
        for x, y in loader:
            m = x.worker.send(model)
            opt = x.worker.run(torch.optim.SGD, m.parameters(), lr=0.02)
            _visit(m, opt, x, y)
            model = m.get()
        losses.append(_total(model, *test))
    assert losses[-1] < losses[0] / 1000
    assert losses[:4] == sorted(losses[:4], reverse=True)


def test_f8_nobody_sees_a_single_update(transport):
    with fp.Cluster(["bob", "alice", "sec"], transport=transport) as cluster:
        bob, alice, sec = cluster
        start = linear(0)
        models, local = [w.send(start) for w in (bob, alice)], [linear(0), linear(0)]
        for step in range(3):
            for i, (x, y) in enumerate(shards(INPUTS + step, TARGETS)):
                worker = (bob, alice)[i]
                opt = worker.run(torch.optim.SGD, models[i].parameters(), lr=0.01)
                _visit(models[i], opt, worker.send(x), worker.send(y))
                _visit(local[i], torch.optim.SGD(local[i].parameters(), lr=0.01), x, y)
            mean = _mean_at(sec, models)
            for m in models:
                m.load_state_dict(mean)
            expected = {
                name: (local[0].state_dict()[name] + local[1].state_dict()[name]) / 2
                for name in mean
            }
            for m in local:
                m.load_state_dict(expected)
            for m in [*(m.fetch() for m in models), *local]:
                assert all(torch.equal(m.state_dict()[name], mean[name]) for name in mean)
        assert len(sec.objects) == 0


def _mean_at(sec, models):
    """Trust, not cryptography: copies meet at sec, only their mean comes home."""
    one, two = (m.copy().move(sec) for m in models)
    return {name: ((p + two.state_dict()[name]) / 2).get() for name, p in one.state_dict().items()}


def test_f9_descent_by_hand(bob):
    x, y = bob.send(COURSE_INPUTS), bob.send(COURSE_TARGETS)
    w = bob.send(torch.zeros(2, 1, requires_grad=True))
    losses = []
    for _ in range(10):
        loss = ((x.mm(w) - y) ** 2).sum()
        loss.backward()
        w.data.sub_(w.grad * 0.1)
        w.grad.zero_()
        losses.append(round(loss.get().item(), 3))
    del loss
    assert losses == [2.0, 0.56, 0.243, 0.137, 0.085, 0.054, 0.034, 0.022, 0.014, 0.009]
    assert counts(bob) == (3,)
    final = w.get().flatten().tolist()
    assert final == pytest.approx([0.054, 0.946], abs=1e-3)


def test_f9_the_garbage_lesson(hooked, bob, x):
    bob = bob.clear()
    assert counts(bob) == (0,)
    p = x.send(bob)
    assert counts(bob) == (1,)
    del p
    assert counts(bob) == (0,)
    p = x.send(bob)
    p = "asdf"
    assert counts(bob) == (0,)
    for _ in range(1000):
        p = x.send(bob)
    assert counts(bob) == (1,)
    del p


def test_f9_the_two_collocation_errors(hooked, bob, alice, x):
    p, q = x.send(bob), x.send(alice)
    with pytest.raises(fp.PlacementError, match="bob"):
        p + x
    with pytest.raises(fp.PlacementError, match="alice"):
        p + q


def test_f9_the_models_visits_on_the_courses_data(pair):
    _check_turns(pair, COURSE_INPUTS, COURSE_TARGETS, 0, (0.0649, 0.0036))


def test_f9_remote_get_and_move(hooked, bob, alice, x):
    pp = x.send(bob).send(alice)
    pp.remote_get()
    assert counts(bob, alice) == (0, 1)
    pp.move(bob)
    assert counts(bob, alice) == (1, 0)
    p = pp.move(alice)
    assert counts(bob, alice) == (0, 1)
    assert torch.equal(p.get(), x)
    assert counts(bob, alice) == (0, 0)
