"""Signal handlers of the user that use the cluster: they work, or say at once that they cannot."""

import os
import signal
import threading
import time

import pytest
import torch

import fedproc as fp
from tests.contract.conftest import gate  # noqa: F401 - a fixture


@pytest.fixture
def cluster():
    with fp.Cluster(["alice", "bob"]) as cluster:
        yield cluster


@pytest.fixture
def on_signal():
    """Installs a handler of SIGUSR1 that notes what it returns or raises."""
    old = signal.getsignal(signal.SIGUSR1)

    def install(work):
        found = []

        def handle(*_):
            try:
                found.append(work())
            except fp.FedprocError as error:
                found.append(error)

        signal.signal(signal.SIGUSR1, handle)
        return found

    yield install
    signal.signal(signal.SIGUSR1, old)


def signal_at_rest(cluster):
    """Sends the signal when the main thread waits for an answer, from another thread."""
    hub = cluster["bob"].link.hub
    main = threading.get_ident()

    def send():
        deadline = time.monotonic() + 30
        while not (hub._leads == main and hub._at_rest):
            assert time.monotonic() < deadline
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("name", ["alice", "bob"])
def test_a_handler_may_wait_while_its_thread_waits(cluster, on_signal, gate, name):  # noqa: F811
    x = cluster[name].send(torch.arange(3.0))
    x.wait()

    def look():
        gate.open()
        return x.fetch(timeout=30), cluster["alice"].stats().objects

    found = on_signal(look)
    thread = signal_at_rest(cluster)
    assert cluster["bob"].run(gate.hold, 7).get(timeout=30) == 7
    thread.join()
    ((value, objects),) = found
    assert value.tolist() == [0.0, 1.0, 2.0]
    assert objects == (1 if name == "alice" else 0)
    assert cluster["bob"].run(pow, 2, 5).get() == 32


def test_what_would_wait_for_the_interrupted_get_itself_is_refused(cluster, on_signal, gate):  # noqa: F811
    bob = cluster["bob"]

    def use():
        gate.open()
        return bob.run(pow, 2, 3).get(timeout=30)

    found = on_signal(use)
    thread = signal_at_rest(cluster)
    assert bob.run(gate.hold, 7).get(timeout=30) == 7
    thread.join()
    assert "would wait for ever" in str(found[0])
    assert "get() or fetch()" in str(found[0])


def interrupt_once(monkeypatch, owner, name):
    """The next call of a method is interrupted by the signal, in its middle."""
    method = getattr(owner, name)

    def interrupted(*args):
        monkeypatch.setattr(owner, name, method)
        signal.raise_signal(signal.SIGUSR1)
        return method(*args)

    monkeypatch.setattr(owner, name, interrupted)


def test_in_the_middle_of_writing_it_may_submit_and_is_refused_to_wait(
    cluster, on_signal, monkeypatch
):
    bob = cluster["bob"]
    x = bob.send(torch.zeros(3))
    x.wait()
    submitted = []

    def use():
        submitted.append(bob.run(pow, 2, 3))
        return x.fetch()

    found = on_signal(use)
    interrupt_once(monkeypatch, bob.link.channel, "_write_batch")
    assert (x + 1).sum().item() == 3.0
    assert "wait: a signal handler or finalizer cannot use worker 'bob' here" in str(found[0])
    assert submitted[0].get() == 8


def test_in_the_middle_of_sending_it_is_refused_and_no_command_is_lost(
    cluster, on_signal, monkeypatch
):
    bob = cluster["bob"]
    log = bob.send([])
    found = on_signal(lambda: bob.run(list.append, log, "handler"))
    interrupt_once(monkeypatch, bob.link.channel, "append")
    for number in range(3):
        bob.run(list.append, log, number)
    assert "append: a signal handler or finalizer cannot use worker 'bob'" in str(found[0])
    assert log.fetch() == [0, 1, 2]


def test_in_the_middle_of_sending_frees_it_is_refused_and_no_object_stays(
    cluster, on_signal, monkeypatch
):
    bob = cluster["bob"]
    monkeypatch.setattr(bob.link, "tidy", lambda: None)  # the janitor leaves it to this thread
    x = bob.send(torch.zeros(3))
    y, z = x + 2, x + 3
    cluster.wait()
    found = on_signal(lambda: x + 1)
    del y, z
    interrupt_once(monkeypatch, bob.link.outbox, "_dropped")
    bob.link.outbox.tidy()
    assert "+: a signal handler or finalizer cannot use worker 'bob'" in str(found[0])
    assert bob.stats().objects == 1


def test_at_the_end_of_a_borrow_it_is_refused_and_no_command_is_lost(
    cluster, on_signal, monkeypatch
):
    bob = cluster["bob"]
    x, count = bob.send(torch.zeros(100_000)), bob.send(torch.zeros(1))
    found = on_signal(lambda: count.add_(1))
    with x.borrow():
        for _ in range(3):
            count.add_(1)
        interrupt_once(monkeypatch, bob.link.outbox, "_let_held_go")
    assert "add_: a signal handler or finalizer cannot use worker 'bob'" in str(found[0])
    assert count.fetch().item() == 3.0


def test_in_the_middle_of_a_look_it_is_refused_to_wait(cluster, on_signal, monkeypatch):
    bob = cluster["bob"]
    x = bob.send(torch.zeros(3))
    x.wait()
    found = on_signal(x.fetch)
    interrupt_once(monkeypatch, bob.link.hub, "_read")
    assert bob.alive
    assert "wait: a signal handler or finalizer cannot use worker" in str(found[0])
    assert x.sum().item() == 0.0


def test_who_waits_for_another_to_read_does_not_lock_out_the_handler(
    cluster, on_signal, monkeypatch
):
    hub, x = cluster["bob"].link.hub, cluster["bob"].send(torch.zeros(3))
    found = on_signal(x.fetch)
    monkeypatch.setattr(hub, "_followers", 1)  # it is about to sleep
    with hub._mutex:
        signal.raise_signal(signal.SIGUSR1)
    assert found[0].tolist() == [0.0] * 3
