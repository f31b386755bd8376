"""One optimizer for many clients is as new for each, and only where no code of users runs."""

import copy
import functools
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers

from fedproc.client.descent import Descent, Optimizers
from fedproc.client.gradients import Gradients
from fedproc.client.rules import Proximal
from fedproc.client.seeding import preserved_streams, seed_streams
from fedproc.client.training import LocalTraining, run_local_epochs

partial = functools.partial
CPU = torch.device("cpu")
SGD = partial(torch.optim.SGD, lr=0.1)

KEPT = {
    "SGD": SGD,
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "class": torch.optim.Adam,
    "Adam": partial(torch.optim.Adam, lr=0.1, betas=(0.8, 0.9)),
    "AdamW": partial(torch.optim.AdamW, lr=0.1, amsgrad=True, foreach=True),
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "Adadelta": torch.optim.Adadelta,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
}


class OwnSGD(torch.optim.SGD):
    pass


class OwnRule:
    def start(self, *_: object) -> None:
        return None


NOT_TORCHS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "function": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "subclass": partial(OwnSGD, lr=0.1),
    "tensor": partial(torch.optim.SGD, lr=torch.tensor(0.1)),
    "partial of a function": partial(lambda parameters, lr: torch.optim.SGD(parameters, lr), lr=1),
}


