"""Scenarios MD: modules and optimisers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.scenarios.toy import (
    INPUTS,
    TARGETS,
    Rnn,
    Sized,
    counts,
    linear,
    numbers,
    seeded,
    shards,
    squared_error,
)


def test_md1_one_module_is_one_object_and_one_message(hooked, cluster, bob):
    model = linear(0)
    before = cluster.messages
    m = model.send(bob)
    assert cluster.messages == before + 1
    assert counts(bob) == (1,)
    home = m.get()
    assert numbers(home) == numbers(model)
    assert counts(bob) == (0,)


# trap: PySyft made pointers to pointers, silently; the weights stayed on the first worker.
def test_md2_sending_a_model_twice_makes_two_models(hooked, bob, alice):
    model = linear(0)
    first, second = model.send(alice), model.send(bob)
    assert counts(bob, alice) == (1, 1)
    first.weight.data.zero_()
    assert numbers(second.get()) == numbers(model)
    assert numbers(first.get())[:2] == [0.0, 0.0]


def test_md3_a_hand_made_rnn_trains_where_the_data_is(alice):
    local = seeded(lambda: Rnn(3, 4, 2))
    steps, target = torch.eye(3).reshape(3, 1, 3), torch.tensor([1])
    m, data, truth = alice.send(local), alice.send(steps), alice.send(target)
    state = alice.run(torch.zeros, 1, 4)
    local_state = torch.zeros(1, 4)
    for i in range(3):
        output, state = m(data[i], state)
        local_output, local_state = local(steps[i], local_state)
    F.nll_loss(output, truth).backward()
    F.nll_loss(local_output, target).backward()
    home = m.get()
    for mine, other in zip(home.parameters(), local.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)
    before = numbers(home)
    torch.optim.SGD(home.parameters(), lr=0.1).step()
    assert numbers(home) != before


def test_md4_batchnorm_and_dropout_come_home(bob):
    make = lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))  # noqa: E731
    local, x = seeded(make), torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    m = bob.send(local)
    for _ in range(2):
        m(bob.send(x)).wait()
        local(x)
    m.eval()
    predicted = m(bob.send(x)).get()
    home = m.get()
    assert home[1].num_batches_tracked.item() == 2
    assert torch.equal(home[1].running_mean, local[1].running_mean)
    assert torch.equal(home[1].running_var, local[1].running_var)
    assert [layer.training for layer in home] == [False, False, False]
    assert torch.equal(predicted, local.eval()(x).detach())


def test_md5_gradient_norms_agree(bob):
    local = linear(0)
    m = bob.send(local)
    squared_error(m, bob.send(INPUTS * 10), bob.send(TARGETS)).backward()
    squared_error(local, INPUTS * 10, TARGETS).backward()
    remote_norm = bob.run(nn.utils.clip_grad_norm_, m.parameters(), 1.0).item()
    local_norm = nn.utils.clip_grad_norm_(local.parameters(), 1.0).item()
    assert remote_norm == pytest.approx(local_norm, abs=1e-4)
    assert torch.allclose(m.get().weight.grad, local.weight.grad)


def test_md6_models_that_legacy_pointers_could_not_run(bob):
    lstm, x = seeded(lambda: nn.LSTM(2, 3)), torch.ones(4, 1, 2)
    output, _ = bob.send(lstm)(bob.send(x))
    assert torch.equal(output.get(), lstm(x)[0].detach())
    sized = Sized()
    rows = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(bob.send(sized)(bob.send(rows)).get(), sized(rows))


@pytest.mark.parametrize(
    ("kind", "options"), [("SGD", {"lr": 0.05, "momentum": 0.9}), ("Adam", {"lr": 0.05})]
)
def test_md7_optimizer_state_stays_per_worker(bob, alice, kind, options):
    make = getattr(torch.optim, kind)
    model = linear(0)
    places = []
    for worker, (x, y) in zip((bob, alice), shards(INPUTS, TARGETS), strict=True):
        remote, local = worker.send(model), linear(0)
        places.append(
            [
                (remote, worker.run(make, remote.parameters(), **options), worker.send(x)),
                (local, make(local.parameters(), **options), x),
                (worker.send(y), y),
            ]
        )
    remote_state, local_state = model.state_dict(), model.state_dict()
    for _ in range(5):
        for (remote, opt, data), (local, local_opt, x), (truth, y) in places:
            _visit(remote, opt, data, truth, remote_state)
            _visit(local, local_opt, x, y, local_state)
            remote_state = {name: p.fetch() for name, p in remote.state_dict().items()}
            local_state = {name: p.clone() for name, p in local.state_dict().items()}
    assert all(torch.equal(remote_state[name], local_state[name]) for name in local_state)
    assert not torch.equal(remote_state["weight"], model.weight)


def _visit(model, optimizer, x, y, state):
    model.load_state_dict(state)
    optimizer.zero_grad()
    squared_error(model, x, y).backward()
    optimizer.step()
