"""Values and exceptions that are hard to carry; each was lost or wrong once."""

import contextlib
import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import fedproc as fp


class HostileText(Exception):
    def __str__(self):
        raise KeyboardInterrupt


class HostileDict(Exception):
    @property
    def __dict__(self):
        raise RuntimeError


class NeedsArguments(ValueError):
    def __init__(self, one, *, two):
        super().__init__(f"{one} {two}")
        self.message = one
        self.original = two


class NoSubclass(Exception):
    def __init_subclass__(cls):
        raise ValueError("never")


def _raise(kind, *args, **kwargs):
    raise kind(*args, **kwargs)


@pytest.mark.parametrize("kind", [HostileText, HostileDict, NoSubclass])
def test_a_hostile_exception_is_reported_and_the_worker_lives(cluster, bob, kind):
    with pytest.raises(fp.RemoteError):
        bob.run(_raise, kind).get()
    assert bob.run(abs, -1).get() == 1


def test_attributes_of_an_exception_come_along(cluster, bob):
    with pytest.raises(NeedsArguments, match="1 2") as caught:
        bob.run(_raise, NeedsArguments, 1, two=2).get()
    assert (caught.value.message, caught.value.original) == (1, 2)
    with pytest.raises(FileNotFoundError) as missing:
        bob.run(open, "/no/such/file").get()
    assert (missing.value.errno, missing.value.filename) == (2, "/no/such/file")


def _attribute_of_a_tensor():
    return torch.ones(1 << 20).no_such_name


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        (lambda: __import__("no_such_module"), {"name": "no_such_module", "path": None}),
        (lambda: compile("1 +", "some.py", "exec"), {"lineno": 1, "filename": "some.py"}),
        (lambda: b"a\xff".decode(), {"start": 1, "end": 2, "object": b"a\xff"}),
        (lambda: no_such_name, {"name": "no_such_name"}),  # noqa: F821
        # what lacks the attribute may be anything: it stays there
        (_attribute_of_a_tensor, {"name": "no_such_name", "obj": None}),
    ],
    ids=["ImportError", "SyntaxError", "UnicodeDecodeError", "NameError", "AttributeError"],
)
def test_so_does_what_built_in_classes_keep(cluster, bob, fails, expected):
    with pytest.raises(fp.RemoteError) as caught:
        bob.run(fails).get()
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert {name: getattr(error, name) for name in expected} == expected
        assert "worker 'bob'" in str(error)


def test_a_sparse_gradient_travels(cluster, bob):
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 2, 1])).sum().backward()
    home = bob.send(embedding).get().weight.grad
    assert home.layout is torch.sparse_coo
    assert torch.equal(home.to_dense(), embedding.weight.grad.to_dense())


def test_views_share_memory_also_beside_an_empty_one(cluster, bob):
    x = torch.arange(4.0)
    p = bob.send([x, x[0:0], x[1:]])
    bob.run(lambda things: things[0].fill_(9), p)
    whole, empty, tail = p.get()
    assert whole.tolist() == [9.0] * 4
    assert empty.tolist() == []
    assert tail.tolist() == [9.0] * 3


def test_tensors_over_an_array_stay_so_when_borrowed(cluster, bob):
    def make():
        array = np.zeros(5000, dtype=np.float32)
        return [array, torch.from_numpy(array)]

    both = bob.run(make)
    tensor = bob.run(lambda things: things[1], both)
    with tensor.borrow() as borrowed:
        assert borrowed.sum().item() == 0.0
    bob.run(lambda things: things[0].fill(7), both)
    assert tensor.fetch()[0].item() == 7.0


def test_a_gradient_that_aliases_its_tensor_does_so_at_home(cluster, bob):
    w = torch.ones(3, requires_grad=True)
    w.grad = w.detach()
    home = bob.send(w).get()
    home.grad.fill_(3.0)
    assert home.tolist() == [3.0] * 3


def test_modes_set_in_a_worker_do_not_last(cluster, bob):
    x = bob.send(torch.ones(2, requires_grad=True))
    bob.run(torch.set_grad_enabled, False)
    bob.run(lambda: torch.set_default_dtype(torch.float64))
    bob.run(lambda: torch.autocast("cpu", dtype=torch.bfloat16).__enter__())
    assert (x * 2).requires_grad is True
    assert (x @ x).dtype is torch.float32
    assert bob.run(torch.ones, 2).dtype is torch.float32


def _enter_autocast(*, enabled=True, raises=False):
    torch.autocast("cpu", dtype=torch.float16, enabled=enabled).__enter__()
    if raises:
        raise ValueError("between enter and exit")


def _autocast():
    torch.autocast_increment_nesting()
    depth = torch.autocast_decrement_nesting()
    return torch.is_autocast_enabled("cpu"), str(torch.get_autocast_dtype("cpu")), depth


@pytest.mark.parametrize("within", [contextlib.nullcontext, torch.no_grad])
@pytest.mark.parametrize("options", [{}, {"enabled": False}, {"raises": True}])
def test_autocast_that_a_command_leaves_on_ends_with_it(cluster, bob, within, options):
    with within():
        left = bob.run(_enter_autocast, **options)
    if options.get("raises"):
        with pytest.raises(ValueError, match="between enter and exit"):
            left.get()
    else:
        assert left.get() is None
    assert bob.run(_autocast).get() == (False, "torch.bfloat16", 0)
    with torch.autocast("cpu", dtype=torch.float16):
        assert bob.run(_autocast).get() == (True, "torch.float16", 1)


def test_modes_set_by_who_is_given_private_objects_do_not_last(cluster, bob):
    secret = bob.send(torch.ones(2), private=True)
    bob.run(lambda _: _enter_autocast(), secret)
    bob.run(lambda _: torch.set_grad_enabled(False) and None, secret)
    assert bob.run(_autocast).get() == (False, "torch.bfloat16", 0)
    assert (bob.send(torch.ones(2, requires_grad=True)) * 2).requires_grad is True


def test_what_is_known_is_asked_again_after_a_cut(cluster, alice, bob):
    y = bob.send(torch.ones(3, requires_grad=True)) * 2
    assert (y.requires_grad, y.is_leaf) == (True, False)
    with pytest.warns(UserWarning, match="graph"):
        y.move(alice)
    assert (y.requires_grad, y.is_leaf) == (False, True)


def test_an_alias_of_what_was_fetched_is_gone(cluster, bob):
    x = bob.send(torch.ones(3))
    alias = bob.run(lambda t: t, x)
    assert alias.shape == (3,)
    x.get()
    with pytest.raises(fp.ObjectGoneError):
        _ = alias.shape


def test_in_place_functions_give_the_same_pointer(cluster, bob):
    p = bob.send(torch.full((3,), -1.0))
    assert torch.relu_(input=p) is p
    assert nn.init.constant_(p, 2.0) is p
    assert p.tolist() == [2.0] * 3
