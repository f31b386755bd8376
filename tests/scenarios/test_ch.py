"""Scenarios CH: pointers to pointers, remote_get, move."""

import pytest
import torch

import fedproc as fp
from tests.scenarios.toy import counts


def test_ch1_get_twice_comes_home(hooked, bob, alice, x):
    pp = x.send(bob).send(alice)
    assert counts(bob, alice) == (1, 1)
    p = pp.get()
    assert p.worker is bob
    assert counts(bob, alice) == (1, 0)
    assert torch.equal(p.get(), x)
    assert counts(bob, alice) == (0, 0)


def test_ch2_adding_a_chain_to_itself_runs_at_the_data(hooked, bob, alice, x):
    pp = x.send(bob).send(alice)
    y = pp + pp
    # fedproc: the result is a plain pointer on the data's worker, so one get is enough.
    assert y.worker is bob
    assert counts(bob, alice) == (2, 1)
    assert y.get().tolist() == [2.0, 4.0]


def test_ch3_operations_on_a_chain_equal_local_ones(hooked, bob, alice):
    x = torch.tensor([-1.0, 2.0])
    pp = x.send(bob).send(alice)
    assert torch.equal(pp.abs().get(), x.abs())
    assert torch.equal(pp.add(pp).get(), x.add(x))
    assert torch.equal(pp.mul(pp).get(), x.mul(x))
    assert torch.equal(pp.get().get(), x)


def test_ch4_remote_get_pulls_the_data_to_the_holder(hooked, bob, alice, x):
    pp = x.send(bob).send(alice)
    slot = pp.id
    pp.remote_get()
    assert counts(bob, alice) == (0, 1)
    assert list(alice.objects) == [slot]
    assert torch.equal(pp.get(), x)


def test_ch5_remote_get_needs_a_chain(hooked, bob, x):
    p = x.send(bob)
    with pytest.raises(fp.PlacementError, match="chain"):
        p.remote_get()
    assert not hasattr(x, "remote_get")
    assert torch.equal(p.get(), x)


def test_ch6_move_leaves_one_copy_and_no_leak(bob, alice, x):
    p = bob.send(x)
    moved = p.move(alice)
    assert counts(bob, alice) == (0, 1)
    assert torch.equal(moved.fetch(), x)
    assert torch.equal(p.fetch(), x)
    del p, moved
    assert counts(bob, alice) == (0, 0)


def test_ch7_results_of_operations_move(bob, alice, x):
    p = bob.send(x)
    y = (p + p).move(alice)
    assert y.worker is alice
    assert counts(bob, alice) == (1, 1)
    assert y.get().tolist() == [2.0, 4.0]


def test_ch8_moving_nowhere_and_home(bob, x):
    p = bob.send(x)
    p.move(bob)
    assert counts(bob) == (1,)
    assert torch.equal(p.get(), x)
    assert counts(bob) == (0,)


def test_ch9_remote_get_then_move_leaves_one_copy(hooked, bob, alice, x):
    pp = x.send(bob).send(alice)
    pp.remote_get()
    pp.move(bob)
    assert counts(bob, alice) == (1, 0)
    assert pp.worker is bob
    assert torch.equal(pp.get(), x)


def test_ch10_move_of_a_chain_moves_the_data(hooked, bob, alice, carol, x):
    pp = x.send(bob).send(alice)
    pp.move(carol)
    assert counts(bob, alice, carol) == (0, 0, 1)
    assert torch.equal(pp.get(), x)
