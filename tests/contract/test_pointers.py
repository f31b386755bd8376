"""Handles: identity, text, done and wait, get, fetch, copy, and dropping."""

import copy
import io
import json
import pickle

import pytest
import torch

import fedproc as fp
from tests.contract.things import Counter, outcome


def test_id_names_the_object_in_the_worker(bob, x):
    p = bob.send(x)
    assert p.id in bob.objects
    assert (p + 1).id != p.id


def test_text_shows_kind_place_id_shape_and_dtype_but_no_values(bob):
    p = bob.send(torch.tensor([[7.25, 7.5]], dtype=torch.float64))
    for text in (repr(p), str(p), f"{p}"):
        assert "TensorPointer" in text
        assert "bob" in text
        assert str(p.id) in text
        assert "1, 2" in text
        assert "float64" in text
        assert "7.25" not in text


def test_text_of_other_kinds_shows_no_values(bob):
    for thing, kind in (
        (Counter(777123), "ObjectPointer"),
        (torch.nn.Linear(1, 1), "ModulePointer"),
    ):
        p = bob.send(thing)
        assert kind in repr(p)
        assert "bob" in repr(p)
        assert "777123" not in repr(p)


def test_text_does_not_wait(bob, gate):
    r = bob.run(gate.hold, 1)
    assert "bob" in repr(r)
    assert not r.done()
    gate.open()
    r.wait()


def test_done_turns_true(bob, gate):
    r = bob.run(gate.hold, 1)
    assert r.done() is False
    gate.open()
    r.wait()
    assert r.done() is True


def test_wait_keeps_the_object(bob, x):
    p = bob.send(x)
    p.wait()
    assert len(bob.objects) == 1
    assert torch.equal(p.get(), x)


def test_get_brings_home_and_removes(bob, x):
    p = bob.send(x)
    assert len(bob.objects) == 1
    assert torch.equal(p.get(), x)
    assert len(bob.objects) == 0


USES = {
    "get": lambda p: p.get(),
    "fetch": lambda p: p.fetch(),
    "copy": lambda p: p.copy().get(),
    "operator": lambda p: (p + 1).get(),
    "right operator": lambda p: (1 + p).get(),
    "method": lambda p: p.sum().get(),
    "in-place method": lambda p: p.add_(1).get(),
    "function": lambda p: torch.add(p, 1).get(),
    "list": lambda p: torch.stack([p]).get(),
    "index": lambda p: p[0].get(),
    "item": lambda p: p.sum().item(),
    "tolist": lambda p: p.tolist(),
    "run": lambda p: p.worker.run(torch.sum, p).get(),
    "send": lambda p: p.send(p.worker),
    "borrow": lambda p: p.borrow().__enter__(),
}


def test_any_use_after_get_is_an_error(bob, x):
    other, wrong = bob.send(x), []
    for name, use in USES.items():
        p = bob.send(x)
        p.get()
        result = outcome(lambda use=use, p=p: use(p))
        if not isinstance(result, fp.ObjectGoneError):
            wrong.append((name, repr(result)))
    assert wrong == []
    assert torch.equal(other.get(), x)


def test_using_a_got_handle_is_an_error_at_once(bob, x):
    p, q = bob.send(x), bob.send(x)
    p.get()
    with pytest.raises(fp.ObjectGoneError):
        p + q
    with pytest.raises(fp.ObjectGoneError):
        torch.add(q, p)


def test_an_alias_is_gone_too(bob, x):
    p = bob.send(x, tags="a")
    alias = bob.run(lambda t: t, p)
    (found,) = bob.search("a")
    alias.wait()
    p.get()
    for handle in (alias, found):
        with pytest.raises(fp.ObjectGoneError):
            (handle + handle).get()


def test_fetch_is_a_private_copy(bob, x):
    p = bob.send(x)
    first = p.fetch()
    first.add_(100)
    assert torch.equal(p.fetch(), x)
    assert len(bob.objects) == 1


def test_fetch_does_not_follow_later_changes(bob, x):
    p = bob.send(x)
    before = p.fetch()
    p.add_(1)
    p.wait()
    assert torch.equal(before, x)
    assert p.get().tolist() == [2.0, 3.0, 4.0]


def test_got_value_survives_reuse_of_memory(bob):
    value = bob.send(torch.full((1000,), 3.0)).get()
    for n in range(20):
        bob.send(torch.full((1000,), float(n))).get()
    assert value.unique().tolist() == [3.0]


def test_copy_keeps_the_dtype(bob):
    for dtype in (torch.bool, torch.int64, torch.float64, torch.uint8):
        p = bob.send(torch.tensor([1, 0, 1]).to(dtype))
        q = p.copy()
        assert q.id != p.id
        assert len(bob.objects) == 2
        p.zero_()
        back = q.get()
        assert back.dtype is dtype
        assert back.tolist() == torch.tensor([1, 0, 1]).to(dtype).tolist()


def test_copy_keeps_requires_grad(bob):
    p = bob.send(torch.ones(2, requires_grad=True))
    assert p.copy().requires_grad is True
    assert bob.send(torch.ones(2)).copy().requires_grad is False


def test_copy_of_an_object_is_independent(bob):
    p = bob.send([1, 2])
    q = p.copy()
    q.append(3).wait()
    assert p.get() == [1, 2]
    assert q.get() == [1, 2, 3]


def test_dropping_the_last_handle_frees(bob, x):
    p = bob.send(x)
    second = p
    del p
    assert len(bob.objects) == 1
    del second
    assert len(bob.objects) == 0


def test_another_handle_keeps_the_object(bob, x):
    p = bob.send(x)
    same = bob.run(lambda t: t, p)
    assert len(bob.objects) == 1
    del p
    assert len(bob.objects) == 1
    assert torch.equal(same.get(), x)
    assert len(bob.objects) == 0


def test_dropping_an_operand_early_is_fine(bob, gate):
    held = bob.run(gate.hold)
    y = bob.send(torch.ones(2)) + bob.send(torch.ones(2))
    gate.open()
    assert y.get().tolist() == [2.0, 2.0]
    del held


SAVES = {
    "pickle": pickle.dumps,
    "deepcopy": copy.deepcopy,
    "torch.save": lambda p: torch.save(p, io.BytesIO()),
    "nested": lambda p: pickle.dumps({"deep": [p]}),
    "json": json.dumps,
}


def test_a_pointer_cannot_be_saved(bob):
    held = [bob.send(thing) for thing in (torch.ones(2), torch.nn.Linear(1, 1), {})]
    results = {
        name: [type(outcome(lambda p=p, save=save: save(p))) for p in held]
        for name, save in SAVES.items()
    }
    assert all(issubclass(kind, TypeError) for kinds in results.values() for kind in kinds), results
    assert len(bob.objects) == 3


def test_saving_a_pointer_says_what_to_do(bob, x):
    with pytest.raises(TypeError, match=r"get|fetch"):
        pickle.dumps(bob.send(x))


def test_after_get_an_alias_is_gone_for_wait_and_done_too(bob, x):
    p = bob.send(x)
    alias = bob.run(_same, p)
    assert torch.equal(p.get(), x)
    for use in (alias.wait, alias.done, alias.get, p.wait, p.done):
        with pytest.raises(fp.ObjectGoneError, match=r"get\(\)"):
            use()


def _same(value):
    return value
