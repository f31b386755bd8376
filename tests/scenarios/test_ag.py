"""Scenarios AG: autograd."""

import pytest
import torch
from torch import nn


def test_ag1_a_leaf_gets_its_gradient_there(hooked, bob):
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True).send(bob)
    y = (x + x).sum()
    y.backward()
    home = x.get()
    assert home.grad.tolist() == [2.0, 2.0, 2.0]
    assert home.requires_grad is True


def test_ag2_a_gradient_survives_the_round_trip(hooked, bob):
    x = torch.ones(2, requires_grad=True)
    (x * 3).sum().backward()
    assert x.send(bob).get().grad.tolist() == [3.0, 3.0]


# trap: the advice of PySyft's own error text fetched the tensor, not its gradient.
def test_ag3_a_fetched_gradient_is_the_gradient(bob):
    x = bob.send(torch.tensor([5.0, 7.0], requires_grad=True))
    (x * 3).sum().backward()
    assert x.grad.fetch().tolist() == [3.0, 3.0]
    assert x.grad.copy().get().tolist() == [3.0, 3.0]
    assert x.fetch().tolist() == [5.0, 7.0]


def test_ag4_a_gradient_can_be_carried_on_through_the_local_graph(bob):
    x = torch.ones(2, requires_grad=True)
    y = x + x
    with pytest.warns(UserWarning, match="graph|history"):
        remote = bob.send(y)
    remote.requires_grad_()
    z = (remote * 2).sum()
    z.backward()
    y.backward(remote.grad.get())
    assert x.grad.tolist() == [4.0, 4.0]


# trap: PySyft gave neither gradient nor error.
def test_ag5_a_move_that_cuts_the_graph_warns(bob, alice):
    x = bob.send(torch.ones(2, requires_grad=True))
    y = x * 2
    with pytest.warns(UserWarning, match="graph|history"):
        y.move(alice)
    assert y.requires_grad is False or y.is_leaf is True
    assert x.grad is None


def test_ag6_no_grad_of_the_parent_travels(bob):
    model = bob.send(nn.Linear(2, 1))
    data = bob.send(torch.ones(3, 2))
    with torch.no_grad():
        silent = model(data)
    assert silent.requires_grad is False
    assert model(data).requires_grad is True
