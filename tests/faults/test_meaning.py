"""What results and errors mean when something fails on the way: cases 44 to 50."""

import os
import random
import signal

import numpy as np
import pytest
import torch

import fedproc as fp
from tests.faults.things import eventually, hold

pytestmark = pytest.mark.faults


def fail():
    raise ValueError("the first cause")


def plus(a, b):
    return a + b


def test_case_44_the_first_cause_through_three_workers(cluster, alice, bob, carol):
    bad = alice.run(fail)
    worse = alice.run(plus, bad, 1)
    for target in (bob, carol):
        with pytest.raises(ValueError, match="the first cause") as caught:
            worse.move(target)
        assert "'alice'" in str(caught.value)
        assert caught.value.issued_at.endswith(
            "in test_case_44_the_first_cause_through_three_workers"
        )
    worst = alice.run(plus, worse, worse)
    with pytest.raises(ValueError, match="the first cause"):
        worst.get()
    assert [worker.run(abs, -1).get() for worker in (alice, bob, carol)] == [1, 1, 1]


@pytest.mark.parametrize("stopped", ["alice", "bob"])
def test_case_47_a_move_that_hangs_ends_when_its_worker_is_ended(stopped):
    """A move takes no deadline of its own: who waits for a stopped worker is freed by its end."""
    import threading

    with fp.Cluster(["alice", "bob"]) as cluster:
        alice, bob = cluster
        p = alice.send(torch.arange(20_000.0))
        p.wait()
        os.kill(cluster[stopped].pid, signal.SIGSTOP)
        told = []

        def move():
            try:
                p.move(bob)
            except fp.WorkerLostError as error:
                told.append(error.worker)

        thread = threading.Thread(target=move)
        thread.start()
        eventually(lambda: cluster[stopped].link.inbox.unanswered() > 0)
        cluster[stopped].link.process.kill()
        thread.join(20)
        assert told == [stopped]
        if stopped == "bob":
            assert p[19_999].item() == 19_999.0


def draws():
    return random.random(), float(np.random.rand()), torch.rand(1).item()  # noqa: NPY002


def test_case_48_streams_do_not_depend_on_how_workers_start(monkeypatch):
    def found(names):
        with fp.Cluster(names, seed=48) as cluster:
            return {worker.name: worker.run(draws).get() for worker in cluster}

    forked = found(["alice", "bob"])
    monkeypatch.setenv("FEDPROC_START", "exec")
    assert found(["bob"])["bob"] == forked["bob"]
    assert not set(forked["alice"]) & set(forked["bob"])


def test_case_46_work_that_is_waited_for_no_more(cluster, bob, tmp_path):
    """There is no cancel: a wait is given up by its timeout, the work by the worker's end."""
    gate = str(tmp_path / "gate")
    running, queued = bob.run(hold, gate, 1), bob.run(abs, -2)
    for pointer in (running, queued):
        with pytest.raises(fp.CommandTimeoutError):
            pointer.get(timeout=0.01)
    (tmp_path / "gate").touch()
    assert (running.get(), queued.get()) == (1, 2)
