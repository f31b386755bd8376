"""Worker handles: identity, statistics, the list of objects, clear."""

import contextlib
import os
import time
from collections.abc import Mapping

import pytest
import torch
from torch import nn

import fedproc as fp


def test_pid_is_where_functions_run(bob):
    assert bob.run(os.getpid).get() == bob.pid


def test_processes_have_pids_of_their_own():
    with fp.Cluster(["alice", "bob"]) as cluster:
        assert len({os.getpid(), cluster["alice"].pid, cluster["bob"].pid}) == 3


def test_inline_pid_is_the_parents():
    with fp.Cluster(["bob"], transport="inline") as cluster:
        assert cluster["bob"].pid == os.getpid()
        assert cluster["bob"].exitcode is None


def test_a_live_worker_has_no_exitcode(bob):
    assert bob.alive is True
    assert bob.exitcode is None


def test_text_names_the_worker(bob):
    assert "bob" in repr(bob)


def test_stats_is_a_frozen_record(bob, x):
    p = bob.send(x)
    p.wait()
    stats = bob.stats()
    assert stats.objects == 1
    assert stats.rss_bytes > 0
    assert stats.pss_bytes > 0
    assert stats.cpu_s >= 0
    assert stats.arena_bytes >= 0
    with pytest.raises(AttributeError):
        stats.objects = 5


def test_stats_counts_commands(bob, x):
    p = bob.send(x)
    before = bob.stats().commands
    q = (p + 1) * 2
    q.wait()
    assert bob.stats().commands >= before + 2


def test_objects_is_a_mapping_by_id(bob, x):
    p = bob.send(x, tags="x", description="three numbers")
    assert isinstance(bob.objects, Mapping)
    assert list(bob.objects) == [p.id]
    info = bob.objects[p.id]
    assert info.id == p.id
    assert info.type == "torch.Tensor"
    assert info.shape == (3,)
    assert type(info.shape) is tuple
    assert info.dtype is torch.float32
    assert info.nbytes == 12
    assert info.tags == frozenset({"x"})
    assert info.description == "three numbers"
    assert info.private is False


def test_an_object_that_is_no_tensor_has_no_shape(bob):
    p = bob.send(nn.Linear(2, 1))
    info = bob.objects[p.id]
    assert info.type == "torch.nn.modules.linear.Linear"
    assert info.shape is None
    assert info.dtype is None


def test_infos_are_object_infos(bob, x):
    p = bob.send(x)
    assert isinstance(bob.objects[p.id], fp.ObjectInfo)


def test_sends_and_results_count(bob, x):
    p = bob.send(x)
    assert len(bob.objects) == 1
    q = p + 1
    r = bob.run(dict)
    assert set(bob.objects) == {p.id, q.id, r.id}


def test_a_failed_command_does_not_count(bob, x):
    p = bob.send(x)
    bad = p.view(7)
    assert len(bob.objects) == 1
    with pytest.raises(RuntimeError):
        bad.get()


def test_gradients_and_parameters_count_while_held(bob):
    m = bob.send(nn.Linear(2, 1))
    assert len(bob.objects) == 1
    parameters = m.parameters()
    assert len(bob.objects) == 3
    del parameters
    assert len(bob.objects) == 1
    x = bob.send(torch.ones(2, requires_grad=True))
    x.sum().backward()
    grad = x.grad
    assert len(bob.objects) == 3
    del grad
    assert len(bob.objects) == 2


def test_frees_are_applied_before_counting(bob, x):
    p = bob.send(x)
    held = [p + n for n in range(50)]
    assert len(bob.objects) == 51
    del held
    assert len(bob.objects) == 1


def test_clear_returns_the_worker_and_empties_it(bob, x):
    p, q = bob.send(x, tags="a"), bob.send(x)
    assert bob.clear() is bob
    assert len(bob.objects) == 0
    assert list(bob.search("a")) == []
    for handle in (p, q):
        with pytest.raises(fp.ObjectGoneError):
            handle.get()
    again = bob.send(x)
    assert list(bob.objects) == [again.id]


def test_repr_never_waits(bob, gate):
    slow = bob.run(gate.hold, 1)  # it ends when the gate is opened, below
    shown = repr(bob)
    assert not slow.done()
    assert "bob" in shown
    assert "pending=1" in shown
    gate.open()
    assert slow.get() == 1


def install_alarm(delay):
    """From now on an alarm raises, whatever the worker does at that moment."""
    import signal

    def handler(number, frame):
        raise RuntimeError("the alarm")

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, delay, delay)


def stop_alarm():
    import signal

    signal.setitimer(signal.ITIMER_REAL, 0)


def test_a_signal_handler_that_raises_between_commands_does_not_end_the_worker(capfd):
    cluster = fp.Cluster(["bob"])
    bob = cluster["bob"]
    bob.run(install_alarm, 0.005).wait()  # often: it comes in every part of the loop
    shown = ""
    deadline = time.monotonic() + 20
    while shown.count("RuntimeError: the alarm") < 5:  # while the worker is idle
        assert time.monotonic() < deadline
        shown += capfd.readouterr().err
    assert "worker 'bob': a signal handler raised between commands" in shown
    answers = set()
    for n in range(2000):
        with contextlib.suppress(fp.RemoteError):  # it came in the middle: the command has failed
            answers.add(bob.run(abs, -n).get(timeout=20) == n)
    assert answers == {True}
    for _ in range(20):
        with contextlib.suppress(fp.RemoteError):
            bob.run(stop_alarm).wait()
    assert bob.run(abs, -5).get() == 5
    cluster.close()


def break_the_loop():
    from fedproc.worker import loop

    loop.Loop._report = None


def test_a_worker_that_ends_by_a_fault_of_its_own_says_which(capfd):
    with fp.Cluster(["bob"]) as cluster:
        broken = cluster["bob"].run(break_the_loop)
        with pytest.raises(fp.WorkerLostError, match="exit code 1"):
            broken.wait()
    shown = capfd.readouterr().err
    assert "fedproc/worker/loop.py" in shown
    assert "TypeError: 'NoneType' object is not callable" in shown
