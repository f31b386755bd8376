"""What cannot be pickled is refused before anything is sent; results that cannot stay there."""

import copy
import pickle
import sys
import threading

import pytest
import torch

import fedproc as fp


def test_an_unpicklable_object_is_refused_at_once(cluster, bob):
    before = cluster.messages
    for thing in (threading.Lock(), [1, threading.Lock()], (n for n in range(3)), sys.stdout):
        with pytest.raises(fp.NotShippableError) as caught:
            bob.send(thing)
        assert isinstance(caught.value, TypeError)
    assert cluster.messages == before
    assert len(bob.objects) == 0


def test_an_unpicklable_argument_is_refused_at_once(cluster, bob):
    lock = threading.Lock()
    before = cluster.messages
    for bad in (
        lambda: bob.run(print, lock),
        lambda: bob.run(dict, key=[lock]),
        lambda: bob.run(lambda: lock),
        lambda: cluster.run(print, lock),
        lambda: cluster.map(print, [lock]),
    ):
        with pytest.raises(fp.NotShippableError):
            bad()
    assert cluster.messages == before
    assert bob.run(abs, -1).get() == 1


def test_the_refusal_names_the_type(bob):
    with pytest.raises(fp.NotShippableError, match="lock"):
        bob.send(threading.Lock())


def test_a_captured_pointer_names_the_argument_form(bob, x):
    p = bob.send(x)
    with pytest.raises(fp.NotShippableError, match="argument"):
        bob.run(lambda: p + 1)
    with pytest.raises(fp.NotShippableError, match="argument"):
        bob.run(lambda n: n + p.sum(), 1)
    assert bob.run(lambda t: t + 1, p).get().tolist() == [2.0, 3.0, 4.0]


def test_a_captured_cluster_or_worker_is_refused(cluster, bob):
    with pytest.raises(fp.NotShippableError):
        bob.run(lambda: cluster.workers)
    with pytest.raises(fp.NotShippableError):
        bob.run(lambda: bob.name)


def test_a_result_that_cannot_be_pickled_stays(bob):
    p = bob.run(threading.Lock)
    for _ in range(2):
        with pytest.raises(fp.NotShippableError, match="lock"):
            p.get()
    with pytest.raises(fp.NotShippableError):
        p.fetch()
    assert len(bob.objects) == 1
    assert bob.run(lambda lock: lock.locked(), p).get() is False
    assert p.acquire().get() is True


def test_an_object_that_fails_while_it_is_pickled(bob):
    class Hostile:
        def __reduce__(self):
            raise ZeroDivisionError("hostile")

    with pytest.raises(fp.NotShippableError):
        bob.send(Hostile())
    assert len(bob.objects) == 0


def test_an_object_that_fails_while_it_is_unpickled(bob):
    def explode():
        raise ZeroDivisionError("hostile")

    class Hostile:
        def __reduce__(self):
            return explode, ()

    other = bob.send(torch.ones(1))
    bad = bob.send(Hostile())
    with pytest.raises(ZeroDivisionError, match="hostile"):
        bad.get()
    assert other.item() == 1.0


def test_a_cluster_stays_where_it_is(cluster, bob):
    for refused in (pickle.dumps, copy.copy, copy.deepcopy, bob.send):
        with pytest.raises(fp.NotShippableError, match="belongs to this process"):
            refused(cluster)
    with pytest.raises(fp.NotShippableError, match="captured by a function"):
        bob.run(lambda: cluster.workers)
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        pickle.dumps(cluster.send(1))
