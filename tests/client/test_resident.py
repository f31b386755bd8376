"""The resident model is in training mode, whoever has had it in another."""

from torch import nn

from fedproc.client.resident import Resident


class Frozen(nn.BatchNorm1d):
    """Stays in evaluation: a usual way to keep its statistics."""

    def train(self, mode: bool = True) -> nn.Module:
        self.asked = getattr(self, "asked", 0) + 1
        return super().train(mode=False)


def test_every_module_trains() -> None:
    resident = Resident(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), custom=False)

    for change in (lambda model: model.eval(), lambda model: model[1].eval(), lambda _: None):
        change(resident.model)
        resident.train()
        assert all(module.training for module in resident.model.modules())


def test_a_module_with_a_will_of_its_own_is_asked() -> None:
    resident = Resident(nn.Sequential(nn.Linear(2, 2), Frozen(2)), custom=False)

    resident.train()
    resident.train()

    assert resident.model[0].training
    assert not resident.model[1].training
    assert resident.model[1].asked == 2
