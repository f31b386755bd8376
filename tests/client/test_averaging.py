"""One test per promise of ``average_modules``. The numbers are exact in binary."""

import copy
import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedproc.client import averaging, compiled
from fedproc.client.averaging import average_modules

nan, inf = math.nan, math.inf


@pytest.fixture(autouse=True, params=sorted({compiled.COMPILED, False}))
def is_compiled(request, monkeypatch):
    """Every promise holds with the compiled sums and without them."""
    monkeypatch.setattr(compiled, "COMPILED", request.param)
    return request.param


class Holder(nn.Module):
    """A module that needs arguments, with one parameter or buffer ``value``."""

    def __init__(self, value, *, buffer=False, persistent=True):
        super().__init__()
        value = torch.as_tensor(value)
        if buffer:
            self.register_buffer("value", value, persistent=persistent)
        else:
            wanted = value.is_floating_point() or value.is_complex()
            self.value = nn.Parameter(value, requires_grad=wanted)


def averaged(values, weights=None, dtype=None, **options):
    models = [Holder(torch.tensor(value, dtype=dtype), **options) for value in values]
    return average_modules(models, weights).value


def assert_same(tensor, values, dtype):
    expected = torch.tensor(values, dtype=dtype)
    assert tensor.dtype == dtype
    assert torch.equal(tensor, expected), f"{tensor} is not {expected}"


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(width, 2, bias=False)
        self.tail = nn.Linear(width, 2, bias=False)
        self.tail.weight = self.head.weight

    def forward(self, x):
        return self.tail(self.body(x))


def nets(count=3, width=3):
    torch.manual_seed(0)
    return [Net(width) for _ in range(count)]


def everything(model):
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (id(t), t._version, t.clone(), t.requires_grad, t.grad) for name, t in named}


# ---------------------------------------------------------------- the mean


def test_equal_weights():
    assert_same(averaged([[1.0, 2.0], [2.0, 5.0]]).data, [1.5, 3.5], torch.float32)


def test_weights():
    values = [[1.0, -8.0], [2.0, 0.0], [4.0, 16.0]]
    result = averaged(values, [1, 2, 1])
    assert_same(result.data, [2.25, 2.0], torch.float32)


def test_a_single_model_keeps_its_values():
    assert_same(averaged([[0.1, -0.0, 3.0]], [7]).data, [0.1, -0.0, 3.0], torch.float32)
    assert math.copysign(1, averaged([-0.0]).item()) == -1


def test_sums_are_float64_and_cast_once():
    # In float32, 2**24 + 1 is 2**24; rounded after each step the mean would be 2**24 / 4.
    assert averaged([2.0**24, 1.0, 1.0, 2.0]) == 2.0**22 + 1
    # In float16 the sum would be infinite.
    assert_same(averaged([60000.0, 60000.0], dtype=torch.float16).data, 60000.0, torch.float16)


def test_the_order_of_the_sum_is_that_of_the_models():
    big = 2.0**60
    assert averaged([big, -big, 1.0], dtype=torch.float64) == 1 / 3
    assert averaged([1.0, big, -big], dtype=torch.float64) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_against_numpy(dtype):
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(7, 5, generator=generator).to(dtype) for _ in range(5)]
    weights = [0.3, 17, 1e-3, 2.5, 120]
    total, whole = np.zeros((7, 5)), 0.0
    for value, weight in zip(values, weights, strict=True):
        total += value.double().numpy() * weight
        whole += weight
    expected = torch.from_numpy(total / whole).to(dtype)
    result = average_modules([Holder(value) for value in values], weights)
    assert torch.equal(result.value.data, expected)


def test_the_place_in_a_tensor_does_not_change_the_result(monkeypatch):
    """Vectorised kernels treat the rest of a tensor differently; pieces must not be seen."""
    monkeypatch.setattr(averaging, "_PIECE", 11)
    values = [torch.full((4, 9), value, dtype=torch.float64) for value in (0.1, 0.7, -0.3)]
    result = average_modules([Holder(value) for value in values], [0.3, 0.1, 0.7]).value
    assert (result == (0.1 * 0.3 + 0.7 * 0.1 + -0.3 * 0.7) / (0.3 + 0.1 + 0.7)).all()


def test_eight_bits():
    result = averaged([1.0, 3.0], [1, 1], dtype=torch.float8_e4m3fn)
    assert result.dtype == torch.float8_e4m3fn
    assert result.float() == 2.0


def test_complex_parameters():
    result = averaged([[1 + 2j, 0j], [2 - 2j, 4j]], [1, 3], dtype=torch.complex64)
    assert_same(result.data, [1.75 - 1j, 3j], torch.complex64)
    # Parts are sums of their own: a complex product would make the real part NaN.
    assert averaged([complex(1, inf), 3 + 0j]).item() == complex(2, inf)
    assert averaged([2.0**24 + 1j, 1 + 0j, 1 + 0j, 2 + 0j]).real == 2.0**22 + 1


