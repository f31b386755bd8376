"""What a worker is doing: ``worker.stack()``, and the report of commands that take long."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import fedproc as fp

HEAD = "Stack (most recent call first):\n"


def touch_then_hold(path, hold):
    Path(path).touch()
    hold()


def busy_in_c(path):
    """C code that never lets go of the interpreter."""
    Path(path).touch()
    re.match("(a+)+$", "a" * 60 + "b")


def appears(path):
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_of_a_busy_worker(bob, gate, tmp_path):
    begun = tmp_path / "begun"
    slow = bob.run(touch_then_hold, str(begun), gate.hold)
    appears(begun)
    deadline = time.monotonic() + 20
    while " in hold\n" not in (shown := bob.stack()):  # the file is there before touch returns
        assert time.monotonic() < deadline
    assert shown.startswith(HEAD)
    assert shown.index(" in hold\n") < shown.index(" in touch_then_hold\n")
    assert bob.stack().count(HEAD) == 1
    gate.open()
    assert slow.get() is None


def test_of_an_idle_worker(bob):
    bob.run(torch.mm, torch.ones(300, 300), torch.ones(300, 300)).wait()  # torch has threads now
    deadline = time.monotonic() + 20
    while " in serve\n" not in bob.stack():  # an inline one may still be writing its answer
        assert time.monotonic() < deadline
    for _ in range(20):
        assert bob.stack().startswith(HEAD)
    assert bob.run(abs, -1).get() == 1


def test_of_a_worker_whose_interpreter_is_in_c(tmp_path):
    with fp.Cluster(["bob"]) as cluster:
        bob = cluster["bob"]
        stuck = bob.run(busy_in_c, str(tmp_path / "begun"))
        appears(tmp_path / "begun")
        deadline = time.monotonic() + 20
        while " in match\n" not in (shown := bob.stack()):
            assert time.monotonic() < deadline
        assert " in busy_in_c\n" in shown
        bob.kill()
        with pytest.raises(fp.WorkerLostError):
            stuck.get()


def test_of_a_stopped_worker(tmp_path):
    with fp.Cluster(["bob"]) as cluster:
        bob = cluster["bob"]
        os.kill(bob.pid, signal.SIGSTOP)
        with pytest.raises(fp.CommandTimeoutError, match=r"'bob' .*stopped.*SIGCONT"):
            bob.stack(timeout=0.1)
        os.kill(bob.pid, signal.SIGCONT)
        assert " in serve\n" in bob.stack()
        assert " in serve\n" in bob.stack()  # the late answer to the first question is not in it
        assert bob.run(abs, -1).get() == 1


def test_without_a_limit(bob):
    assert bob.stack(timeout=None).startswith(HEAD)


def test_of_a_dead_worker(bob):
    bob.kill()
    with pytest.raises(fp.WorkerLostError, match="bob"):
        bob.stack()


def test_of_a_worker_that_just_died(tmp_path):
    cluster = fp.Cluster(["bob"])
    bob = cluster["bob"]
    os.kill(bob.pid, signal.SIGKILL)
    with pytest.raises(fp.WorkerLostError, match="bob"):
        bob.stack()
    cluster.close()


def test_of_a_closed_cluster(transport):
    with fp.Cluster(["bob"], transport=transport) as cluster:
        bob = cluster["bob"]
    with pytest.raises(fp.ClosedError):
        bob.stack()


def test_from_several_threads_at_once(bob):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        shown = list(pool.map(lambda _: bob.stack(), range(40)))
    assert all(text.count(HEAD) == 1 and " in serve\n" in text for text in shown)


@pytest.mark.skipif(sys.platform != "linux", reason="executed workers are tested on Linux")
def test_of_an_executed_worker(monkeypatch):
    monkeypatch.setenv("FEDPROC_START", "exec")
    with fp.Cluster(["bob"]) as cluster:
        cluster["bob"].run(abs, 1).get()  # it tells that it has started before it serves
        assert " in serve\n" in cluster["bob"].stack()


@pytest.fixture
def reports(monkeypatch, caplog):
    monkeypatch.setenv("FEDPROC_STALL_SECONDS", "0.1")
    caplog.set_level(logging.WARNING, "fedproc")
    return caplog  # its records are others in each phase of a test


def reported(reports):
    deadline = time.monotonic() + 20
    while not reports.records:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return reports.records[0].getMessage()


def test_a_long_command_is_reported_once(reports, transport, gate):
    with fp.Cluster(["alice", "bob"], transport=transport) as cluster:
        slow = cluster["bob"].run(gate.hold, 3)
        text = reported(reports)
        assert "worker 'bob'" in text
        assert "`_holder.<locals>.hold`" in text
        assert "test_stack.py" in text  # where it was issued
        assert " in hold\n" in text
        second = cluster["alice"].run(gate.hold, 4)
        deadline = time.monotonic() + 20
        while len(reports.records) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        gate.open()
        assert (slow.get(), second.get()) == (3, 4)
    assert len(reports.records) == 2


def test_a_stopped_worker_is_reported(reports, monkeypatch):
    monkeypatch.setattr("fedproc.remote.stalls.STACK_SECONDS", 0.1)
    with fp.Cluster(["bob"]) as cluster:
        bob = cluster["bob"]
        bob.run(abs, -1).get()
        os.kill(bob.pid, signal.SIGSTOP)
        pending = bob.run(abs, -2)
        bob.link.flush()
        text = reported(reports)
        os.kill(bob.pid, signal.SIGCONT)
        assert "not to be had" in text
        assert "stopped" in text
        assert pending.get() == 2


def test_what_a_borrow_holds_back_is_not_reported(reports, bob, x):
    with fp.Cluster(["bob"]) as cluster:
        pointer = cluster["bob"].send(x)
        with pointer.borrow():
            pointer.zero_()
            time.sleep(0.3)  # three times what makes a stall
        assert pointer.tolist() == [0.0, 0.0, 0.0]
    assert reports.records == []


def test_nothing_is_reported_where_it_is_switched_off(monkeypatch, caplog):
    monkeypatch.setenv("FEDPROC_STALL_SECONDS", "0")
    with fp.Cluster(["bob"]) as cluster:
        cluster["bob"].run(time.sleep, 0.3).wait()
    assert caplog.records == []


def test_a_bad_period_is_refused(monkeypatch):
    monkeypatch.setenv("FEDPROC_STALL_SECONDS", "soon")
    with pytest.raises(ValueError, match=r"FEDPROC_STALL_SECONDS .*'soon'"):
        fp.Cluster(["bob"])


def test_by_default_it_is_half_a_minute():
    code = "from fedproc.remote.stalls import Stalls; print(Stalls()._seconds)"
    environment = {k: v for k, v in os.environ.items() if k != "FEDPROC_STALL_SECONDS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.stdout == b"30.0\n"


def test_what_was_done_long_ago_is_no_stall(reports):
    with fp.Cluster(["bob"]) as cluster:
        link = cluster["bob"].link
        link.hub.look = lambda: None  # nobody reads what the worker tells
        cluster["bob"].run(abs, -1)
        link.flush()
        deadline = time.monotonic() + 20
        while link.hub._stalls._since.get(link, (0, 0.0))[1] != float("inf"):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        while any(thread.name == "fedproc-stall" for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        del link.hub.look
    assert not reports.records
