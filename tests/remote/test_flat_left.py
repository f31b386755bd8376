"""Calls that the compiled step leaves to the general way, what it frees, and where errors point."""

import collections
import colorsys as module  # any that a worker can import
import contextlib
import os
import signal
import threading

import pytest
import torch

import fedproc as fp
from fedproc.remote import flat
from tests.contract.things import outcome
from tests.remote.ways import fields_of, generally, state, take


@pytest.fixture
def cluster(quiet_cluster):
    return quiet_cluster


# ---- what is left to the general way


def fail():
    raise ValueError("no good")


def test_other_arguments_are_left(bob, alice, ways):
    p, q, gone = bob.send(torch.ones(2)), alice.send(torch.ones(2)), bob.send(1)
    gone.get()
    for action, error, text in (
        (lambda: bob.run(torch.add, p, torch.ones(2)), fp.PlacementError, "but a local tensor"),
        (lambda: torch.add(p, torch.ones(2)), fp.PlacementError, "but a local tensor"),
        (lambda: p + q, fp.PlacementError, "is on worker 'alice', but"),
        (lambda: bob.run(take, q), fp.PlacementError, "is on worker 'alice', but the call runs"),
        (lambda: bob.run(take, gone), fp.ObjectGoneError, "was brought home"),
        (lambda: bob.run("abs", 1), TypeError, "run needs a function to run, not a str"),
        (lambda: bob.run(7, 1), TypeError, "run needs a function to run, not an int"),
    ):
        with pytest.raises(error, match=text):
            action()
        assert set(ways) == {False}
    assert bob.run(sorted, [3, 1, 2]).get() == [1, 2, 3]
    assert bob.run(max, 1, 2, key=abs).get() == 2
    assert bob.run(lambda n: n + 1, 1).get() == 2
    assert set(ways) == {False}


def modes():
    """Of the thread that runs this."""
    return torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (torch.no_grad, (False, torch.float32, False)),
        (torch.inference_mode, (False, torch.float32, False)),
        (lambda: torch.autocast("cpu"), (True, torch.float32, True)),
        (lambda: fp_default(torch.float64), (True, torch.float64, False)),
    ],
)
def test_modes_travel_the_general_way(bob, ways, context, expected):
    bob.run(modes).wait()
    ways.clear()
    with context():
        there = bob.run(modes)
    assert there.get() == expected
    assert set(ways) == {False}
    assert bob.run(modes).get() == (True, torch.float32, False)
    assert ways[-1] is flat.COMPILED


