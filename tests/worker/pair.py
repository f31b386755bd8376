"""Two workers without processes that get the same frames; one has the compiled way."""

import io
import pickle
import re
import socket

import pytest
import torch

from fedproc import autocast
from fedproc.transport.base import WorkerSpec
from fedproc.transport.channel import Channel
from fedproc.wire import commands, frames
from fedproc.worker import flat
from fedproc.worker import loop as loops
from fedproc.worker.host import Host
from fedproc.worker.store import Domain, Entry

needs_compiled = pytest.mark.skipif(flat._flat is None, reason="the compiled way was not built")
CALL = commands.KIND[commands.Call]
COMPUTE = commands.KIND[commands.Compute]
FETCH = commands.KIND[commands.Fetch]
VALUE = commands.KIND[commands.Value]
REFUSAL = commands.KIND[commands.Refusal]
FAILED = commands.KIND[commands.Failed]
DONE = commands.KIND[commands.Done]
OURS = re.compile(r'Traceback.*\n|  File ".*/fedproc/wire/.*\n    .*\n( +[~^]+\n)?')


class Side:
    """A worker without a process: frames go in by hand."""

    def __init__(self):
        here, there = socket.socketpair()
        self.ends = [here, *socket.socketpair()]
        self.peer, self.replies, self.left = Channel(here), [], []
        spec = WorkerSpec("bob", 1, 1, 1 << 20, "cpu")
        self.host = Host(spec, Channel(there), self.ends.pop(), is_process=False)
        self.loop = loops.Loop(self.host, None, 0.0)
        self.loop._execute = self.general

    def general(self, frame):
        """What is left to the general way is noted."""
        self.left.append(frame.sequence)
        loops.Loop._execute(self.loop, frame)

    def told(self):
        """All replies so far."""
        self.host.channel.flush()
        self.peer.receive(self.replies.append)
        return [(f.kind, f.sequence, _as_users_see(pickle.loads(f.body))) for f in self.replies]

    def close(self):
        self.host.close()
        for end in self.ends:
            end.close()


def _as_users_see(fields):
    """Where fedproc looked for a name, or not, is not compared."""
    return tuple(
        f._replace(traceback=OURS.sub("", f.traceback)) if isinstance(f, commands.Failure) else f
        for f in fields
    )


def pickled(fields):
    """A pickle as the parent's compiled way writes it: not framed, and nothing is remembered."""
    written = io.BytesIO()
    pickler = pickle.Pickler(written, 5)
    pickler.fast = True
    pickler.dump(fields)
    body = written.getvalue()
    return body[:2] + body[11:] if body[2:3] == pickle.FRAME else body


class Pair:
    """The same frames for two workers; one of them has the compiled way."""

    def __init__(self):
        self.compiled, self.general = Side(), Side()
        self.number = 0

    def put(self, make, *, private=False):
        self.number += 1
        for side in (self.compiled, self.general):
            side.host.store.add(self.number, make(), Domain(private))
        return self.number

    def call(self, name, *args, ids=(), flags=frames.KEEP, frees=(), modes=None, private=False):
        fields = (name, args, {}, modes, private, ids)
        return self.give(pickled(fields), flags=flags, frees=frees)

    def ask(self, name, *args, ids=(), frees=(), modes=None, folding=False):
        fields = (name, args, {}, modes, folding, ids)
        return self.give(pickled(fields), kind=COMPUTE, flags=0, frees=frees)

    def fetch(self, oid, *, lent=False, frees=()):
        return self.give(pickled((oid, lent)), kind=FETCH, flags=0, frees=frees)

    def give(self, body, *, kind=CALL, flags=frames.KEEP, frees=(), number=None):
        if number is None:
            self.number += 1
            number = self.number
        flags |= frames.PLAIN | (frames.FREES if frees else 0)
        frame = frames.Frame(kind, flags, number, frames.with_frees(frees, body) if frees else body)
        self.compiled.loop.execute(frame)
        after = modes()
        self.general.loop._execute(frame)
        assert after == modes()
        assert state(self.compiled) == state(self.general)
        return number

    def value(self, oid):
        return self.compiled.host.store.entry(oid).value

    def entry(self, oid):
        return self.compiled.host.store.entry(oid)

    @property
    def failures(self):
        """(number, cause, name and message of the error) of all that failed."""
        told = [(n, *fields) for kind, n, fields in self.compiled.told() if kind == FAILED]
        return [(n, cause, f and f"{f.name}: {f.message}") for n, cause, f in told]

    def answers(self, number):
        """What each of the two has answered: the fields of its last reply."""
        for side in (self.compiled, self.general):
            kind, to, fields = side.told()[-1]
            assert (kind, to) == (VALUE, number)
            yield fields[0]

    @property
    def left(self):
        return self.compiled.left


def modes():
    """Of this thread: what a call leaves must be the same after each of the two."""
    depth = autocast.depth()
    return torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled(), depth


def shown(value):
    if isinstance(value, torch.Tensor):
        dense = value.detach().to_dense() if value.is_sparse else value.detach()
        return type(value), value.dtype, value.requires_grad, value.layout, dense.tolist()
    if isinstance(value, tuple | list):
        return type(value), [shown(item) for item in value]
    return type(value), value if isinstance(value, int | str) else repr(value)


def state(side):
    """All of it, with places instead of addresses: two sides are alike, or a test fails."""
    host, loop, domains, rows = side.host, side.loop, {}, {}

    def place(domain):
        at = domains.setdefault(id(domain), len(domains))
        return at, domain.private, domain._tainted, [place(source) for source in domain._sources]

    store = host.store
    for oid, entry in sorted(store._by_id.items()):
        if type(entry) is Entry:
            labels = entry.tags, entry.description, entry.open_shape
            kept = store._by_object.get(id(entry.value)) is entry
            rows[oid] = shown(entry.value), entry.ids, place(entry.domain), labels, kept
        else:
            rows[oid] = entry
    counts = host.commands, host.arena.done[0], loop._last, loop._reported, loop._unreported
    rest = loop._running, host.used, host.trouble, len(store._by_object), host.stopped
    return rows, counts, rest, side.told()


def made(monkeypatch):
    """A pair in which no command takes long."""
    monkeypatch.setattr(loops, "REPORT_SECONDS", 1e9)
    flat.prepared(loops.REPORT_COMMANDS, 1e9)
    pair = Pair()
    yield pair
    pair.compiled.close()
    pair.general.close()
    monkeypatch.undo()
    flat.prepared(loops.REPORT_COMMANDS, loops.REPORT_SECONDS)


def three():
    return torch.tensor([1.0, 2.0, 3.0])
