"""Closed clusters and forked children."""

import os
import signal
import threading
import time

import pytest
import torch

import fedproc as fp
from tests.contract.things import outcome


def test_everything_of_a_closed_cluster_says_so(transport, x):
    with fp.Cluster(["bob"], transport=transport) as cluster:
        bob = cluster["bob"]
        p, m, c = bob.send(x), bob.send(torch.nn.Linear(3, 1)), bob.send([1])
        shaped = p.shape
    uses = {
        "get": p.get,
        "fetch": p.fetch,
        "copy": lambda: p.copy().get(),
        "operator": lambda: (p + 1).get(),
        "function": lambda: torch.add(p, 1).get(),
        "item": lambda: p.sum().item(),
        "borrow": lambda: p.borrow().__enter__(),
        "call": lambda: m(p).get(),
        "module get": m.get,
        "method": lambda: c.append(2).wait(),
        "send": lambda: bob.send(x).get(),
        "run": lambda: bob.run(abs, -1).get(),
        "objects": lambda: bob.objects,
        "stats": lambda: bob.stats(),
        "search": lambda: bob.search("a"),
        "clear": lambda: bob.clear(),
        "cluster run": lambda: cluster.run(abs, -1),
        "cluster map": lambda: cluster.map(abs, [1]),
        "cluster send": lambda: cluster.send(x),
        "cluster search": lambda: cluster.search("a"),
    }
    wrong = {}
    for name, use in uses.items():
        result = outcome(use)
        if not isinstance(result, fp.ClosedError):
            wrong[name] = repr(result)
    assert wrong == {}
    assert shaped == (3,)
    assert "bob" in repr(p)


def test_handles_may_be_dropped_after_close(transport, x, capfd):
    with fp.Cluster(["bob"], transport=transport) as cluster:
        held = [cluster["bob"].send(x) for _ in range(5)]
    del held
    assert capfd.readouterr().err == ""


def _in_forked_child(function):
    """The child's verdict: 0 when the function returned true."""
    pid = os.fork()
    if pid == 0:
        code = 1
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        try:
            code = 0 if function() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_in_a_forked_child_pointers_are_closed_and_free_nothing(cluster, bob, x):
    p, dropped = bob.send(x), [bob.send(x)]
    p.wait()

    def child():
        dropped.clear()
        uses = (
            p.get,
            p.fetch,
            p.copy,
            lambda: (p + 1).get(),
            lambda: bob.send(x).get(),
            cluster.wait,
        )
        return all(isinstance(outcome(use), fp.ClosedError) for use in uses)

    assert _in_forked_child(child) == 0
    assert len(bob.objects) == 2
    assert torch.equal(p.get(), x)
    assert torch.equal(dropped[0].get(), x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_may_close_without_harm(cluster, bob, x):
    p = bob.send(x)
    p.wait()

    def child():
        cluster.close()
        return True

    assert _in_forked_child(child) == 0
    assert bob.alive is True
    assert torch.equal(p.get(), x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_in_a_forked_child_nothing_is_said_about_workers(cluster, bob, x):
    p = bob.send(x)
    p.wait()

    def child():
        uses = (p.done, p.wait, lambda: bob.alive, lambda: list(fp.as_completed([p])), bob.stack)
        return all(isinstance(outcome(use), fp.ClosedError) for use in uses)

    assert _in_forked_child(child) == 0
    assert p.done()
    assert bob.alive


def test_who_waits_for_work_is_told_that_another_thread_closed_the_cluster(gate):
    cluster = fp.Cluster(["bob"])
    cluster["bob"].run(gate.hold)
    hub, main = cluster["bob"].link.hub, threading.get_ident()

    def close():
        deadline = time.monotonic() + 30
        while not (hub._leads == main and hub._at_rest):
            assert time.monotonic() < deadline
        cluster.close()

    closing = threading.Thread(target=close)
    with pytest.raises(fp.ClosedError, match="closed meanwhile; not all work was done"), cluster:
        closing.start()
    closing.join()
