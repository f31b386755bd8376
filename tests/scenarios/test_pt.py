"""Scenarios PT: sending, getting, metadata."""

import pytest
import torch

import fedproc as fp
from tests.scenarios.toy import counts


def test_pt1_send_and_get(hooked, bob, x):
    p = x.send(bob)
    assert counts(bob) == (1,)
    assert torch.equal(p.get(), x)
    assert counts(bob) == (0,)


def test_pt2_a_pointer_knows_place_and_id_and_is_no_alias(hooked, bob):
    x = torch.tensor([1.0, 2.0])
    p = x.send(bob)
    assert p.worker is bob
    assert list(bob.objects) == [p.id]
    assert x.send(bob).id != p.id
    x.add_(5)
    assert p.get().tolist() == [1.0, 2.0]
    assert x.tolist() == [6.0, 7.0]


def test_pt3_the_name_may_be_rebound(hooked, bob):
    x = torch.tensor([1, 2])
    x = x.send(bob)
    x = x.get()
    assert x.tolist() == [1, 2]
    assert counts(bob) == (0,)


def test_pt4_values_and_dtype_survive_and_handles_stay_themselves(bob, alice):
    p = bob.send(torch.tensor([1, 2]))
    identity = id(p)
    assert id(p.add_(1)) == id(p.move(alice)) == identity
    home = p.get()
    assert home.dtype is torch.int64
    assert home.tolist() == [2, 3]


# trap: PySyft stored both sends in one slot, and the first handle showed the second value.
def test_pt5_two_sends_are_two_objects(hooked, bob):
    x = torch.tensor([1.0, 2.0])
    first = x.send(bob)
    x.add_(10)
    second = x.send(bob)
    assert counts(bob) == (2,)
    assert first.get().tolist() == [1.0, 2.0]
    assert second.get().tolist() == [11.0, 12.0]
    p = x.send(bob)
    p = x.send(bob)
    assert p.get().tolist() == [11.0, 12.0]
    assert counts(bob) == (0,)


def test_pt6_a_send_nobody_keeps_is_freed_at_once(hooked, bob, x):
    x.send(bob)
    assert counts(bob) == (0,)


# trap: PySyft computed on an empty tensor.
def test_pt7_every_use_after_get_is_a_named_error(bob, x):
    p, q = bob.send(x), bob.send(x)
    alias = p
    p.get()
    for use in (p.get, lambda: alias + alias, lambda: q + alias, lambda: torch.add(q, alias)):
        with pytest.raises(fp.ObjectGoneError):
            use()


def test_pt8_a_cleared_object_is_gone_by_name(bob, alice, x):
    p, other = bob.send(x), alice.send(x)
    bob.clear()
    with pytest.raises(fp.ObjectGoneError) as caught:
        (p + p).get()
    assert "bob" in str(caught.value)
    assert str(p.id) in str(caught.value)
    assert torch.equal(other.get(), x)


# trap: PySyft's copy of a bool tensor was int64.
def test_pt9_a_copy_comes_home_and_the_object_stays(bob):
    x = torch.tensor([True, False])
    p = bob.send(x)
    fetched = p.fetch()
    assert counts(bob) == (1,)
    copied = p.copy()
    home = p.get()
    del copied
    assert counts(bob) == (0,)
    assert fetched.tolist() == home.tolist() == [True, False]
    assert fetched.dtype is home.dtype is torch.bool
    assert bob.send(x).copy().get().dtype is torch.bool


def test_pt10_shapes_of_sent_and_computed(cluster, bob):
    p = bob.send(torch.ones(5))
    y = p + p
    before = cluster.messages
    assert p.shape == torch.Size([5])
    assert cluster.messages == before
    assert y.shape == torch.Size([5])
    assert cluster.messages <= before + 1


# trap: PySyft answered [0], float32, 2, 6, False.
def test_pt11_metadata_is_true(bob):
    p = bob.send(torch.arange(6).reshape(2, 3))
    assert p.size() == torch.Size([2, 3])
    assert p.dtype is torch.int64
    assert len(p) == 2
    assert p.numel() == 6
    assert p.requires_grad is False


def test_pt12_one_rule_for_all_ways_to_read_one_number(bob):
    p = bob.send(torch.tensor(2.5))
    assert p.item() == 2.5
    assert float(p) == 2.5
    assert ("yes" if p > 0 else "no") == "yes"
    assert counts(bob) == (1,)
    private = bob.send(torch.tensor(2.5), private=True)
    for read in (private.item, lambda: float(private), lambda: bool(private > 0)):
        with pytest.raises(fp.NotPermittedError):
            read()


def test_pt13_rows_columns_and_elements(bob):
    p = bob.send(torch.tensor([[1, 2], [3, 4], [5, 6]]))
    seen = []
    for row in p:
        seen.append((row.tolist(), len(bob.objects)))
        del row
    assert seen == [([1, 2], 2), ([3, 4], 2), ([5, 6], 2)]
    assert counts(bob) == (1,)
    assert p[1].tolist() == [3, 4]
    assert p[:, 0].tolist() == [1, 3, 5]
    p[2, 1] = 60
    assert p.get().tolist() == [[1, 2], [3, 4], [5, 60]]
