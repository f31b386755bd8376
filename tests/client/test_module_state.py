"""What code cannot change costs nothing, and what a loss keeps is found."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedproc.client.module_state import ModuleState, keepers_of
from fedproc.client.resident import Resident


class Head(nn.Module):
    """Only computes, and could do so in place."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(x))


class Scaled:
    """A loss that is no module."""

    def __init__(self) -> None:
        self.scale = torch.ones(())

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) * self.scale

    def method(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self(outputs, targets)


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def net(head: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8).requires_grad_(False), nn.BatchNorm1d(8), head)


def test_of_torchs_modules_nothing_is_kept() -> None:
    for modules in (net(nn.Linear(8, 3)).modules(), [nn.CrossEntropyLoss(weight=torch.ones(3))]):
        state = ModuleState(modules)
        assert not state.is_watching
        assert state._tensors == []


def test_of_code_that_only_computes_tensors_are_kept_unless_they_are_trained() -> None:
    model = net(Head())
    buffers = list(model.buffers())

    state = ModuleState(model.modules(), loaded=[*model[1].parameters(), *buffers])

    assert not state.is_watching
    frozen = [*model[0].parameters(), *model[2].parameters()]
    assert {id(kept._tensor) for kept in state._tensors if kept._values is not None} == set(
        map(id, frozen)
    )
    assert {id(kept._tensor) for kept in state._tensors if kept._values is None} == set(
        map(id, buffers)
    )


def test_a_loss_does_not_make_the_model_one_to_be_watched() -> None:
    assert not Resident(net(Head()), custom=False, loss=Scaled())._state.is_watching


@pytest.mark.parametrize(
    "loss",
    [F.cross_entropy, loss_of, functools.partial(F.cross_entropy, weight=torch.ones(3)), Tensor],
)
def test_functions_keep_nothing(loss: object) -> None:
    assert keepers_of(loss) == []


def test_keepers_of_losses() -> None:
    scaled, total = Scaled(), torch.zeros(())
    assert keepers_of(scaled) == [scaled]
    assert keepers_of(scaled.method) == [scaled]
    assert keepers_of(functools.partial(functools.partial(loss_of, total), other=scaled)) == [
        total,
        scaled,
    ]
    inner = nn.Sequential(nn.MSELoss())
    assert keepers_of(inner) == [inner, inner[0]]
