"""The short ways of a command: what is kept, looked up once or looked up later is still right."""

import _thread
import gc
import socket
import sys
import time

import pytest
import torch

import fedproc as fp
from fedproc.remote import outbox
from fedproc.remote.encode import sent_as
from fedproc.remote.hub import Hub, _watch
from fedproc.remote.site import Site, caller
from fedproc.remote.tensor import TensorPointer


@pytest.fixture(scope="module")
def cluster():
    with fp.Cluster(["alice", "bob"]) as cluster:
        yield cluster


@pytest.fixture
def bob(cluster):
    return cluster["bob"]


# ---- where a command was issued


def _here(found, lines):
    found.append(caller(2))
    lines.append(sys._getframe(1).f_lineno)


def test_the_line_is_that_of_the_frame_also_in_the_middle_of_a_statement():
    found, lines = [], []
    for _ in range(2):
        _here(found, lines)
        _ = [
            _here(found, lines),
            (
                _here(found, lines),
                _here(found, lines),
            ),
        ]
    assert [site.line for site in found] == lines
    assert len(set(lines)) == 4


def test_the_line_is_that_of_the_call_and_not_where_the_function_went_on(bob):
    bad = bob.send(torch.ones(2)).view(7)
    line = sys._getframe().f_lineno - 1
    for _ in range(300):
        pass
    with pytest.raises(fp.RemoteError) as caught:
        bad.get()
    assert f"test_submitting.py:{line} in test_the_line_is_that_of_the_call" in str(caught.value)


def test_a_place_nobody_knows():
    assert (Site.nowhere().line, str(Site.nowhere())) == (0, "unknown place")


def test_a_method_of_ours_may_be_all_that_a_thread_runs(bob):
    log = bob.send([])
    _thread.start_new_thread(bob.run, (list.append, log, 1))  # no frame of threading below it
    deadline = time.monotonic() + 60.0
    while log.fetch() != [1]:
        assert time.monotonic() < deadline, "the thread has sent nothing"


# ---- what functions are sent as


def test_a_function_is_sent_by_a_name_only_while_that_leads_to_it(monkeypatch):
    import colorsys as module  # any module that a worker can import

    first = module.rgb_to_hls
    for _ in range(2):
        assert sent_as(first) == (":colorsys:rgb_to_hls", "rgb_to_hls")
    monkeypatch.setattr(module, "rgb_to_hls", module.rgb_to_hsv)
    assert sent_as(first) == (first, "rgb_to_hls")
    monkeypatch.undo()
    assert sent_as(first) == (":colorsys:rgb_to_hls", "rgb_to_hls")
    monkeypatch.delitem(sys.modules, "colorsys")
    assert sent_as(first)[0] is first


def test_functions_of_torch_go_by_the_name_of_the_operation():
    for _ in range(2):
        assert sent_as(torch.add)[0] == "torch.add"
    assert sent_as(torch.Tensor.add_)[0] == "Tensor.add_"


@pytest.mark.parametrize("thing", [5, "abs", None, torch.ones(1)])
def test_what_cannot_be_called_is_not_run(bob, thing):
    with pytest.raises(TypeError, match="run needs a function"):
        bob.run(thing, 1)


def test_named_functions_take_keywords_and_what_is_not_flat(bob):
    assert bob.run(sorted, [3, 1, 2], reverse=True).get() == [3, 2, 1]
    assert bob.run(sorted, [3, 1, 2]).get() == [1, 2, 3]
    with pytest.raises(TypeError, match="not iterable"):
        bob.run(sorted, 5, key=abs).get()


@pytest.mark.parametrize("private", [1, "yes", [1], [], 0, None])
def test_private_is_any_truth(bob, private):
    pointer = bob.run(abs, -1, private=private)
    assert bob.objects[pointer.id].private is bool(private)


# ---- company


@pytest.mark.parametrize(
    ("waiting", "age", "may"),
    [(1, 0.0, True), (1, 1.0, False), (2, 1.0, True), (63, 1.0, True), (64, 0.0, False)],
)
def test_the_first_that_waits_asks_the_clock_the_others_wait_with_it(
    bob, monkeypatch, waiting, age, may
):
    box = bob.link.outbox
    now = box._written_at + age
    monkeypatch.setattr(outbox.time, "monotonic", lambda: now)
    assert box.may_wait(waiting) is may


def test_whoever_waits_behind_the_end_of_a_borrow_is_announced(bob, monkeypatch):
    """That end is queued without telling the janitor, so who follows is not the first to wait."""
    tails = []
    bob.run(abs, -1).wait()
    monkeypatch.setattr(Hub, "tail", lambda _: tails.append(1))
    bob.link.outbox.last += 1  # as if it were busy
    bob.link.outbox._written_at = outbox.time.monotonic() + 60  # and in a burst
    bob.link.outbox.release(0)
    after = bob.run(abs, -3)
    monkeypatch.undo()
    assert tails
    assert after.get() == 3


# ---- who frees what


def _count(worker):
    gc.collect()
    return len(worker.objects)


def test_half_a_pointer_ends_in_silence(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    half = object.__new__(TensorPointer)
    del half
    gc.collect()
    assert seen == []


def test_a_pulled_chain_keeps_its_object_and_frees_it_once(cluster):
    alice, bob = cluster["alice"], cluster["bob"]
    before = _count(alice), _count(bob)
    p = bob.send(torch.ones(3))
    chain = p.send(alice)
    del p
    assert chain.remote_get().fetch().tolist() == [1.0, 1.0, 1.0]
    assert (_count(alice), _count(bob)) == (before[0] + 1, before[1])
    del chain
    assert (_count(alice), _count(bob)) == before


def test_a_found_pointer_owns_nothing_and_a_chain_of_it_neither(cluster):
    alice, bob = cluster["alice"], cluster["bob"]
    before = _count(alice), _count(bob)
    p = bob.send(torch.ones(3), tags="found")
    (found,) = bob.search("found")
    chain = found.send(alice)
    del found, chain
    assert (_count(alice), _count(bob)) == (before[0], before[1] + 1)
    (found,) = bob.search("found")
    del p
    assert _count(bob) == before[1]
    with pytest.raises(fp.ObjectGoneError):
        found.fetch()


class Waiting:
    """A link with something to write, whose other end has room for it."""

    name = "alice"

    def __init__(self, descriptor):
        self.descriptor, self.unsent = descriptor, True

    def fileno(self):
        return self.descriptor

    def written_by(self, thread):
        return False

    def resume(self):
        pass

    def flush(self):
        self.unsent = False
        return True


def test_who_only_looks_for_answers_writes_nothing():
    here, there = socket.socketpair()
    with here, there:
        hub, link = Hub(lambda: None), Waiting(here.fileno())
        hub._watched = _watch({here.fileno(): link})  # without the janitor, who writes, too
        hub.look()
        assert link.unsent
        assert hub.wait_until(lambda: not link.unsent, 10)
