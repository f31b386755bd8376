"""Scenarios MP: several workers at once."""

import pytest
import torch

import fedproc as fp
from tests.scenarios.toy import counts


def test_mp1_one_send_to_several_workers(pair, x):
    group = pair.send(x)
    values = group.get()
    assert [value.tolist() for value in values] == [[1.0, 2.0], [1.0, 2.0]]
    assert sum(values).tolist() == [2.0, 4.0]
    assert counts(*pair) == (0, 0)


def test_mp2_combined_handles_work_worker_by_worker(bob, alice):
    a = fp.group(bob.send(torch.tensor([1.0, 2.0])), alice.send(torch.tensor([10.0, 20.0])))
    assert [value.tolist() for value in (a + a).get()] == [[2.0, 4.0], [20.0, 40.0]]
    assert counts(bob, alice) == (1, 1)


# trap: PySyft asserted, freed an entry silently, or raised a raw BaseException.
def test_mp3_bad_combinations_are_clear_errors(bob, alice, x):
    p, again, q = bob.send(x), bob.send(x), alice.send(torch.ones(3))
    with pytest.raises(ValueError, match="bob"):
        fp.group(p, again)
    shapes = fp.group(p, q)
    assert [value.tolist() for value in (shapes * 2).get()] == [[2.0, 4.0], [2.0, 2.0, 2.0]]
    with pytest.raises(fp.PlacementError):
        shapes + again
    assert torch.equal(p.get(), x)
    assert torch.equal(again.get(), x)
    assert counts(bob, alice) == (0, 1)