def test_complex_views_that_are_conjugated_lazily():
    conjugated = torch.tensor([1 + 2j, 3 - 4j]).conj()
    result = average_modules([Holder(conjugated, buffer=True)])
    assert_same(result.value.resolve_conj(), [1 - 2j, 3 + 4j], torch.complex64)


def test_empty_and_scalar_parameters():
    assert averaged([[], []]).shape == (0,)
    assert averaged([1.0, 2.0]).shape == ()


def test_infinities_and_nan_are_kept():
    assert averaged([inf, 1.0]) == inf
    assert averaged([nan, 1.0]).isnan()


# ---------------------------------------------------------------- buffers


def test_floating_buffers_are_averaged():
    assert_same(averaged([1.0, 2.0], [3, 1], buffer=True), 1.25, torch.float32)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integer_buffers_are_the_largest(dtype):
    result = averaged([[1, 7], [5, 0], [3, 3]], [100, 1, 1], dtype, buffer=True)
    assert_same(result, [5, 7], dtype)


def test_wide_integers_are_compared_exactly():
    values = [2**53, 2**53 + 1], [2**53 + 1, -(2**60)]
    assert averaged(values, dtype=torch.int64, buffer=True).tolist() == [2**53 + 1, 2**53 + 1]
    for dtype, top in [(torch.uint16, 2**16), (torch.uint32, 2**32), (torch.uint64, 2**64)]:
        result = averaged([[1, top - 1], [top // 2, 0]], dtype=dtype, buffer=True)
        assert result.tolist() == [top // 2, top - 1]


def test_bool_buffers_are_true_where_any_is():
    values = [[False, True, False], [False, False, True]]
    assert_same(averaged(values, buffer=True), [False, True, True], torch.bool)


def test_integer_parameters_are_the_largest():
    assert_same(averaged([[1, 7], [5, 0]]).data, [5, 7], torch.int64)


def test_buffers_that_are_not_saved_are_averaged_and_stay_unsaved():
    models = [Holder(value, buffer=True, persistent=False) for value in (1.0, 2.0)]
    result = average_modules(models)
    assert result.value == 1.5
    assert result.state_dict() == {}


def test_batch_norm():
    models = nets()
    for place, model in enumerate(models):
        model.train()
        for _ in range(place + 1):
            model(torch.randn(8, 2))
    norms = [model.body[1] for model in models]
    result = average_modules(models, [1, 2, 1]).body[1]
    mean = (norms[0].running_mean.double() + 2 * norms[1].running_mean + norms[2].running_mean) / 4
    assert torch.equal(result.running_mean, mean.float())
    assert result.num_batches_tracked == 3


def test_expanded_buffers_get_memory_of_their_own():
    models = [Holder(torch.tensor([value]).expand(3), buffer=True) for value in (1.0, 2.0)]
    assert_same(average_modules(models).value, [1.5, 1.5, 1.5], torch.float32)


# ---------------------------------------------------------------- weight zero


def test_weight_zero_contributes_nothing_not_even_nan():
    assert averaged([nan, 2.0, inf], [0, 1, 0]) == 2.0
    assert averaged([100, 2], [0, 1], buffer=True) == 2


# ---------------------------------------------------------------- what the result is


def test_tied_stay_tied():
    result = average_modules(nets())
    assert result.tail.weight is result.head.weight
    assert len(list(result.parameters())) == 5


def test_tied_buffers_stay_tied():
    models = [nn.ModuleList([Holder(value, buffer=True)] * 2) for value in (1.0, 2.0)]
    models[0][0].again = models[1][0].again = None
    for model in models:
        model.register_buffer("second", model[0].value)
    result = average_modules(models)
    assert result.second is result[0].value


def test_frozen_stay_frozen_and_are_averaged():
    models = [Holder(value).requires_grad_(False) for value in (1.0, 2.0)]
    result = average_modules(models)
    assert not result.value.requires_grad
    assert result.value == 1.5
    assert average_modules([Holder(1.0)]).value.requires_grad


def test_the_mode_is_that_of_the_first():
    models = nets(2)
    models[0].body.eval()
    result = average_modules(models)
    assert result.training
    assert not result.body.training
    assert not result.body[1].training


def test_the_result_has_no_gradients():
    models = nets(2)
    models[0](torch.randn(4, 2)).sum().backward()
    result = average_modules(models)
    assert all(parameter.grad is None for parameter in result.parameters())
    assert all(t.is_leaf and t.grad_fn is None for t in result.state_dict(keep_vars=True).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # float64 needs no cast
def test_the_inputs_are_untouched(dtype):
    models = [model.to(dtype) for model in nets(3)]
    models[0](torch.randn(4, 2, dtype=dtype)).sum().backward()
    before = [everything(model) for model in models]
    average_modules(models, [0, 1, 2])
    for model, then in zip(models, before, strict=True):
        now = everything(model)
        assert now.keys() == then.keys()
        for name, (key, version, value, wanted, grad) in then.items():
            assert now[name][:2] == (key, version)
            assert torch.equal(now[name][2], value)
            assert now[name][3] is wanted
            assert now[name][4] is grad


@pytest.mark.parametrize("weights", [None, [1, 0], [0, 1]])
def test_no_memory_is_shared(weights):
    models = nets(2)
    result = average_modules(models, weights)
    ours = {t.data_ptr() for t in result.state_dict().values()}
    theirs = {t.data_ptr() for model in models for t in model.state_dict().values()}
    assert not ours & theirs


def test_it_is_a_module_of_the_same_class_that_can_be_trained():
    result = average_modules([nn.LSTM(2, 3) for _ in range(2)])
    assert type(result) is nn.LSTM
    result(torch.ones(1, 1, 2))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in result.parameters())


def test_subclasses_of_parameters_are_kept():
    class Marked(nn.Parameter):
        pass

    models = [Holder(1.0), Holder(2.0)]
    for model in models:
        model.value = Marked(model.value.detach())
    assert type(average_modules(models).value) is Marked


def test_results_of_earlier_calls_kept_as_attributes():
    models = [Holder(value) for value in (1.0, 2.0)]
    for model in models:
        model.last = model.value * 2
    result = average_modules(models)
    assert result.last == 2.0
    assert result.last.is_leaf


def test_the_layout_in_memory_is_that_of_the_first():
    models = [nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last) for _ in range(2)]
    expected = (models[0].weight.double() + models[1].weight.double()) / 2
    result = average_modules(models)
    assert result.weight.stride() == models[0].weight.stride()
    assert torch.equal(result.weight, expected.float())


def test_a_module_without_tensors():
    assert isinstance(average_modules([nn.ReLU(), nn.ReLU()]), nn.ReLU)


def test_memory_is_bounded_by_one_parameter_in_float64(is_compiled):
    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.peak_bytes, self.made = 0, []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
                self.made.append(weakref.ref(result))
            storages = (ref().untyped_storage() for ref in self.made if ref() is not None)
            sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
            self.peak_bytes = max(self.peak_bytes, sum(sizes.values()))
            return result

    models = [nn.Linear(1000, 600) for _ in range(4)]
    with Watch() as watch:
        average_modules(models, [1, 2, 3, 4])
    # torch makes its sums here; the compiled ones lie on the stack
    assert watch.peak_bytes == 0 if is_compiled else 0 < watch.peak_bytes <= 600_000 * 8


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ([1.0], "2 models but 1 weights"),
        ([1.0, 1.0, 1.0], "2 models but 3 weights"),
        ([1.0, nan], r"weights\[1\] is nan"),
        ([-1.0, 2.0], r"weights\[0\] is -1.0"),
        ([1.0, inf], r"weights\[1\] is inf"),
        ([0.0, 0.0], "sum of the weights is 0"),
        ([1e308, 1e308], "sum of the weights is inf"),
    ],
)
def test_weights_that_do_not_fit(weights, match):
    with pytest.raises(ValueError, match=match):
        averaged([1.0, 2.0], weights)


def test_no_models():
    with pytest.raises(ValueError, match="no models to average"):
        average_modules([], [])


def test_what_is_not_a_model():
    with pytest.raises(TypeError, match=r"models\[1\] is not a torch.nn.Module but Tensor"):
        average_modules([Holder(1.0), torch.ones(1)])


def test_models_without_values_yet():
    with pytest.raises(ValueError, match=r"'weight' of models\[0\] has no values yet"):
        average_modules([nn.LazyLinear(3)])


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (nn.Linear(2, 3, bias=False), r"models\[1\] has no 'bias', which models\[0\] has"),
        (nn.ParameterDict({**dict(nn.Linear(2, 3).named_parameters()), "more": torch.ones(1)}),
         r"models\[1\] has 'more', which models\[0\] has not"),
        (nn.Linear(4, 3), r"'weight' is a parameter of shape \(3, 2\) .* but .* \(3, 4\)"),
        (nn.Linear(2, 3).double(), r"'weight' is .* torch.float32 in .* torch.float64 in"),
    ],
)  # fmt: skip
def test_other_architectures(other, match):
    with pytest.raises(ValueError, match=match):
        average_modules([nn.Linear(2, 3), other])


def test_a_buffer_is_no_parameter():
    with pytest.raises(ValueError, match=r"'value' is a parameter of .* but a buffer of"):
        average_modules([Holder(1.0), Holder(1.0, buffer=True)])


def test_models_that_are_tied_differently():
    models = nets(2)
    models[1].tail.weight = copy.deepcopy(models[1].tail.weight)
    for pair in (models, models[::-1]):
        with pytest.raises(ValueError, match=r"'tail.weight' is the same tensor as"):
            average_modules(pair)


def test_differences_count_also_where_the_weight_is_zero():
    with pytest.raises(ValueError, match="shape"):
        average_modules([nn.Linear(2, 3), nn.Linear(4, 3)], [1, 0])


def test_a_default_device_changes_nothing():
    models = [Holder(torch.ones(2)), Holder(torch.full((2,), 3.0))]
    with torch.device("meta"):
        mean = average_modules(models).value
    assert mean.device.type == "cpu"
    assert mean.tolist() == [2.0, 2.0]
