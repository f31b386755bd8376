"""Flat calls in the parent: the compiled step sends and notes what the general way does."""

import contextlib
import os
import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedproc as fp
from fedproc.remote import flat
from fedproc.remote.pending import PendingPointer
from fedproc.wire import frames
from tests.remote.ways import exact, fields_of, generally, require_nothing_kept, take

compiled_only = pytest.mark.skipif(not flat.COMPILED, reason="the compiled way was not built")


NAME = f":{take.__module__}:take"


@pytest.fixture
def cluster(quiet_cluster):
    return quiet_cluster


# ---- what is sent

EDGES = [0, 255, 256, 2**31, 2**63, 2**64, 10**30]
INTS = st.integers() | st.builds(
    lambda edge, sign, more: sign * edge + more,
    st.sampled_from(EDGES), st.sampled_from([1, -1]), st.integers(-2, 2),
)  # fmt: skip
LENGTHS = st.sampled_from([0, 1, 254, 255, 256, 257, 1000, 70_000])
TEXTS = st.text() | st.builds(lambda n, c: n * c, LENGTHS, st.sampled_from("aéλ𝄞\ud800\0"))
PLAIN = st.one_of(
    INTS, st.floats(), st.sampled_from([5e-324, -0.0, float("nan"), float("-inf")]), st.booleans(),
    st.none(), TEXTS, st.binary(), LENGTHS.map(bytes),
)  # fmt: skip
ARGUMENTS = st.lists(PLAIN | st.sampled_from([Ellipsis, NotImplemented]), max_size=20)


def test_both_ways_send_the_same(bob, sent):
    pointers = {Ellipsis: bob.send(1), NotImplemented: bob.send(torch.ones(1))}

    def check(drawn):
        args = [pointers.get(a, a) for a in drawn]
        places = tuple(at for at, a in enumerate(drawn) if a in pointers)
        sent.clear()
        made = bob.run(take, *args), generally(lambda: bob.run(take, *args))
        one, other = sent
        ids = tuple(arg.id if at in places else arg for at, arg in enumerate(args))
        assert exact(fields_of(one)[1]) == exact((NAME, ids, {}, None, False, places))
        assert exact(fields_of(other)[1]) == exact(fields_of(one)[1])
        kept = frames.KEEP | frames.PLAIN
        assert [frame.flags & ~frames.FREES for frame in sent] == [kept, kept]
        assert [pointer.id for pointer in made] == [one.sequence, other.sequence]
        assert [pointer.get() for pointer in made] == [len(args), len(args)]

    for edge in EDGES:
        for number in range(edge - 2, edge + 3):
            check([number])
            check([-number])
    settings(max_examples=200)(given(ARGUMENTS)(check))()


FITS = {
    "no arguments": ((), True), "16 arguments": ((1,) * 16, True),
    "17 arguments": ((1,) * 17, False),
    "the largest number": ((2**63 - 1,), True), "a larger one": ((2**63,), False),
    "the smallest number": ((-(2**63),), True), "a smaller one": ((-(2**63) - 1,), False),
    "255 bytes of text": (("é" * 127 + "a",), True), "256 bytes of text": (("é" * 128,), False),
    "a surrogate": (("\ud800",), False), "255 bytes": ((b"a" * 255,), True),
    "256 bytes": ((b"a" * 256,), False), "three texts": (("a" * 255,) * 3, True),
    "four texts": (("a" * 255,) * 4, False),
    "a class of text": ((type("T", (str,), {})("a"),), False),
    "a class of number": ((type("N", (int,), {})(1),), False), "a list": (([1],), False),
}  # fmt: skip


@compiled_only
@pytest.mark.parametrize("case", FITS)
def test_what_has_room_is_taken_at_once(bob, ways, case):
    args, fits = FITS[case]
    bob.run(take)
    made = flat.submit(PendingPointer, bob.link, take, args, None, True, False)
    assert (type(made), ways) == (PendingPointer if fits else type(None), [True, fits])
    if "class" not in case:
        assert bob.run(take, *args).get() == len(args)


def test_operators_and_functions_of_torch_send_the_same(bob, sent, ways):
    p = bob.send(torch.ones(2, 2))
    for action in (
        lambda: p + 1, lambda: 2.5 - p, lambda: p @ p, lambda: -p, lambda: p < p, lambda: p.t(),
        lambda: torch.relu(p), lambda: p.sum(0), lambda: p.copy(), lambda: p.view(4, 1),
    ):  # fmt: skip
        sent.clear()
        ways.clear()
        action(), generally(action)
        assert [one[1:] for one in map(fields_of, sent)] == 2 * [fields_of(sent[0])[1:]]
        assert sent[0].flags & ~frames.FREES == sent[1].flags & ~frames.FREES
        assert ways == [flat.COMPILED]


