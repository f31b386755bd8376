"""A step without torch's wrappers is the optimizer's step, and nobody who watches is left out."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers

from fedproc.client.stepping import step_of, zero_grad_of

Factory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

FACTORIES: dict[str, Factory] = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.1),
    "rates": lambda parameters: torch.optim.SGD(
        [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.3}], lr=0.1
    ),
    "decay": functools.partial(torch.optim.SGD, lr=0.1, weight_decay=0.1),
    "ascent": functools.partial(torch.optim.SGD, lr=0.1, maximize=True),
    "foreach": functools.partial(torch.optim.SGD, lr=0.1, foreach=True),
    "fused": functools.partial(torch.optim.SGD, lr=0.1, fused=True),
    "rate": functools.partial(torch.optim.SGD, lr=torch.tensor(0.1)),
    "momentum": functools.partial(
        torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "Adam": functools.partial(torch.optim.Adam, lr=0.1),
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.1, amsgrad=True),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=0.01),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=0.1),
}


def sample() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(5, 3), torch.randn(4, 5), torch.randn(4, 3)


def trained(factory: Factory, *, quick: bool) -> list[torch.Tensor]:
    model, x, y = sample()
    optimizer = factory(list(model.parameters()))
    step, zero_grad = optimizer.step, optimizer.zero_grad
    if quick:
        step, zero_grad = step_of(optimizer), zero_grad_of(optimizer)
        assert step != optimizer.step, "this is the ordinary way: nothing is tested"
    for _ in range(3):
        zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        step()
    return list(model.parameters())


@pytest.mark.parametrize("name", FACTORIES)
def test_the_bits_are_those_of_the_ordinary_step(name: str) -> None:
    ours, theirs = (trained(FACTORIES[name], quick=quick) for quick in (True, False))

    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_group_that_changes_between_steps_counts_from_the_next_step() -> None:
    found = []
    for quick in (True, False):
        model, x, y = sample()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = step_of(optimizer) if quick else optimizer.step
        for momentum in (0.0, 0.9, 0.9):
            optimizer.param_groups[0].update(momentum=momentum, lr=0.1 + momentum)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            step()
        found.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))

    assert torch.equal(*found)


def test_a_hook_is_called_also_if_it_is_added_after_the_first_step() -> None:
    model, x, _ = sample()
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
    step = step_of(optimizer)
    model(x).sum().backward()
    step()
    optimizer.register_step_post_hook(lambda *_: seen.append("own"))
    with_all = optimizers.register_optimizer_step_pre_hook(lambda *_: seen.append("of all"))
    try:
        step()
    finally:
        with_all.remove()

    assert seen == ["of all", "own"]


def test_a_scheduler_made_by_the_factory_counts_the_steps() -> None:
    model, _, _ = sample()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # it wraps optimizer.step

    assert step_of(optimizer) is optimizer.step


def test_a_subclass_with_its_own_step_and_zero_grad_keeps_them() -> None:
    seen = []

    class Own(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            seen.append("step")

        def zero_grad(self, set_to_none: bool = True) -> None:
            seen.append("zero_grad")

    optimizer = Own(sample()[0].parameters(), lr=0.1)
    zero_grad_of(optimizer)()
    step_of(optimizer)()

    assert seen == ["zero_grad", "step"]


def test_a_step_that_was_replaced_in_the_class_is_the_one_that_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, ordinary = [], torch.optim.SGD.step

    @functools.wraps(ordinary)  # looks like the one it replaces
    def replaced(self: torch.optim.Optimizer, closure: object = None) -> None:
        seen.append("replaced")

    monkeypatch.setattr(torch.optim.SGD, "step", replaced)
    step_of(torch.optim.SGD(sample()[0].parameters(), lr=0.1))()

    assert seen == ["replaced"]


def test_only_gradients_of_the_optimizers_own_parameters_are_dropped() -> None:
    model, x, _ = sample()
    assert isinstance(model, nn.Linear)
    model(x).sum().backward()

    zero_grad_of(torch.optim.SGD([model.bias], lr=0.1))()

    assert model.bias.grad is None
    assert model.weight.grad is not None
