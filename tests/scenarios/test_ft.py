"""Scenarios FT: faults and process life. FT3 does not apply: there is no reconnect."""

import os

import pytest
import torch

import fedproc as fp


def test_ft1_the_remote_error_comes_home_and_the_worker_goes_on(bob):
    p, q = bob.send(torch.ones(2)), bob.send(torch.ones(3))
    bad = p + q
    with pytest.raises(RuntimeError, match="must match the size") as caught:
        bad.get()
    assert isinstance(caught.value, fp.RemoteError)
    assert "RuntimeError" in caught.value.remote_traceback
    assert caught.value.worker == "bob"
    assert (p * 2).get().tolist() == [2.0, 2.0]


def test_ft2_a_killed_worker_is_a_prompt_named_error(bob, alice, x):
    p, q = bob.send(x), alice.send(x)
    p.wait()
    bob.kill()
    with pytest.raises(fp.WorkerLostError, match="bob"):
        (p + 1).get()
    with pytest.raises(fp.WorkerLostError, match="bob"):
        p.get()
    assert (q + 1).get().tolist() == [2.0, 3.0]
    assert alice.alive is True


def test_ft4_an_object_moves_between_two_processes():
    with fp.Cluster(["bob", "alice"]) as cluster:
        bob, alice = cluster
        p = bob.run(torch.arange, 300_000)
        p.move(alice)
        assert len(bob.objects) == 0
        assert alice.run(lambda t: (os.getpid(), int(t.sum())), p).get() == (
            alice.pid,
            299_999 * 150_000,
        )
        assert torch.equal(p.get(), torch.arange(300_000))
