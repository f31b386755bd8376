"""The compiled sums and torch's: the same bits, whichever of the two is taken."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from fedproc.client import averaging, compiled
from fedproc.client.averaging import average_modules
from fedproc.client.weighing import add_weighted, exact_product
from fedproc.client.weighted_mean import WeightedMean

needs_it = pytest.mark.skipif(not compiled.COMPILED, reason="built without a C compiler")
rows = st.integers(1, 2**31).map(float)
fractions = st.floats(0, 2.0**100, exclude_min=True)
# around the length that is summed at a time, and around that of one call
lengths = st.one_of(
    st.integers(1, 100), st.sampled_from([8191, 8192, 8193, 16_400, 65_535, 65_553])
)
SPECIAL = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-40, 3.4e38])


def vectors(count, length, seed, offset):
    """Any bits, so subnormal and infinite values and NaN among them, and zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        bits = torch.randint(-(2**31), 2**31 - 1, (length + offset,), generator=generator)
        values = bits.to(torch.int32).view(torch.float32)
        # ordinary ones in half of the places: of any bits, few sums have terms of like size
        ordinary = torch.randn(length + offset, generator=generator)
        picked = torch.rand(length + offset, generator=generator)
        values = torch.where(picked < 0.5, ordinary, values)
        special = SPECIAL[torch.randint(len(SPECIAL), (len(values),), generator=generator)]
        made.append(torch.where(picked > 0.9, special, values)[offset:])
    return made


def assert_same_bits(found, expected):
    """A NaN need only be a NaN: which one a sum of two is, processors and torch do not promise."""
    word = {4: torch.int32, 8: torch.int64}[found.itemsize]
    assert torch.equal(found.isnan(), expected.isnan())
    zero = torch.zeros((), dtype=found.dtype)
    numbers = [torch.where(t.isnan(), zero, t).view(word) for t in (found, expected)]
    assert torch.equal(*numbers)


@needs_it
@given(
    st.one_of(
        st.lists(rows, min_size=1, max_size=20), st.lists(fractions, min_size=1, max_size=20)
    ),
    lengths,
    st.integers(0, 2**32 - 1),
    st.integers(0, 15),
    st.integers(1, 3),
)
@example([3.0], 65_553, 0, 1, 2)
@example([0.1] * 17, 16_400, 1, 3, 1)
def test_a_mean_has_the_bits_of_torch(weights, length, seed, offset, threads):
    values = list(zip(vectors(len(weights), length, seed, offset), weights, strict=True))
    found, expected = torch.full((length,), 7.0), torch.full((length,), 8.0)
    averaging._fill_compiled(found, values, threads)
    averaging._fill_in_torch(expected, values, threads)
    assert_same_bits(found, expected)


@needs_it
def test_a_long_mean_whose_threads_take_whole_pages_has_the_bits_of_torch():
    length = 4 * 2**19 + 3
    assert compiled.pieces(length).step == 2**19
    values = list(zip(vectors(2, length, 0, 1), (0.1, 3.0), strict=True))
    found, expected = torch.full((length,), 7.0), torch.full((length,), 8.0)
    averaging._fill_compiled(found, values, 2)
    averaging._fill_in_torch(expected, values, 2)
    assert_same_bits(found, expected)


@needs_it
@given(
    st.lists(st.one_of(rows, fractions, st.just(0.0)), min_size=1, max_size=4),
    lengths,
    st.integers(0, 2**32 - 1),
    st.integers(0, 15),
)
def test_a_running_sum_has_the_bits_of_torch(weights, length, seed, offset):
    found = torch.full((length + offset,), math.nan, dtype=torch.float64)[offset:]
    expected = torch.zeros(length, dtype=torch.float64)
    room = torch.empty(length, dtype=torch.float64)
    pairs = zip(vectors(len(weights), length, seed, offset), weights, strict=True)
    for place, (values, weight) in enumerate(pairs):
        compiled.add(found, [values], [weight], first=place == 0)
        exact = exact_product(weight, values.dtype)
        add_weighted(expected, values, weight, room, exact=exact)
        assert_same_bits(found, expected)