def trained(local: LocalTraining, *, shared: bool) -> list[torch.Tensor]:
    """Three clients, one after the other, from the same model; returns what each became."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2), torch.randn(3, 9, 3), torch.randn(3, 9, 2)
    start = [p.detach().clone() for p in model.parameters()]
    descent = Descent(model, local, None) if shared else None
    found = []
    for client in range(3):
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), start, strict=True):
                parameter.copy_(value)
        order = torch.Generator().manual_seed(client)
        run_local_epochs(model, (x[client], y[client]), local, order, None, descent)
        model.zero_grad()
        found += [p.detach().clone() for p in model.parameters()]
    return found


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    return list(nn.Linear(3, 2).parameters())


@pytest.fixture
def step_hook() -> Iterator[list[torch.optim.Optimizer]]:
    """Optimizers whose steps were seen; what looks meddles with their rate."""
    seen = []

    def meddle(optimizer: torch.optim.Optimizer, *_: object) -> None:
        seen.append(optimizer)
        optimizer.param_groups[0]["lr"] *= 2

    handle = optimizers.register_optimizer_step_post_hook(meddle)
    yield seen
    handle.remove()


@pytest.mark.parametrize("name", [*KEPT, *NOT_TORCHS])
def test_every_client_gets_the_bits_of_a_new_optimizer(name: str) -> None:
    local = LocalTraining(
        nn.MSELoss(), {**KEPT, **NOT_TORCHS}[name], epochs=3, batch_size=4, clip_grad_norm=1.0
    )

    ours, theirs = (trained(local, shared=shared) for shared in (True, False))

    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", KEPT)
def test_an_optimizer_of_torch_is_made_once_and_forgets(
    name: str, parameters: list[nn.Parameter]
) -> None:
    optimizers = Optimizers(KEPT[name])
    first = optimizers.new(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    first.step()

    assert optimizers.are_torchs()
    assert optimizers.new(parameters) is first
    assert not first.state
    first.step()
    optimizers.forget()
    assert not first.state


@pytest.mark.parametrize("name", NOT_TORCHS)
def test_a_factory_of_the_users_is_called_for_every_client(
    name: str, parameters: list[nn.Parameter]
) -> None:
    optimizers = Optimizers(NOT_TORCHS[name])

    assert not optimizers.are_torchs()
    assert optimizers.new(parameters) is not optimizers.new(parameters)


def test_one_with_a_state_from_the_start_is_made_anew(parameters: list[nn.Parameter]) -> None:
    optimizers = Optimizers(torch.optim.Adagrad)
    first = optimizers.new(parameters)

    second = optimizers.new(parameters)

    assert second is not first
    assert second.state[parameters[0]]["sum"].eq(0).all()


def test_other_parameters_get_another_optimizer(parameters: list[nn.Parameter]) -> None:
    optimizers = Optimizers(SGD)
    first = optimizers.new(parameters)

    fewer = optimizers.new(parameters[:1])

    assert fewer is not first
    assert fewer.param_groups[0]["params"] == parameters[:1]


@pytest.mark.parametrize("meddle", ["group", "attribute", "step", "hook"])
def test_one_that_somebody_meddled_with_is_not_used_again(
    meddle: str, parameters: list[nn.Parameter]
) -> None:
    optimizers = Optimizers(SGD)
    first = optimizers.new(parameters)

    if meddle == "group":
        first.param_groups[0]["lr"] = 0.2
    elif meddle == "attribute":
        first.mine = 1  # type: ignore[attr-defined]
    elif meddle == "step":
        first.step = lambda: None  # type: ignore[method-assign,assignment]
    else:
        first.register_step_post_hook(lambda *_: None)

    second = optimizers.new(parameters)
    assert second is not first
    assert second.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("name", ["__init__", "add_param_group", "step"])
def test_a_method_that_is_replaced_later_is_the_one_that_runs(
    name: str, parameters: list[nn.Parameter], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizers = Optimizers(SGD)
    first = optimizers.new(parameters)
    original, seen = getattr(torch.optim.SGD, name), []

    def replaced(self: torch.optim.SGD, *args: object, **kwargs: object) -> object:
        seen.append(name)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, name, replaced)
    second = optimizers.new(parameters)
    second.step()

    assert second is not first
    assert seen
    if name != "step":
        assert not optimizers.are_torchs()


@pytest.mark.parametrize("name", ["step", "zero_grad", "_init_group"])
def test_a_class_whose_steps_somebody_replaced_is_not_torchs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = LocalTraining(nn.MSELoss(), SGD)
    descent = Descent(nn.Linear(3, 2), local, None)
    original = getattr(torch.optim.SGD, name)

    monkeypatch.setattr(torch.optim.SGD, name, lambda *args, **more: original(*args, **more))

    with descent.within(CPU):
        assert not descent.is_closed
    assert not closed(local)


def test_clipping_that_somebody_replaced_is_not_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: None)
    assert not closed(LocalTraining(nn.MSELoss(), SGD))


def test_arguments_that_change_count_from_the_next_client(parameters: list[nn.Parameter]) -> None:
    factory = partial(torch.optim.SGD, lr=0.1)
    optimizers = Optimizers(factory)
    optimizers.new(parameters)

    factory.keywords["lr"] = 0.2

    assert optimizers.new(parameters).param_groups[0]["lr"] == 0.2


def test_a_rule_of_a_users_sees_what_the_steps_left(parameters: list[nn.Parameter]) -> None:
    model = nn.Linear(3, 2)
    local = LocalTraining(nn.MSELoss(), KEPT["momentum"])
    descent = Descent(model, local, OwnRule())  # type: ignore[arg-type]
    data = torch.ones(4, 3), torch.ones(4, 2)

    found = [
        run_local_epochs(model, data, local, torch.Generator(), None, descent).optimizer
        for _ in range(2)
    ]

    assert found[0] is not found[1]
    assert all(optimizer is not None and len(optimizer.state) == 2 for optimizer in found)


class OwnTensor(torch.Tensor):
    pass


def test_tensors_of_a_class_of_a_users_and_watched_ones_are_not_closed() -> None:
    weight = torch.ones(2).as_subclass(OwnTensor)
    assert not closed(LocalTraining(nn.CrossEntropyLoss(weight=weight), SGD))
    descent = Descent(model := nn.Linear(3, 2), LocalTraining(nn.MSELoss(), SGD), None)
    model.weight.register_hook(lambda gradient: gradient)
    with descent.within(CPU):
        assert not descent.is_closed


def closed(local: LocalTraining, rule: object = None) -> bool:
    descent = Descent(nn.Linear(3, 2), local, rule)  # type: ignore[arg-type]
    with descent.within(CPU):
        found = descent.is_closed
    assert not descent.is_closed
    return found


def test_closed_is_what_has_no_code_of_users(step_hook: list[torch.optim.Optimizer]) -> None:
    local = LocalTraining(nn.MSELoss(), SGD)
    assert not closed(local), "somebody looks at the steps of all optimizers"


def test_closed_is_what_torch_alone_computes() -> None:
    local = LocalTraining(nn.MSELoss(), SGD)

    assert closed(local)
    assert closed(local, Proximal(0.1))
    assert not closed(local, OwnRule())
    assert not closed(LocalTraining(nn.MSELoss(), NOT_TORCHS["function"]))
    assert not closed(LocalTraining(lambda x, y: (x - y).pow(random.choice([2])).sum(), SGD))


def test_a_hook_on_all_optimizers_sees_a_new_one_for_every_client(
    step_hook: list[torch.optim.Optimizer],
) -> None:
    local = LocalTraining(nn.MSELoss(), SGD, batch_size=None)

    trained(local, shared=True)

    assert len(set(map(id, step_hook))) == 3
    assert {optimizer.param_groups[0]["lr"] for optimizer in step_hook} == {0.2}


def test_streams_that_nobody_draws_from_stay_as_they_are() -> None:
    python, numpy = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    torchs = torch.get_rng_state()

    with preserved_streams(CPU, torch_only=True):
        seed_streams(7, CPU, torch_only=True)
        drawn = torch.rand(3)
        assert random.getstate() == python
        assert np.random.get_state()[1].tolist() == numpy  # noqa: NPY002

    assert torch.equal(torch.get_rng_state(), torchs)
    with preserved_streams(CPU):
        seed_streams(7, CPU)
        assert torch.equal(torch.rand(3), drawn)


# ---------------------------------------------------------------- steps of plain SGD


class Unused(nn.Module):
    """One of its parameters has no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """What the steps that leave no gradients gave: the loss, or None where there was none."""
    found: list[float | None] = []
    descend = Gradients.descend

    def noted(self: Gradients, x: torch.Tensor, y: torch.Tensor, *rest: float) -> float | None:
        found.append(descend(self, x, y, *rest))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(Gradients, "descend", noted)
    return found


