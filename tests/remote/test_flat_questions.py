"""Questions and fetches in the parent: the compiled step does what the general way does."""

import collections
import sys
import threading

import pytest
import torch

import fedproc as fp
from fedproc.remote import flat, reading
from fedproc.wire import frames
from tests.remote.ways import fields_of, generally, require_nothing_kept, state, take


@pytest.fixture
def cluster(quiet_cluster):
    return quiet_cluster


QUESTIONS = {
    "item": lambda p, log: p.sum().item(), "tolist": lambda p, log: p.tolist(),
    "equal": lambda p, log: torch.equal(p, p), "float": lambda p, log: float(p[0]),
    "bool": lambda p, log: bool(p[0] > 0), "in": lambda p, log: 2.0 in p,
    "index": lambda p, log: range(5)[p[0].long()], "length": lambda p, log: len(log),
    "fetch": lambda p, log: log.fetch(), "get": lambda p, log: p.worker.run(abs, -7).get(),
    "numpy": lambda p, log: p.numpy().tolist(), "gather": lambda p, log: fp.gather([log, log]),
}  # fmt: skip


@pytest.mark.parametrize("question", QUESTIONS)
def test_both_ways_ask_the_same(bob, asked, question):
    ask, p, log = QUESTIONS[question], bob.send(torch.tensor([1.0, 2.0])), bob.send([5])
    ask(p, log)
    told = []
    for way in (lambda: ask(p, log), lambda: generally(lambda: ask(p, log))):
        asked.clear()
        answer = way()
        fields = [fields_of(frame)[1] for frame in asked]
        if question in ("item", "get", "float", "bool", "index"):  # of a new object each time
            fields = [
                str(f).replace(str(frame.sequence - 1), "id")
                for f, frame in zip(fields, asked, strict=True)
            ]
        flags = [frame.flags & ~frames.FREES for frame in asked]
        told.append((answer, fields, flags, [frame.kind for frame in asked]))
    assert told[0] == told[1]
    assert told[0][2] == [frames.PLAIN] * len(asked)
    assert asked


def test_the_compiled_way_is_taken(bob, asked_ways):
    p, log = bob.send(torch.tensor([1.0, 2.0])), bob.send([5])
    for question in ("item", "tolist", "equal", "float", "in", "fetch", "get", "numpy"):
        asked_ways.clear()
        QUESTIONS[question](p, log)
        assert set(asked_ways) == {flat.COMPILED}, question


# ---- what is noted


@pytest.mark.parametrize("way", [lambda action: action(), generally])
def test_a_fetch_is_noted_as_a_borrow_until_it_is_finished(bob, way):
    p, box = bob.send([1]).wait(), bob.link.outbox
    before = box.writes, box.submitted
    borrow = way(lambda: reading.start(bob.link, p._handle, "fetch"))
    number, site, what = bob.link.inbox.expected[-1]
    assert (number, what, type(site.instruction)) == (box.last, "fetch", int)
    assert site.code is sys._getframe().f_code or site.code.co_name == "<lambda>"
    assert (borrow.query, borrow.lasts, borrow.answered) == (number, True, True)
    assert {query: ref() for query, ref in box.borrows.reading.items()} == {number: borrow}
    assert (box.writes - before[0], box.submitted - before[1], box.sending) == (0, 1, False)
    assert not bob.link.unsent
    assert reading.finish(bob.link, borrow, "fetch") == [1]
    assert (box.borrows.reading, borrow.lasts) == ({}, False)


def test_what_may_write_waits_for_the_end_of_a_fetch(bob):
    p = bob.send([1]).wait()
    borrow = reading.start(bob.link, p._handle, "fetch")
    writes = bob.run(list.append, p, 2)
    assert bob.link.outbox.holding
    assert reading.finish(bob.link, borrow, "fetch") == [1]
    assert (writes.get(), p.get()) == (None, [1, 2])


def test_a_fetch_that_nobody_finishes_ends_with_its_borrow(bob):
    p = bob.send([1]).wait()
    reading.start(bob.link, p._handle, "fetch")
    bob.link.outbox.tidy()
    assert bob.link.outbox.borrows.reading == {}
    assert p.get() == [1]
    assert bob.link.inbox._answers == {}


# ---- what is left to the general way


def test_other_questions_are_left(bob, alice, asked_ways):
    p, q, gone = bob.send(torch.ones(2)), alice.send(torch.ones(2)), bob.send(1)
    gone.get()
    asked_ways.clear()
    for action, error, text in (
        (lambda: torch.equal(p, torch.ones(2)), fp.PlacementError, "but a local tensor"),
        (lambda: torch.equal(p, q), fp.PlacementError, "is on worker 'alice', but"),
        (lambda: gone.fetch(), fp.ObjectGoneError, "was brought home"),
        (lambda: gone.get(), fp.ObjectGoneError, "was brought home"),
    ):
        with pytest.raises(error, match=text):
            action()
    assert torch.allclose(p, p, rtol=0.0) is True
    with torch.no_grad():
        assert p.tolist() == [1.0, 1.0]
    assert set(asked_ways) <= {False}


def test_private_values_stay_where_they_are(bob, asked_ways):
    private = bob.send(7, private=True)
    data = bob.send(torch.ones(2), private=True)
    for action in (private.get, private.fetch, data.tolist, lambda: float(data.sum())):
        with pytest.raises(fp.NotPermittedError, match="is private"):
            action()
    assert bob.run(take, private).wait() is not None