@contextlib.contextmanager
def fp_default(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_is_to_be_private_is(bob, sent):
    p = bob.run(take, 1, private=True)
    q = generally(lambda: bob.run(take, 1, private=True))
    assert [fields_of(frame)[1][4] for frame in sent] == [True, True]
    assert [bob.objects[pointer.id].private for pointer in (p, q)] == [True, True]


def test_a_function_that_its_module_calls_so_no_more_is_left(bob, ways, monkeypatch):
    first = module.rgb_to_hls
    expected = first(0.1, 0.2, 0.3)
    assert [bob.run(first, 0.1, 0.2, 0.3).get() for _ in range(2)] == [expected, expected]
    assert ways[-1] is flat.COMPILED
    ways.clear()
    for change in (
        lambda: monkeypatch.setattr(module, "rgb_to_hls", module.rgb_to_hsv),
        lambda: monkeypatch.delattr(module, "rgb_to_hls"),
    ):
        change()
        assert bob.run(first, 0.1, 0.2, 0.3).get() == expected
        monkeypatch.undo()
    assert ways == [False] * len(ways)


def test_in_lockstep_an_error_is_raised_where_the_call_is(bob, monkeypatch):
    bob.run(take).wait()
    monkeypatch.setattr(bob.link, "lockstep", None)
    with pytest.raises(fp.RemoteError, match="no good"):
        bob.run(fail)


def test_closed_and_lost_say_so():
    with fp.Cluster(["alice", "bob"]) as cluster:
        bob, carol = cluster
        for worker in cluster:
            worker.run(take).wait()
        bob.kill()
        with pytest.raises(fp.WorkerLostError):
            bob.run(take)
    before = state(carol.link), state(bob.link)
    for action in (lambda: carol.run(take), lambda: bob.run(take)):
        with pytest.raises((fp.ClosedError, fp.WorkerLostError)):
            action()
    assert (state(carol.link), state(bob.link)) == before


def test_what_may_write_waits_for_the_end_of_a_borrow(bob, ways, sent):
    p = bob.send(torch.ones(2))
    bob.run(take).wait()
    with p.borrow():
        ways.clear()
        sent.clear()
        read = p + 1
        writes = bob.run(take, p)
        after = p + 2
        assert ways == [flat.COMPILED, False, False, False]
        assert [frame.sequence for frame in sent] == [read.id]
        assert bob.link.outbox.holding
    assert [frame.sequence for frame in sent] == [read.id, writes.id, after.id]
    assert (read.fetch().tolist(), writes.get()) == ([2.0, 2.0], 1)


def test_who_finds_the_lock_taken_waits(bob, monkeypatch):
    bob.run(take).wait()
    submit, tried, told, made = flat.submit, threading.Event(), [], []

    def watched(*args):
        told.append(submit(*args))
        tried.set()
        return told[-1]

    monkeypatch.setattr(flat, "submit", watched)
    thread = threading.Thread(target=lambda: made.append(bob.run(take, 1, 2)))
    with bob.link.outbox.lock:
        thread.start()
        assert tried.wait(10)
        assert (told[0], made) == (None, [])
    thread.join()
    assert made.pop().get() == 2


def test_a_call_in_the_middle_of_another_is_refused(bob, monkeypatch):
    monkeypatch.setattr(bob.link.outbox, "sending", True)
    with pytest.raises(fp.FedprocError, match="in the middle of sending"):
        bob.run(take)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_refused_also_where_the_lock_is_held_for_ever(bob, held):
    p, locked, over = bob.send(torch.ones(2)).wait(), threading.Event(), threading.Event()

    def hold():
        with bob.link.outbox.lock if held else contextlib.nullcontext():
            locked.set()
            over.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        found = [outcome(action) for action in (lambda: bob.run(take), lambda: p + 1)]
        os._exit(not all(isinstance(error, fp.ClosedError) for error in found))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    over.set()
    thread.join()
    assert code == 0
    assert bob.run(take, p).get() == 1


# ---- frees


@pytest.mark.parametrize("count", [1, 2, 1024, 1025, 1500])
def test_dropped_pointers_ride_in_front_of_the_next_call(bob, ways, sent, count):
    kept, dropped = bob.run(take), collections.deque(bob.run(take) for _ in range(count))
    ids = tuple(pointer.id for pointer in dropped)
    kept.wait()
    sent.clear()
    ways.clear()
    while dropped:
        dropped.popleft()
    after = bob.run(take)
    assert fields_of(sent[0])[0] == ids[:1024]
    assert tuple(bob.link.trash) == ids[1024:]
    assert ways[0] is (flat.COMPILED and count <= 1024)
    assert not set(ids[:1024]) & set(bob.link.outbox.handles)
    bob.link.outbox.tidy()
    assert not set(ids) & set(bob.objects)
    assert {kept.id, after.id} <= set(bob.objects)


# ---- errors


@pytest.mark.parametrize(
    "action",
    [
        lambda p, log: p + bob_of(p).send(torch.ones(7)),
        lambda p, log: torch.matmul(p, p.view(1, 3)),
        lambda p, log: p.view(7),
        lambda p, log: log.append(1, 2),
        lambda p, log: log + 5,
        lambda p, log: bob_of(p).run(fail),
    ],
)
def test_an_error_names_the_line_of_the_user(bob, action):
    p, log = bob.send(torch.ones(3)), bob.send([])
    line = action.__code__.co_firstlineno
    for way in (action, lambda *given: generally(lambda: action(*given))):
        with pytest.raises(fp.RemoteError) as caught:
            way(p, log).get()
        assert f"{__file__}:{line} in <lambda>" in str(caught.value)


def bob_of(pointer):
    return pointer.worker