@needs_it
@pytest.mark.parametrize("length", [1, 17, 8192, 20_001])
@pytest.mark.parametrize("count", [1, 2, 8, 9, 17, 26])
@pytest.mark.parametrize("first", [True, False])
def test_many_added_at_once_have_the_bits_of_one_after_the_other(length, count, first):
    values = vectors(count, length, seed=count, offset=1)
    weights = [0.1 * place + 1 / 3 for place in range(count)]
    found, expected = torch.ones(2, length, dtype=torch.float64)
    compiled.add(found, values, weights, first=first)
    for place, (value, weight) in enumerate(zip(values, weights, strict=True)):
        compiled.add(expected, [value], [weight], first=first and place == 0)
    assert_same_bits(found, expected)


def test_product_and_sum_round_one_after_the_other():
    # 3 x 0.1 rounds up to 0.30000000000000004 = w; fused, the sum would be -2.7e-17 and not 0
    one, three = torch.tensor([-1.0]), torch.tensor([3.0])
    mean = WeightedMean(1)
    mean.add([[one]], [0.1 * 3.0])
    mean.add([[three]], [0.1])
    assert mean.result().item() == 0.0
    models = [nn.ParameterList([value]) for value in (one, three)]
    assert average_modules(models, [0.1 * 3.0, 0.1])[0].item() == 0.0


def test_a_fold_starts_at_plus_zero_and_a_mean_of_models_at_minus_zero():
    zero = torch.tensor([-0.0])
    mean = WeightedMean(1)
    mean.add([[zero]], [2.0])
    assert math.copysign(1, mean.result().item()) == 1
    averaged = average_modules([nn.ParameterList([zero])] * 2)
    assert math.copysign(1, averaged[0].item()) == -1