def test_lost_and_closed_say_so():
    with fp.Cluster(["alice", "bob"]) as cluster:
        there, here = (worker.send(torch.ones(1)).wait() for worker in cluster)
        cluster["alice"].kill()
        for action in (there.item, there.fetch, there.get):
            with pytest.raises(fp.WorkerLostError):
                action()
        assert here.item() == 1.0
    before = state(here._handle.link)
    for action in (here.item, here.fetch, here.get):
        with pytest.raises(fp.ClosedError):
            action()
    assert state(here._handle.link) == before


def test_in_the_middle_of_sending_it_is_refused(bob, monkeypatch):
    p = bob.send(torch.ones(1)).wait()
    with monkeypatch.context() as patch:
        patch.setattr(bob.link.outbox, "sending", True)
        for action in (p.item, p.fetch):
            with pytest.raises(fp.FedprocError, match="in the middle of sending"):
                action()
    assert p.item() == 1.0


def test_the_frees_of_dropped_pointers_ride_in_front(bob, asked):
    p, dropped = bob.send(torch.ones(1)), collections.deque(bob.run(take) for _ in range(3))
    for action in (p.item, p.fetch, p.get):
        bob.run(take).wait()
        bob.link.outbox.tidy()
        ids = (dropped[0].id,)
        dropped.popleft()
        asked.clear()
        action()
        assert fields_of(asked[0])[0] == ids
    assert not dropped


# ---- errors and waiting


@pytest.mark.parametrize(
    "action",
    [
        lambda p: p.item(),
        lambda p: p.view(7).tolist(),
        lambda p: p.worker.run(divmod, 1, 0).get(),
        lambda p: torch.equal(p, p.view(7)),
        lambda p: bool(p),
    ],
)
def test_an_error_names_the_line_of_the_user(bob, action):
    p = bob.send(torch.ones(3))
    line, told = action.__code__.co_firstlineno, []
    for way in (action, lambda p: generally(lambda: action(p))):
        with pytest.raises(fp.RemoteError) as caught:
            way(p)
        assert f"{__file__}:{line} in <lambda>" in str(caught.value)
        told.append((type(caught.value), caught.value.args))
    assert told[0][0].__mro__[1:] == told[1][0].__mro__[1:]
    assert p.tolist() == [1.0, 1.0, 1.0]


def _sleep(seconds):
    threading.Event().wait(seconds)


def test_an_answer_that_comes_too_late_is_dropped(bob):
    bob.run(_sleep, 0.3)
    p = bob.run(abs, -7)
    for action in (p.get, p.fetch):
        with pytest.raises(fp.CommandTimeoutError):
            action(timeout=0.01)
    assert p.get() == 7
    assert (bob.link.inbox._answers, bob.link.inbox._abandoned) == ({}, set())


@pytest.mark.parametrize("way", [lambda action: action(), generally])
def test_ctrl_c_right_after_a_question_was_sent_leaves_no_answer(bob, monkeypatch, way):
    p = bob.send(torch.ones(1))

    def sent():
        with monkeypatch.context() as patch:
            patch.setattr(reading, "computed", _interrupted)
            p.item()

    with pytest.raises(KeyboardInterrupt):
        way(sent)
    assert p.item() == 1.0
    assert (bob.link.inbox._answers, bob.link.inbox._abandoned) == ({}, set())


def _interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", [("__exit__", "get"), ("__exit__", "late"), ("_take", "get")])
def test_ctrl_c_where_an_object_is_taken_or_given_back_leaves_it_to_others(bob, at):
    """As a signal that comes at the first instruction of a function."""
    name, how = at
    p = bob.run(_sleep, 0.2) if how == "late" else bob.send([1]).wait()
    fetch = p._handle

    def trace(frame, event, arg):
        code = frame.f_code
        if code.co_name == name and code.co_filename.endswith("remote/handle.py"):
            sys.settrace(None)
            raise KeyboardInterrupt

    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt):
            p.get(timeout=0.01 if how == "late" else None)
    finally:
        sys.settrace(None)
    assert fetch.taker() is None
    if name == "_take" or how == "late":
        assert p.get() == (None if how == "late" else [1])
    else:
        with pytest.raises(fp.ObjectGoneError):
            p.get()


def test_arguments_that_are_no_tuple_are_left(bob):
    p = bob.send(torch.ones(2))
    kind = type("T", (tuple,), {})
    for arguments in ([p, p], kind((p, p))):
        assert type(p).__torch_function__(torch.equal, (), arguments) is True
        assert type(p).__torch_function__(torch.add, (), arguments).tolist() == [2.0, 2.0]


def test_threads_get_their_own_answers(bob):
    found = [[] for _ in range(4)]

    def work(at):
        p = bob.send(torch.tensor(float(at)))
        for number in range(300):
            found[at] += [p.item() == at, bob.run(abs, -number).get() == number]

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [set(each) for each in found] == [{True}] * 4


def test_a_thousand_questions_keep_nothing(bob):
    p, log, number = bob.send(torch.ones(1)), bob.send("é" * 90), 2**62 + 1
    things = [p, p._handle, log, log._handle, bob, bob.link, bob.link.outbox, bob.link.inbox]
    things += [number, bob.link.outbox.borrows, fp.Cluster, type(p._handle)]

    def work():
        p.item(), log.fetch(), bob.run(abs, number).get(), torch.equal(p, p)
        with pytest.raises(fp.RemoteError):
            p.view(7).item()

    require_nothing_kept(bob.link, things, work)
    assert (bob.link.inbox._answers, bob.link.outbox.borrows.reading) == ({}, {})
