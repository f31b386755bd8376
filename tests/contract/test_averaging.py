"""weighted_average: exact means, inputs untouched, refusals."""

import math

import pytest
import torch
from torch import nn

import fedproc as fp
from tests.contract.things import Net


def _linear(weight, bias):
    m = nn.Linear(2, 1)
    with torch.no_grad():
        m.weight.copy_(torch.tensor([weight]))
        m.bias.copy_(torch.tensor([bias]))
    return m


def _numbers(m):
    return [*m.weight.flatten().tolist(), *m.bias.tolist()]


def test_the_plain_mean_of_local_modules():
    models = [_linear([1.0, 2.0], 3.0), _linear([4.0, 5.0], 6.0), _linear([1.0, 2.0], 0.0)]
    mean = fp.weighted_average(models)
    assert type(mean) is nn.Linear
    assert _numbers(mean) == [2.0, 3.0, 3.0]
    assert _numbers(models[0]) == [1.0, 2.0, 3.0]
    assert mean is not models[0]


def test_the_weighted_mean():
    models = [_linear([0.0, 4.0], 8.0), _linear([4.0, 0.0], 0.0)]
    assert _numbers(fp.weighted_average(models, [1, 3])) == [3.0, 1.0, 2.0]


def test_module_pointers_give_a_module_pointer_there(bob):
    pointers = [bob.send(_linear([0.0, 4.0], 8.0)), bob.send(_linear([4.0, 0.0], 0.0))]
    mean = fp.weighted_average(pointers, [1, 3])
    assert isinstance(mean, fp.ModulePointer)
    assert mean.worker is bob
    assert len(bob.objects) == 3
    assert _numbers(mean.get()) == [3.0, 1.0, 2.0]
    assert [_numbers(p.get()) for p in pointers] == [[0.0, 4.0, 8.0], [4.0, 0.0, 0.0]]


def test_models_in_two_places_are_refused(bob, alice):
    here = _linear([1.0, 1.0], 1.0)
    for pair in ([bob.send(here), alice.send(here)], [bob.send(here), here]):
        with pytest.raises(fp.PlacementError):
            fp.weighted_average(pair)


def test_float_buffers_are_averaged_and_integer_buffers_take_the_largest():
    one, two = Net(2, 2), Net(2, 2)
    two.offset.fill_(1.5)
    one.calls.fill_(3)
    two.calls.fill_(7)
    mean = fp.weighted_average([one, two], [3, 1])
    assert mean.offset.tolist() == [0.75, 0.75]
    assert mean.calls.item() == 7
    assert mean.calls.dtype is torch.int64
    assert one.offset.tolist() == [0.5, 0.5]


def test_batchnorm_is_averaged():
    one, two = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    two.running_mean.fill_(4.0)
    two.num_batches_tracked.fill_(9)
    mean = fp.weighted_average([one, two])
    assert mean.running_mean.tolist() == [2.0]
    assert mean.num_batches_tracked.item() == 9


def test_sums_are_float64():
    models = [_linear([1e8, 1.0], 0.0), _linear([1.0, 1.0], 0.0), _linear([-1e8, 1.0], 0.0)]
    assert _numbers(fp.weighted_average(models))[0] == torch.tensor(1 / 3).item()


def test_half_precision_is_cast_once():
    models = [nn.Linear(1, 1, bias=False).half() for _ in range(3)]
    for m, value in zip(models, (2048.0, 1.0, 1.0), strict=True):
        m.weight.data.fill_(value)
    mean = fp.weighted_average(models)
    assert mean.weight.dtype is torch.float16
    assert mean.weight.item() == torch.tensor(2050 / 3).half().item()


def test_a_model_of_weight_zero_contributes_nothing():
    bad = _linear([math.nan, math.inf], math.nan)
    assert _numbers(fp.weighted_average([_linear([1.0, 2.0], 3.0), bad], [5, 0])) == [1.0, 2.0, 3.0]


def test_tied_stay_tied_and_frozen_stay_frozen():
    def tied():
        m = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
        m[1].weight = m[0].weight
        m[1].bias.requires_grad_(False)
        return m

    mean = fp.weighted_average([tied(), tied()])
    assert mean[0].weight is mean[1].weight
    assert mean[1].bias.requires_grad is False
    assert mean[0].weight.requires_grad is True


def test_the_result_has_no_gradients_and_the_first_models_mode():
    one, two = _linear([1.0, 1.0], 1.0).eval(), _linear([1.0, 1.0], 1.0)
    one(torch.ones(1, 2)).sum().backward()
    mean = fp.weighted_average([one, two])
    assert mean.weight.grad is None
    assert mean.training is False
    assert one.weight.grad.tolist() == [[1.0, 1.0]]
    assert fp.weighted_average([two, one]).training is True


ONE = _linear([1.0, 1.0], 1.0)
REFUSED = {
    "no models": ([], None),
    "total weight 0": ([ONE, ONE], [0, 0]),
    "negative weight": ([ONE, ONE], [2, -1]),
    "too few weights": ([ONE, ONE], [1]),
    "too many weights": ([ONE], [1, 1]),
    "NaN weight": ([ONE, ONE], [1, math.nan]),
    "other shapes": ([ONE, nn.Linear(3, 1)], None),
    "other architecture": ([ONE, nn.Sequential(nn.Linear(2, 1))], None),
}


@pytest.mark.parametrize(("models", "weights"), REFUSED.values(), ids=REFUSED)
def test_refusals(models, weights):
    with pytest.raises(ValueError, match=r"\w{3}"):
        fp.weighted_average(models, weights)


def test_refusals_of_pointers_too(bob):
    m = bob.send(ONE)
    for weights in ([0], [-1], [1, 1], [math.nan]):
        with pytest.raises(ValueError, match=r"\w{3}"):
            fp.weighted_average([m], weights)
    wide = bob.send(nn.Linear(3, 1))
    with pytest.raises(ValueError, match=r"\w{3}"):
        fp.weighted_average([m, wide]).get()
