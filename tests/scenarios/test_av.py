"""Scenarios AV: averaging and aggregation."""

import math

import pytest
import torch
from torch import nn

import fedproc as fp
from tests.scenarios.toy import counts, linear, numbers, squared_error


def _known(*values):
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values[:2]]))
        model.bias.fill_(values[2])
    return model


# trap: PySyft 0.2.7 to 0.2.9.2 mixed in a freshly initialised random model.
def test_av1_the_mean_is_exact(bob):
    models = [_known(1.0, 2.0, 3.0), _known(2.0, 4.0, 6.0), _known(6.0, 0.0, -3.0)]
    assert numbers(fp.weighted_average(models)) == [3.0, 2.0, 2.0]
    remote = fp.weighted_average([bob.send(model) for model in models])
    assert numbers(remote.get()) == [3.0, 2.0, 2.0]


def test_av2_constructors_and_buffers_do_not_matter():
    class Picky(nn.Module):
        def __init__(self, width, *, name):
            super().__init__()
            self.norm = nn.BatchNorm1d(width)
            self.name = name

    one, two = Picky(1, name="one"), Picky(1, name="two")
    two.norm.running_mean.fill_(3.0)
    two.norm.weight.data.fill_(5.0)
    two.norm.num_batches_tracked.fill_(4)
    mean = fp.weighted_average([one, two])
    assert type(mean) is Picky
    assert mean.norm.weight.tolist() == [3.0]
    assert mean.norm.running_mean.tolist() == [1.5]
    assert mean.norm.num_batches_tracked.item() == 4
    assert one.norm.weight.tolist() == [1.0]
    assert two.norm.running_mean.tolist() == [3.0]


def test_av3_weights_are_exact(bob):
    one, two = _known(0.0, 8.0, 4.0), _known(4.0, 0.0, 0.0)
    assert numbers(fp.weighted_average([one, two], [1, 3])) == [3.0, 2.0, 1.0]
    pointers = [bob.send(one), bob.send(two)]
    assert numbers(fp.weighted_average(pointers, [1, 3]).get()) == [3.0, 2.0, 1.0]
    with pytest.raises(ValueError, match="weight"):
        fp.weighted_average([one, two], [0, 0])
    lost = _known(math.nan, math.nan, math.nan)
    assert numbers(fp.weighted_average([one, lost], [7, 0])) == [0.0, 8.0, 4.0]


def test_av4_the_mean_is_made_at_a_third_worker(bob, alice, carol):
    trained = []
    for worker, seed in ((bob, 1), (alice, 2)):
        model = worker.send(linear(seed))
        squared_error(model, worker.run(torch.ones, 2, 2), worker.run(torch.zeros, 2, 1)).wait()
        trained.append(model.move(carol))
    assert counts(bob, alice, carol) == (0, 0, 2)
    mean = fp.weighted_average(trained)
    home = mean.get()
    expected = fp.weighted_average([linear(1), linear(2)])
    assert numbers(home) == numbers(expected)
    del trained, mean, model
    assert counts(bob, alice, carol) == (0, 0, 0)