# ---- what is noted


@pytest.mark.parametrize("writes", [True, False])
def test_both_ways_leave_the_same_state(bob, writes):
    p, link = bob.send(torch.ones(2)), bob.link
    action = (lambda: bob.run(take, p)) if writes else (lambda: p * 2)
    line = action.__code__.co_firstlineno
    told, made = [], []
    for way in (lambda: action(), lambda: generally(action)):
        before, box = (link.outbox.writes, link.outbox.submitted), link.outbox
        pointer = way()
        made.append(pointer)
        number, site, what = link.inbox.expected[-1]
        handle = pointer._handle
        assert number == box.last == handle.oid == handle.number == pointer.id
        assert box.handles[number]() is handle
        assert pointer._owner is True
        assert pointer._chain is None
        assert vars(handle) == {"link": link, "oid": number, "number": number}
        assert str(site) == f"{__file__}:{line} in <lambda>"
        assert (type(site.code), type(what)) == (type(take.__code__), str)
        counts = box.writes - before[0], box.submitted - before[1], box.sending
        told.append((counts, what, type(pointer), type(link.inbox.expected[-1]), type(site)))
    assert told[0] == told[1]
    assert told[0][:2] == ((int(writes), 1, False), "take" if writes else "*")
    assert made[1].id == made[0].id + 1
    assert made[0]._handle is not made[1]._handle


def test_a_call_made_when_the_code_of_the_one_before_ends_keeps_its_own_place(bob):
    """The place of the last call is kept; who is told of its end may make another call."""
    p, made = bob.send(torch.ones(2)), []
    code = compile("p * 2", "<user>", "exec")
    told = weakref.ref(code, lambda _: made.append(p * 3))
    exec(code, {"p": p})
    bob.link.wait(bob.link.outbox.last, None, "wait")  # then only the kept place has the code
    del code
    made.append(p + 1)
    assert told() is None
    assert len(made) == 2
    place = bob.link.inbox.expected[-1][1]
    assert place.code is sys._getframe().f_code
    assert place.line == place.code.co_firstlineno + 8


# ---- without the compiled modules

SCRIPT = """
import sys, torch, fedproc as fp
from fedproc.remote import flat

def compiled():
    from fedproc.wire import frames
    from fedproc.worker import flat
    return flat._flat is not None, frames.cut is not frames.cut_in_python

with fp.Cluster(["bob"]) as cluster:
    bob = cluster["bob"]
    sys.stderr.write(f"{(flat.COMPILED, *bob.run(compiled).get())}")
    p = bob.send(torch.arange(4.0))
    print(type(p).__name__, (p * 2).fetch(), (p @ p).item(), torch.relu(-p).get())
    print(bob.run(divmod, 17, 5).get())
    print(bob.run(max, "é", "a").get(), bob.run(pow, 2, 70).get(), p.view(2, 2).t().shape)
    log = bob.send([])
    log.append(b"1"), log.append(None)
    print(log.get(), len(bob.objects))
    for bad in (p.view(7), bob.run(divmod, 1, 0), p + torch.nn.Parameter):
        try:
            bad.get()
        except Exception as error:
            print(type(error).__mro__, error)
"""
WITHOUT = """
import sys
for name in ("remote._flat", "worker._flat", "wire._frames"):
    sys.modules[f"fedproc.{name}"] = None
"""


def started(*path):
    """An interpreter with the script."""
    path = os.pathsep.join([*map(str, path), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_everything_is_the_same_without_the_compiled_modules(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)  # in the interpreters of workers, too
    with started() as as_it_is, started(tmp_path) as without:
        (told, used), found = (process.communicate(timeout=50) for process in (as_it_is, without))
    assert found == (told, "(False, False, False)")
    assert "(3, 2)" in told
    assert used == "(True, True, True)" or not flat.COMPILED


# ---- nothing is kept


def test_a_thousand_calls_keep_nothing(bob):
    text, number, many, p = "é" * 90, 2**62 + 1, b"m" * 200, bob.send(torch.ones(2))
    things = [text, number, many, p, p._handle, take, bob, bob.link, take.__code__, bob.link.outbox]
    things += [bob.link.inbox, bob.link.channel, PendingPointer, fp.Cluster, type(p._handle)]

    def work():
        bob.run(take, text, number, many, p, 0.5, None, True)
        p + number
        bob.run(take, [text])
        with contextlib.suppress(fp.PlacementError):
            p + torch.ones(1)

    require_nothing_kept(bob.link, things, work)
