"""The secret stream. Its key is given here, so that a test that passes once passes always."""

import math

import numpy as np
import pytest
import torch

from fedproc.federated.noise import SecretStream

COUNT = 200_000
KEY = bytes(range(32))


def test_normal_numbers_have_the_moments_of_the_normal_distribution():
    values = SecretStream(KEY).normal(COUNT)
    assert values.dtype == torch.float64
    # five standard errors each: sqrt(1/n), sqrt(2/n), sqrt(15/n), sqrt(96/n)
    errors = 5 / math.sqrt(COUNT)
    for power, expected, spread in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        moment = (values**power).mean().item()
        assert moment == pytest.approx(expected, abs=errors * math.sqrt(spread))


def test_normal_numbers_have_its_distribution_function():
    values = np.sort(SecretStream(KEY).normal(COUNT).numpy())
    expected = 0.5 * (1 + torch.erf(torch.from_numpy(values) / math.sqrt(2))).numpy()
    distance = np.abs(expected - (np.arange(COUNT) + 0.5) / COUNT).max()
    assert distance < 2.2 / math.sqrt(COUNT)  # Kolmogorov: more in 1 of 8,000 keys


def test_numbers_beside_each_other_and_of_two_calls_are_unrelated():
    stream = SecretStream(KEY)
    first, second = stream.normal(COUNT), stream.normal(COUNT)
    half = COUNT // 2
    bound = 5 / math.sqrt(half)
    for a, b in [(first[:-1], first[1:]), (first, second), (first[:half], first[half:])]:
        assert abs((a * b).mean().item()) < bound


def test_uniform_numbers_lie_strictly_between_0_and_1():
    values = SecretStream(KEY).uniform(COUNT)
    assert 0 < values.min() < 1e-4
    assert 1 - 1e-4 < values.max() < 1
    assert values.mean().item() == pytest.approx(0.5, abs=5 / math.sqrt(12 * COUNT))


@pytest.mark.parametrize("count", [0, 1, 2, 3, (1 << 16) - 1, (1 << 16) + 1])
def test_any_number_of_them(count):
    values = SecretStream(KEY).normal(count)
    assert values.shape == (count,)
    assert torch.isfinite(values).all()
    assert len(values.unique()) == count


def test_bits_do_not_repeat():
    assert not torch.equal(SecretStream().normal(8), SecretStream().normal(8))
    stream = SecretStream()
    assert not torch.equal(stream.normal(8), stream.normal(8))


def test_the_seed_of_torch_and_numpy_has_no_part_in_it():
    found = []
    for _ in range(2):
        torch.manual_seed(0), np.random.seed(0)  # noqa: NPY002 - the global stream is the subject
        found.append(SecretStream().uniform(4))
    assert not torch.equal(*found)