def test_a_fold_of_pieces_of_several_kinds_has_the_bits_of_torch_alone(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    long = torch.randn(2 * 70_000, generator=generator)
    updates = [
        [long * n, torch.randn(7, generator=generator).half(), long[::2] / n, long[:3].double()]
        for n in (1, 3, 7)
    ]
    results = []
    for is_compiled in {compiled.COMPILED, False}:
        monkeypatch.setattr(compiled, "COMPILED", is_compiled)
        mean = WeightedMean(sum(piece.numel() for piece in updates[0]))
        for weight, update in zip((3.0, 0.1, 7.0), updates, strict=True):
            mean.add([[piece] for piece in update], [weight])
        results.append(mean.result())
        together = WeightedMean(sum(piece.numel() for piece in updates[0]))
        together.add(list(zip(*updates, strict=True)), (3.0, 0.1, 7.0))
        results.append(together.result())
    flat = [torch.cat([piece.double() for piece in update]) for update in updates]
    expected = (flat[0] * 3.0 + flat[1] * 0.1 + flat[2] * 7.0) / (3.0 + 0.1 + 7.0)
    for result in results:
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("of", [lambda m: m, lambda m: m[:, 3:], lambda m: m[1:], lambda m: m.t()])
def test_the_rows_of_a_matrix_are_added_like_vectors(dtype, rows, of, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    matrix = of(torch.randn(rows + 1, rows + 1, generator=generator).to(dtype))
    weights = [0.1 * place + 1 / 3 for place in range(len(matrix))]
    results = []
    for is_compiled in {compiled.COMPILED, False}:
        monkeypatch.setattr(compiled, "COMPILED", is_compiled)
        for values in (matrix, list(matrix.clone())):
            mean = WeightedMean(matrix.shape[1])
            mean.add([values], weights)
            results.append(mean.result())
    for result in results[1:]:
        assert_same_bits(result, results[0])


@needs_it
def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"rows of \(2, 3\) have not 4 elements"):
        compiled.add(torch.zeros(4, dtype=torch.float64), torch.ones(2, 3), [1.0, 1.0], first=True)


def test_the_mean_of_nothing_is_not_a_number():
    assert WeightedMean(2).result().isnan().all()


class Own(torch.Tensor):
    """A subclass may keep its numbers elsewhere."""


@pytest.mark.parametrize(
    "values",
    [
        torch.ones(4, dtype=torch.float64),
        torch.ones(4, dtype=torch.bfloat16),
        torch.ones(8)[::2],
        torch.ones(1).expand(4),
        torch.ones(4, device="meta"),
        torch.ones(4).as_subclass(Own),
        torch.ones(4).to_sparse(),
        torch.ones(4).to_mkldnn(),
        torch._neg_view(torch.ones(4)),  # its memory holds the negative of its values
        torch.frombuffer(bytearray(20), dtype=torch.float32, count=4, offset=1),
    ],
)
def test_what_it_cannot_read_is_left_to_torch(values):
    assert not compiled.fits(values)


@needs_it
def test_what_it_can_read():
    assert compiled.fits(torch.ones(9)[1:])
    assert compiled.fits(torch.ones(0))


@pytest.mark.parametrize("is_compiled", {compiled.COMPILED, False})
def test_lazily_negated_and_strided_buffers_count_with_their_values(is_compiled, monkeypatch):
    monkeypatch.setattr(compiled, "COMPILED", is_compiled)
    models = []
    for factor in (1.0, 3.0):
        model = nn.Module()
        model.register_buffer("negated", torch._neg_view(torch.full((3,), factor)))
        model.register_buffer("strided", torch.arange(6.0)[::2] * 1)
        model.strided = (torch.arange(6.0) * factor)[::2]
        models.append(model)
    mean = average_modules(models)
    assert mean.negated.tolist() == [-2.0, -2.0, -2.0]
    assert mean.strided.tolist() == [0.0, 4.0, 8.0]


@needs_it
@pytest.mark.parametrize(
    "total",
    [
        torch.zeros(2),
        torch.zeros(4, dtype=torch.float64)[::2],
    ],
)
def test_sums_that_are_not_as_they_should_be_are_refused(total):
    with pytest.raises(ValueError, match="no float64 vector of 2 elements"):
        compiled.add(total, [torch.ones(2)], [1.0], first=True)


@needs_it
def test_vectors_of_other_lengths_and_missing_weights_are_refused():
    mean = torch.zeros(4)
    with pytest.raises(ValueError, match="not all vectors have the 4 elements"):
        compiled.mean_into(mean, [torch.ones(4), torch.ones(3)], [1.0, 1.0], 2.0, 0, 4)
    for values, weights in [([torch.ones(4)], [1.0, 1.0]), ([], [])]:
        with pytest.raises(ValueError, match="give at least one, and a weight for each"):
            compiled.mean_into(mean, values, weights, 2.0, 0, 4)
    with pytest.raises(ValueError, match="no range of elements: 8 to 4"):
        compiled.mean_into(mean, [torch.ones(4)], [1.0], 1.0, 8, 4)
    assert mean.tolist() == [0.0] * 4
    total = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="not all vectors have the 4 elements"):
        compiled.add(total, [torch.ones(3)], [1.0], first=True)
    with pytest.raises(ValueError, match="give at least one, and a weight for each"):
        compiled.add(total, [torch.ones(4)], [1.0, 2.0], first=True)
    assert total.tolist() == [0.0] * 4


@needs_it
@pytest.mark.parametrize(
    ("address", "count"), [(0, 1), (6, 1), (2**64 - 8, 3), (64, -1), (64, 2**62)]
)
def test_places_where_nothing_can_lie_are_refused(address, count):
    from fedproc.client import _sums

    there = torch.zeros(4, dtype=torch.float64).data_ptr()
    with pytest.raises(ValueError, match="cannot lie at"):
        _sums.add(there, (address,), (1.0,), count, False)
    with pytest.raises(ValueError, match=r"cannot lie at|no range of elements"):
        _sums.mean(there, (address,), (1.0,), 1.0, 0, count)
    with pytest.raises(TypeError):
        _sums.mean(there, ("here",), (1.0,), 1.0, 0, 1)


def test_without_the_compiled_sums_everything_works():
    code = """
import sys
sys.modules["fedproc.client._sums"] = None  # what an import finds where it was not built
import torch
from torch import nn
import fedproc as fp
from fedproc.client.compiled import COMPILED
layers = [nn.Linear(2, 1), nn.Linear(2, 1)]
for layer, value in zip(layers, (1.0, 4.0)):
    nn.init.constant_(layer.weight, value)
print(COMPILED, fp.weighted_average(layers, [2, 1]).weight.tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.stderr) == ("False [[2.0, 2.0]]\n", "")
