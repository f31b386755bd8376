"""Scenarios GC: garbage collection."""

import torch

import fedproc as fp
from tests.scenarios.toy import counts


def test_gc1_a_dropped_or_rebound_handle_frees(hooked, bob, x):
    p = x.send(bob)
    assert counts(bob) == (1,)
    del p
    assert counts(bob) == (0,)
    p = x.send(bob)
    p = "something else"
    assert counts(bob) == (0,)
    del p


def test_gc2_a_thousand_rebinds_leave_one(hooked, bob):
    tensor = torch.ones(1000)
    p = tensor.send(bob)
    p.wait()
    bob.stats()
    for _ in range(100):
        p = tensor.send(bob)
    before = bob.stats().arena_bytes
    for _ in range(900):
        p = tensor.send(bob)
    assert counts(bob) == (1,)
    assert bob.stats().arena_bytes <= before + (1 << 20)
    assert torch.equal(p.get(), tensor)


def test_gc3_dropping_a_chain_frees_both_ends(hooked, bob, alice, x):
    pp = x.send(bob).send(alice)
    assert counts(bob, alice) == (1, 1)
    del pp
    assert counts(bob, alice) == (0, 0)


def test_gc4_batched_frees_are_bounded_by_the_next_look(bob, x):
    p, q = bob.send(x), bob.send(x)
    del p
    assert counts(bob) == (1,)
    del q
    assert counts(bob) == (0,)


def test_gc5_a_found_handle_does_not_own(bob, x):
    p = bob.send(x, tags="kept")
    (found,) = bob.search("kept")
    del found
    assert counts(bob) == (1,)
    (found,) = bob.search("kept")
    assert torch.equal(found.fetch(), x)
    assert found.id == p.id


# trap: PySyft leaked, because the inner pointer had given up its ownership.
def test_gc6_a_pointer_got_back_from_a_chain_owns(hooked, bob, alice, x):
    pp = x.send(bob).send(alice)
    h = pp.get()
    del pp
    assert counts(bob, alice) == (1, 0)
    del h
    assert counts(bob, alice) == (0, 0)


def test_gc7_late_drops_are_silent(x, capfd):
    # At interpreter exit: tests/contract/test_launch.py, whose scripts end with handles alive.
    cluster = fp.Cluster(["bob"])
    p, q = cluster["bob"].send(x), cluster["bob"].send(x)
    p.get()
    del p
    cluster.close()
    del q
    assert capfd.readouterr() == ("", "")


def test_gc2_temporaries_leave_no_residue(bob, x):
    p = bob.send(x)
    for _ in range(1000):
        p + 1
    assert counts(bob) == (1,)
