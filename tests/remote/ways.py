"""The two ways of a flat call in the parent: what they send, and what they note."""

import collections
import gc
import pickle
import struct
import sys

import pytest

from fedproc.remote import flat
from fedproc.wire import commands, frames

CALL = commands.KIND[commands.Call]
QUESTIONS = commands.KIND[commands.Compute], commands.KIND[commands.Fetch]


def take(*args):
    """Any arguments do."""
    return len(args)


class Recording(collections.deque):
    """The queue of a channel; the frames of calls and of questions are kept."""

    def __init__(self, frames_so_far):
        super().__init__(frames_so_far)
        self.seen, self.asked = [], []

    def append(self, frame):
        found, _ = frames.cut(frame, 0)
        if found.kind == CALL:
            self.seen.append(found)
        if found.kind in QUESTIONS:
            self.asked.append(found)
        super().append(frame)


def generally(action):
    """What the action gives without the compiled way."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("submit", "ask", "fetch"):
            patch.setattr(flat, name, lambda *_: None)
        return action()


def state(link):
    """All that a call changes."""
    box = link.outbox
    counts = box.writes, box.submitted, box.last, box.sending, repr(box._numbers)
    return counts, list(link.inbox.expected), list(box.handles), list(box.trash), list(box._held)


def fields_of(frame):
    """Ids that are freed, and the fields of a call."""
    freed, body = frames.split_frees(frame.body) if frame.flags & frames.FREES else ((), frame.body)
    return freed, pickle.loads(body)


def exact(value):
    """Distinguishes what compares equal: 1 and True, 0.0 and -0.0; and nan is nan."""
    if isinstance(value, tuple):
        return [exact(item) for item in value]
    return type(value), struct.pack("<d", value) if isinstance(value, float) else value


def require_nothing_kept(link, things, work):
    """Whatever is done hundreds of times, these have as many references as before."""

    def counted():
        for _ in range(500):
            work()
        link.wait(link.outbox.last, None, "wait")
        link.outbox.tidy()
        gc.collect()
        return [sys.getrefcount(thing) for thing in things], len(gc.get_objects())

    counted()
    (counts, objects), (counts_later, objects_later) = counted(), counted()
    # the janitor may hold a few of them just now
    assert all(abs(later - count) < 20 for count, later in zip(counts, counts_later, strict=True))
    assert abs(objects_later - objects) < 100