@pytest.mark.parametrize("kind", [Unused, lambda: nn.Linear(3, 2)])
def test_steps_of_plain_sgd_leave_no_gradients_and_have_the_bits_of_torchs(
    kind: Callable[[], nn.Module], taken: list[float | None]
) -> None:
    torch.manual_seed(0)
    model, loss, x, y = kind(), nn.MSELoss(), torch.randn(9, 3), torch.randn(9, 2)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    local = LocalTraining(loss, SGD, batch_size=4, epochs=4, shuffle=False)
    descent = Descent(ours, local, None)

    with descent.within(CPU):
        done = run_local_epochs(ours, (x, y), local, torch.Generator(), None, descent)
    optimizer, losses = SGD(theirs.parameters()), 0.0
    for _ in range(4):
        for start in (0, 4, 8):
            optimizer.zero_grad()
            found = loss(theirs(x[start : start + 4].clone()), y[start : start + 4].clone())
            found.backward()
            losses += found.item() * len(x[start : start + 4])
            optimizer.step()

    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert done.loss_sum == losses
    # the first two batches of a shape are computed by backward; here are batches of 4 and of 1
    by_backward = [True, True, True, False, False, True, *[False] * 6]
    assert [loss is None for loss in taken] == by_backward


@pytest.mark.parametrize(
    "local",
    [
        LocalTraining(nn.MSELoss(), SGD, epochs=4, clip_grad_norm=0.1),
        LocalTraining(nn.MSELoss(), KEPT["momentum"], epochs=4),
        LocalTraining(nn.MSELoss(), NOT_TORCHS["function"], epochs=4),
    ],
)
def test_other_steps_leave_gradients_for_whoever_takes_them(
    local: LocalTraining, taken: list[float | None]
) -> None:
    model = nn.Linear(3, 2)
    descent, data = Descent(model, local, None), (torch.ones(4, 3), torch.ones(4, 2))
    with descent.within(CPU):
        run_local_epochs(model, data, local, torch.Generator(), None, descent)
    assert not taken
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_corrects_gradients_gets_them_in_every_step(taken: list[float | None]) -> None:
    model, local = nn.Linear(3, 2), LocalTraining(nn.MSELoss(), SGD, epochs=4)
    descent, data = Descent(model, local, None), (torch.ones(4, 3), torch.ones(4, 2))
    seen = []
    with descent.within(CPU):
        run_local_epochs(
            model, data, local, torch.Generator(), lambda: seen.append(model.weight.grad), descent
        )
    assert len(seen) == 4
    assert all(gradient is not None for gradient in seen)
    assert not taken


def test_a_loss_that_is_not_finite_ends_a_client_whose_steps_leave_no_gradients(
    taken: list[float | None],
) -> None:
    model, local, y = nn.Linear(3, 2), LocalTraining(nn.MSELoss(), SGD), torch.ones(4, 2)
    descent, order = Descent(model, local, None), torch.Generator()
    with descent.within(CPU):
        for _ in range(2):
            run_local_epochs(model, (torch.ones(4, 3), y), local, order, None, descent)
        assert taken == [None, None]
        data = torch.full((4, 3), torch.nan), y
        with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
            run_local_epochs(model, data, local, order, None, descent)
