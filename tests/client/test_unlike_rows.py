"""Pairs of rows with unlike targets."""

import math

import pytest
import torch

from fedproc.client import unlike_rows as module
from fedproc.client.unlike_rows import unlike_rows


def pairs_of(*targets):
    """The pairs, by the numbers of their rows; each target tensor is a block."""
    numbers = torch.arange(sum(map(len, targets))).split([len(y) for y in targets])
    found = list(unlike_rows(list(zip(numbers, targets, strict=True))))
    everything = torch.cat(targets)
    for x, y in found:
        assert torch.equal(y.double().nan_to_num(7), everything[x].double().nan_to_num(7))
    return [tuple(x.tolist()) for x, _ in found]


def test_each_value_is_tried_beside_a_row_without_it():
    assert pairs_of(torch.tensor([1, 1, -100, 0, 0])) == [(0, 2), (0, 3), (2, 0)]


def test_rows_of_many_targets_have_fewest_and_most_of_a_value():
    y = torch.tensor([[5, 5, 0], [5, 6, 6], [5, 0, 0], [6, 6, 6]])
    # 0: none in row 1, two in row 2; 5: none in row 3, two in row 0; 6: none in row 0, all of row 3
    assert pairs_of(y) == [(0, 3), (1, 2), (3, 0)]


def test_what_all_rows_have_equally_often_makes_no_pair():
    assert pairs_of(torch.eye(3)) == []
    assert pairs_of(torch.zeros(4, dtype=torch.long)) == []
    assert pairs_of(torch.zeros(0, dtype=torch.long)) == []
    assert pairs_of(torch.ones(2, dtype=torch.complex64)) == []


def test_a_missing_value_is_a_value():
    y = torch.tensor([[1.0, 2.0], [1.0, math.nan], [1.0, 2.0], [math.nan, math.nan]])
    assert pairs_of(y) == [(0, 3), (1, 0), (3, 0)]


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.float64]
)
def test_dtypes(dtype):
    assert pairs_of(torch.tensor([1, 1, 0]).to(dtype)) == [(0, 2), (2, 0)]


def test_rows_of_several_blocks_are_compared():
    one, other = torch.tensor([3, 3]), torch.tensor([3, 8])
    assert pairs_of(one, other) == [(0, 3), (3, 0)]
    assert pairs_of(one, other.short()) == [(2, 3), (3, 2)]  # those are of another kind


def test_of_many_values_the_extreme_and_the_frequent_ones_are_tried():
    y = torch.cat([torch.arange(100), torch.arange(40, 60).repeat_interleave(2)])
    tried = {*y[[most for _, most in pairs_of(y)]].tolist()}
    assert {*range(8), *range(92, 100)} <= tried
    assert len(tried - {*range(8), *range(92, 100)} - {*range(40, 60)}) == 0
    assert len(tried) == 32


def test_of_many_targets_some_rows_and_those_with_extremes_are_looked_at(monkeypatch):
    monkeypatch.setattr(module, "_MOST_TARGETS", 8)
    y = torch.full((40,), 5)
    y[13], y[22], y[31] = -100, 6, 255  # only each fifth row is looked at, and these two
    assert pairs_of(y) == [(0, 13), (0, 31), (13, 0)]
