"""Timeouts change nothing: the command goes on and the call can be repeated."""

import time

import numpy as np
import pytest
import torch

import fedproc as fp
from tests.contract.things import forever


def test_a_timeout_leaves_handle_and_object_unchanged(bob, gate):
    r = bob.run(gate.hold, 7)
    for look in (r.get, r.fetch, r.wait):
        with pytest.raises(fp.CommandTimeoutError) as caught:
            look(timeout=0.02)
        assert isinstance(caught.value, TimeoutError)
    assert not r.done()
    gate.open()
    r.wait(timeout=10)
    assert r.fetch(timeout=10) == 7
    assert r.get(timeout=10) == 7
    assert len(bob.objects) == 0


def test_a_timeout_of_zero_asks_once(bob, gate):
    r = bob.run(gate.hold, 7)
    with pytest.raises(fp.CommandTimeoutError):
        r.get(timeout=0)
    gate.open()
    r.wait()
    assert r.get(timeout=5) == 7


def test_a_timeout_names_the_worker(bob, gate):
    r = bob.run(gate.hold)
    with pytest.raises(fp.CommandTimeoutError, match="bob"):
        r.get(timeout=0.01)
    gate.open()
    r.wait()


def test_a_timeout_is_not_an_unseen_error(cluster, bob, gate):
    r = bob.run(gate.hold, 1)
    with pytest.raises(fp.CommandTimeoutError):
        r.get(timeout=0.01)
    gate.open()
    cluster.wait()
    assert r.get() == 1


def test_a_timed_out_get_does_not_disturb_others(transport, gate):
    with fp.Cluster(["alice", "bob"], transport=transport) as cluster:
        slow = cluster["bob"].run(gate.hold, 1)
        p = cluster["alice"].run(torch.ones, 2)
        with pytest.raises(fp.CommandTimeoutError):
            slow.get(timeout=0.01)
        assert (p + 1).get().tolist() == [2.0, 2.0]
        gate.open()
        assert slow.get() == 1


def test_the_cluster_closes_over_a_function_that_never_returns():
    cluster = fp.Cluster(["alice", "bob"])
    stuck = cluster["bob"].run(forever)
    with pytest.raises(fp.CommandTimeoutError):
        stuck.get(timeout=0.05)
    assert cluster["alice"].run(abs, -1).get() == 1
    start = time.monotonic()
    cluster.close()
    assert time.monotonic() - start < 10
    assert cluster["bob"].alive is False


@pytest.mark.parametrize("timeout", ["1", float("nan"), [1], True])
def test_what_is_no_time_is_refused_and_the_object_stays(bob, x, timeout):
    p = bob.send(x)
    for wait in (p.get, p.fetch, p.wait):
        with pytest.raises(ValueError, match="timeout must be a number of seconds, or None"):
            wait(timeout=timeout)
    for wait in (
        lambda: fp.gather([p], timeout),
        lambda: fp.as_completed([p], timeout),
        lambda: fp.group(p).wait(timeout),
        lambda: bob.stack(timeout),
    ):
        with pytest.raises(ValueError, match="timeout must be a number of seconds, or None"):
            wait()
    assert torch.equal(p.fetch(timeout=10**400), x)  # for ever
    assert torch.equal(p.get(timeout=np.int64(60)), x)
