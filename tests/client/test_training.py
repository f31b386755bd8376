import copy
import functools

import pytest
import torch
from torch import nn

from fedproc.client.rules import ControlVariates, Proximal, step_norm
from fedproc.client.training import LocalTraining, run_local_epochs

SGD = functools.partial(torch.optim.SGD, lr=0.1)
MSE = nn.MSELoss()


def world(rows=10):
    torch.manual_seed(0)
    return nn.Linear(3, 1), (torch.randn(rows, 3), torch.randn(rows, 1))


def train(local, rows=10, correct=None):
    model, data = world(rows)
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(args[0].detach().clone()))
    progress = run_local_epochs(model, data, local, torch.Generator().manual_seed(0), correct)
    return model, data, progress, seen


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"batch_size": 4}, [4, 4, 2]),
        ({"batch_size": 4, "epochs": 2}, [4, 4, 2, 4, 4, 2]),
        ({"batch_size": None, "epochs": 3}, [10, 10, 10]),
        ({"batch_size": 64}, [10]),
        ({"batch_size": 4, "epochs": 2, "max_steps": 4}, [4, 4, 2, 4]),
        ({"batch_size": 4, "max_steps": 9}, [4, 4, 2]),
    ],
)
def test_steps_and_rows(options, batches):
    _, _, progress, seen = train(LocalTraining(MSE, SGD, **options))
    assert [len(batch) for batch in seen] == batches
    assert (progress.steps, progress.rows) == (len(batches), sum(batches))


def test_without_shuffling_rows_come_in_order_and_with_it_each_once():
    _, (x, _), _, seen = train(LocalTraining(MSE, SGD, batch_size=4, shuffle=False))
    assert torch.equal(torch.cat(seen), x)
    _, (x, _), _, seen = train(LocalTraining(MSE, SGD, batch_size=4, epochs=2))
    epochs = torch.cat(seen).split(10)
    assert not torch.equal(epochs[0], epochs[1])
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(x.tolist())


def test_the_loss_is_summed_over_rows_before_each_step():
    model, (x, y) = world()
    _, _, progress, _ = train(LocalTraining(MSE, SGD, batch_size=None, shuffle=False))
    assert progress.loss_sum == MSE(model(x), y).item() * 10


def test_a_loss_that_is_a_sum_is_summed_as_it_is():
    model, (x, y) = world()
    loss = nn.MSELoss(reduction="sum")
    _, _, progress, _ = train(LocalTraining(loss, SGD, batch_size=None, shuffle=False))
    assert progress.loss_sum == loss(model(x), y).item()


def test_gradients_are_clipped_to_a_norm():
    local = LocalTraining(
        MSE, functools.partial(torch.optim.SGD, lr=1.0), batch_size=None, clip_grad_norm=0.01
    )
    start, _ = world()
    model, *_ = train(local)
    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    )
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_a_correction_sees_the_clipped_gradient_and_changes_the_step():
    start, _ = world()
    norms = []

    def correct():
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        for parameter in model.parameters():
            parameter.grad.zero_()

    model, data = world()
    local = LocalTraining(MSE, SGD, batch_size=None, clip_grad_norm=0.01)
    run_local_epochs(model, data, local, torch.Generator(), correct)
    assert norms == [pytest.approx(0.01, rel=1e-3)]
    assert torch.equal(model.weight, start.weight)


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"shape \(10, 1\).*one number"):
        train(LocalTraining(nn.MSELoss(reduction="none"), SGD))


def test_a_loss_that_is_not_finite_ends_the_training():
    exploding = LocalTraining(MSE, functools.partial(torch.optim.SGD, lr=1e30), epochs=9)
    with pytest.raises(FloatingPointError, match="at step"):
        train(exploding)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"epochs": 0}, "epochs"),
        ({"epochs": 1.0}, "epochs"),
        ({"epochs": None}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"max_steps": 0}, "max_steps"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm"),
        ({"clip_grad_norm": float("nan")}, "clip_grad_norm"),
        ({"loss": 3}, "loss"),
        ({"optimizer": None}, "optimizer"),
        ({"optimizer": SGD([nn.Parameter(torch.ones(1))])}, r"functools\.partial.*got SGD$"),
    ],
)
def test_values_out_of_range_are_refused_at_once(options, name):
    with pytest.raises(ValueError, match=name):
        LocalTraining(**{"loss": MSE, "optimizer": SGD, **options})


def test_local_training_is_immutable_and_its_options_are_keywords():
    with pytest.raises(AttributeError):
        LocalTraining(MSE, SGD).epochs = 3
    with pytest.raises(TypeError):
        LocalTraining(MSE, SGD, 3)


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("options", "steps", "norm"),
    [
        ({}, 7, 7.0),
        ({"momentum": 0.9}, 7, 23.04672),
        ({"momentum": 0.9}, 1, 1.0),
        ({"momentum": 0.5, "nesterov": True}, 2, 1.5 + 1.75),
        ({"momentum": 0.5, "dampening": 0.5}, 2, 1.0 + 1.0),
    ],
)
def test_the_norm_of_steps_of_sgd(options, steps, norm):
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.1, **options)
    assert step_norm(optimizer, steps) == pytest.approx(norm, abs=1e-5)
    for _ in range(steps):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert parameter.item() == pytest.approx(-0.1 * norm, abs=1e-6)


def test_proximal_adds_mu_times_the_distance():
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    pull = Proximal(0.5).start([parameter], {}, {})
    with torch.no_grad():
        parameter += torch.tensor([4.0, -2.0])
    parameter.grad = torch.tensor([1.0, 1.0])
    pull.apply()
    assert parameter.grad.tolist() == [3.0, 0.0]
    assert Proximal(0.0).start([parameter], {}, {}) is None


def test_control_variates_become_the_mean_gradient_of_the_steps():
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    frozen_grad = nn.Parameter(torch.tensor([1.0]))
    shared = {"c": torch.tensor([0.5, -0.5, 0.0], dtype=torch.float64)}
    state = {"c_i": torch.tensor([0.25, 0.25, 0.0])}
    drift = ControlVariates().start([parameter, frozen_grad], shared, state)
    optimizer = torch.optim.SGD([parameter, frozen_grad], lr=0.5)
    for gradient in ([1.0, 0.0], [3.0, 2.0]):
        parameter.grad = torch.tensor(gradient)
        drift.apply()
        optimizer.step()

    class Progress:
        steps = 2

    Progress.optimizer = optimizer
    assert parameter.tolist() == [1.0 - 0.5 * (4.0 + 0.5), 2.0 - 0.5 * (2.0 - 1.5)]
    assert drift.keep(Progress)["c_i"].tolist() == [2.0, 1.0, 0.0]


def test_training_leaves_the_rows_alone():
    model, data = world()
    before = copy.deepcopy(data)
    run_local_epochs(model, data, LocalTraining(MSE, SGD), torch.Generator())
    assert all(torch.equal(a, b) for a, b in zip(data, before, strict=True))
