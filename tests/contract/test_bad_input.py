"""Bad input: the named error, at once, and every other object still there."""

import contextlib
import json
import threading

import pytest
import torch

import fedproc as fp
from tests.contract.things import each, leave


def _gone(p):
    p.copy().get()
    handle = p.copy()
    handle.get()
    return handle


BAD = {
    "unknown worker": (lambda c, p: c["nobody"], fp.WorkerNotFoundError),
    "unpicklable object": (lambda c, p: p.worker.send(threading.Lock()), fp.NotShippableError),
    "use after get": (lambda c, p: _gone(p) + 1, fp.ObjectGoneError),
    "get after get": (lambda c, p: _gone(p).get(), fp.ObjectGoneError),
    "misspelt method": (lambda c, p: p.summ(), AttributeError),
    "misspelt function of a result": (lambda c, p: (p + 1).exxp(), AttributeError),
    "wrong shapes": (lambda c, p: (p @ p[:2]).get(), RuntimeError),
    "wrong index": (lambda c, p: p[99].get(), IndexError),
    "wrong argument": (lambda c, p: p.sum(dim="no").get(), TypeError),
    "json": (lambda c, p: json.dumps(p), TypeError),
    "json of a container": (lambda c, p: json.dumps({"p": [p]}), TypeError),
    "no function": (lambda c, p: p.worker.run(3).get(), TypeError),
    "no arguments": (lambda c, p: p.worker.run(torch.add).get(), TypeError),
    "sys.exit": (lambda c, p: p.worker.run(leave).get(), fp.RemoteError),
    "search of nothing": (lambda c, p: p.worker.search(), ValueError),
    "move to nowhere": (lambda c, p: p.move("nobody"), Exception),
    "send to nowhere": (lambda c, p: p.send(None), Exception),
}


def test_the_named_error_and_nothing_else_lost(cluster, bob, x):
    assert each(BAD, lambda case: _check(cluster, bob, x, *case)) == {}


def _check(cluster, bob, x, bad, error):
    p, other = bob.send(x), bob.send([1])
    with pytest.raises(error) as caught:
        bad(cluster, p)
    assert str(caught.value)
    del caught
    assert torch.equal(p.get(), x)
    assert other.get() == [1]
    assert bob.alive is True
    assert len(bob.objects) == 0


def test_a_pointer_in_an_f_string_is_its_text(bob, x):
    p = bob.send(x)
    assert f"{p}" == str(p) == repr(p)
    assert torch.equal(p.get(), x)


def test_a_pointer_of_a_closed_cluster_in_another(transport, cluster, bob, x):
    with fp.Cluster(["bob"], transport=transport) as other:
        p = other["bob"].send(x)
        p.wait()
    q = bob.send(x)
    with pytest.raises((fp.PlacementError, fp.ClosedError)):
        (q + p).get()
    with pytest.raises((fp.PlacementError, fp.ClosedError)):
        bob.run(torch.sum, p).get()
    assert torch.equal(q.get(), x)


def test_an_exception_in_the_users_block_leaves_the_cluster_whole(bob, x):
    p = bob.send(x)
    with contextlib.suppress(ZeroDivisionError):
        _ = p + 1 / 0
    assert torch.equal(p.get(), x)


def test_sending_the_same_failure_twice_is_two_errors(bob, x):
    p = bob.send(x)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            p.view(7).get()
    assert list(bob.objects) == [p.id]
