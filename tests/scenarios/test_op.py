"""Scenarios OP: operations and their errors."""

import pytest
import torch
import torch.nn.functional as F

import fedproc as fp
from tests.scenarios.toy import counts


def test_op1_operators_and_functions(hooked, bob):
    x, y = torch.tensor([1.0, 2.0]).send(bob), torch.tensor([10.0, 20.0]).send(bob)
    results = [x + y, torch.add(x, y), x + 1, 1 + x]
    assert counts(bob) == (6,)
    assert [r.get().tolist() for r in results] == [
        [11.0, 22.0],
        [11.0, 22.0],
        [2.0, 3.0],
        [2.0, 3.0],
    ]
    assert counts(bob) == (2,)


def test_op2_in_place_changes_the_value_and_makes_no_object(alice):
    a, b = alice.send(torch.tensor([1.0, 2.0])), alice.send(torch.tensor([10.0, 20.0]))
    same = b
    b += a
    assert b is same
    assert a.add_(a) is a
    assert counts(alice) == (2,)
    assert (a.get().tolist(), b.get().tolist()) == ([2.0, 4.0], [11.0, 22.0])


def test_op3_tuples_of_handles(bob):
    p = bob.send(torch.tensor([1, 5, 3]))
    value, index = p.max(dim=0)
    assert (value.item(), index.item()) == (5, 1)
    first, second = p.split(2)
    assert (first.tolist(), second.tolist()) == ([1, 5], [3])
    ordered, order = p.sort()
    assert (ordered.tolist(), order.tolist()) == ([1, 3, 5], [0, 2, 1])


def test_op4_functional_and_integer_results_equal_local_ones(bob):
    x = torch.tensor([-1.5, 0.0, 2.0])
    p = bob.send(x)
    for function in (F.relu, F.celu, F.elu):
        assert torch.equal(function(p).get(), function(x))
    doubled = (bob.send(torch.LongTensor([1, 2])) * 2).get()
    assert doubled.dtype is torch.int64
    assert doubled.tolist() == [2, 4]


def test_op5_a_local_tensor_is_not_collocated_in_either_order(bob, x):
    p = bob.send(x)
    for mix in (lambda: p + x, lambda: x + p):
        with pytest.raises(fp.PlacementError) as caught:
            mix()
        assert "bob" in str(caught.value)
        assert "send(" in str(caught.value)
    assert counts(bob) == (1,)


def test_op6_one_error_class_for_every_position(bob, alice, x):
    p, q = bob.send(x), alice.send(x)
    for mix in (
        lambda: p.add(q),
        lambda: torch.add(p, q),
        lambda: torch.cat([p, q]),
        lambda: torch.stack([p, q]),
        lambda: torch.addcmul(p, p, q),
        lambda: torch.add(p, other=q),
    ):
        with pytest.raises(fp.PlacementError) as caught:
            mix()
        assert "bob" in str(caught.value)
        assert "alice" in str(caught.value)
    assert counts(bob, alice) == (1, 1)


def test_op7_an_unknown_function_is_an_attribute_error(bob, x):
    p = bob.send(x)
    with pytest.raises(AttributeError, match="frobnicate"):
        p.frobnicate()
    with pytest.raises(AttributeError):
        bob.run(getattr, torch, "frobnicate").get()
    assert bob.alive is True
    assert torch.equal(p.get(), x)


def test_op8_tensors_that_never_existed_here(bob):
    made = [
        bob.run(torch.tensor, [1.0, 2.0]),
        bob.run(torch.zeros, 2),
        bob.run(torch.rand, 2),
        bob.run(torch.randn, 2),
    ]
    assert all(isinstance(p, fp.TensorPointer) for p in made)
    assert [tuple(p.shape) for p in made] == [(2,)] * 4
    assert counts(bob) == (4,)
    assert made[0].tolist() == [1.0, 2.0]
    assert made[1].tolist() == [0.0, 0.0]
