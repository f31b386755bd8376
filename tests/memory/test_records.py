"""Records of one tensor and plain values: what goes the short way, and what comes out of it."""

from typing import Any, NamedTuple

import pytest
import torch

import fedproc as fp
from fedproc.memory.records import put_together, taken_apart, travels_as_record
from fedproc.memory.tensors import INLINE_BYTES


class Reading(NamedTuple):
    """A tensor, plain values, and some that need not be plain."""

    values: torch.Tensor
    name: str
    notes: list[Any]


travels_as_record(Reading, lambda reading: not reading.notes)


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), ()])
def test_it_is_put_together_as_it_was(shape):
    reading = Reading(torch.randn(shape), "first", [])
    name, tensor, rest = taken_apart(reading)
    again = put_together(name, tensor, rest)
    assert type(again) is Reading
    assert torch.equal(again.values, reading.values)
    assert again[1:] == ("first", [])


@pytest.mark.parametrize(
    "value",
    [
        Reading(torch.ones(4), "notes may hold tensors", [torch.ones(2)]),
        Reading(torch.ones(4, 4).t()[1:], "not one piece of memory", []),
        Reading(torch.ones(4, requires_grad=True), "a leaf", []),
        (torch.ones(4), "a tuple", []),
        torch.ones(4),
        None,
    ],
    ids=lambda value: getattr(value, "name", type(value).__name__),
)
def test_all_else_goes_the_general_way(value):
    assert taken_apart(value) is None


def test_only_what_was_announced_has_a_name():
    with pytest.raises(KeyError, match=r"os\.system"):
        put_together("os.system", torch.ones(1), ())


def _reading(count: int, dtype: torch.dtype, notes: list[Any]) -> Reading:
    return Reading(torch.arange(count).to(dtype).view(2, -1), f"{count}", notes)


@pytest.mark.parametrize("transport", ["process", "inline"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("count", [0, 8, 2 * INLINE_BYTES])
def test_both_ways_bring_home_the_same(transport, dtype, count):
    with fp.Cluster(1, transport=transport) as cluster:
        (worker,) = cluster
        for notes in ([], [torch.ones(2)]):
            found = worker.run(_reading, count, dtype, notes).get()
            expected = _reading(count, dtype, notes)
            assert type(found) is Reading
            assert found.values.dtype == dtype
            assert torch.equal(found.values, expected.values)
            assert found.name == str(count)
            found.values.fill_(1)  # it is ours
        assert worker.stats().objects == 0
