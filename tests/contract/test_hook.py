"""hook_torch adds tensor.send and module.send, nothing else, and takes them away again."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fedproc as fp


@pytest.fixture(autouse=True)
def unhook():
    yield
    fp.unhook_torch()


def _names():
    places = (torch, torch.Tensor, nn.Module, nn.Parameter, F, torch.optim.Optimizer)
    return [dict(vars(place)) for place in places]


def _changes(before, after):
    return [
        {name for name in {*b, *a} if b.get(name, before) is not a.get(name, before)}
        for b, a in zip(before, after, strict=True)
    ]


def test_hook_adds_send_to_tensors_and_modules_only():
    before = _names()
    fp.hook_torch()
    assert _changes(before, _names()) == [set(), {"send"}, {"send"}, set(), set(), set()]
    fp.unhook_torch()
    assert _changes(before, _names()) == [set()] * 6


def test_without_the_hook_there_is_no_send():
    assert not hasattr(torch.ones(1), "send")
    assert not hasattr(nn.Linear(1, 1), "send")


def test_hooking_twice_is_hooking_once():
    fp.hook_torch()
    fp.hook_torch()
    fp.unhook_torch()
    assert not hasattr(torch.ones(1), "send")
    fp.unhook_torch()


def test_tensors_and_modules_are_sent(bob, x):
    fp.hook_torch()
    p = x.send(bob)
    m = nn.Linear(3, 1).send(bob)
    assert isinstance(p, fp.TensorPointer)
    assert isinstance(m, fp.ModulePointer)
    assert m(p).shape == (1,)
    assert torch.equal(p.get(), x)
