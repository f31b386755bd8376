"""Weighted sums: whatever way is taken, the bits are those of a product and then a sum."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedproc.client.weighing import add_weighted, exact_product

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
weights = st.one_of(
    st.integers(1, 2**31).map(float), st.floats(0, 2**40), st.floats(0, allow_infinity=False)
)


@given(weights, st.sampled_from(DTYPES), st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_the_bits_are_those_of_a_product_and_then_a_sum(weight, dtype, seed, count):
    generator = torch.Generator().manual_seed(seed)
    # any bits, so subnormal and infinite values and NaN among them
    words = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
    values = words.view(dtype)[:count]
    total = torch.randn(count, generator=generator, dtype=torch.float64) * weight
    expected = total + values.double() * weight
    exact = exact_product(weight, dtype)
    add_weighted(total, values, weight, torch.empty_like(total), exact=exact)
    assert torch.equal(total.isnan(), expected.isnan())
    assert torch.equal(total.nan_to_num(1.0), expected.nan_to_num(1.0))


@pytest.mark.parametrize(
    ("weight", "dtype", "exact"),
    [
        (3.0, torch.float32, True),
        (2.0**29 - 1, torch.bfloat16, True),
        (2.0**29 + 1, torch.float32, False),
        (2.0**40, torch.float16, True),
        (0.1, torch.float32, False),
        (3.0, torch.float64, False),
        (math.ldexp(1.0, -1000), torch.float32, False),  # the product may leave float64's range
        (0.0, torch.float32, True),
    ],
)
def test_what_needs_no_rounding(weight, dtype, exact):
    assert exact_product(weight, dtype) is exact
