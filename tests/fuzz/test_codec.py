"""Whatever is sent arrives; whatever else is in the stream ends the worker with a clear error."""

import io
import pickle
import socket
import struct
import tracemalloc
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedproc as fp
from fedproc.memory.arena import Arena, Mapped
from fedproc.memory.tensors import Exporter, Packer, place_bytes, read_place, rebuild
from fedproc.transport.channel import Channel
from fedproc.wire import commands, frames
from fedproc.wire.codec import Decoder, Encoder
from tests.contract.things import eventually
from tests.fuzz.amount import amount

MOST_BYTES = 4 << 20  # of Python objects, whatever a stream of a few KiB says

# ---------------------------------------------------------------- whatever is sent arrives

DTYPES = [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64,
          torch.float16, torch.bfloat16]  # fmt: skip
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.binary(max_size=50), st.complex_numbers(),
)  # fmt: skip


@st.composite
def tensors(draw):
    """A tensor of any dtype and layout, small or through the arena; some need gradients."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.sampled_from([(), (0,), (1,), (5,), (2, 3), (3, 0, 2), (70, 90), (2, 3, 4)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    tensor = torch.randint(0, 99, shape, generator=generator).to(dtype)
    change = draw(st.sampled_from(["as it is", "turned", "stepped", "expanded", "leaf"]))
    if change == "turned":
        return tensor.transpose(0, -1) if tensor.ndim else tensor
    if change == "stepped":
        return tensor[::2] if tensor.ndim else tensor
    if change == "expanded":
        return tensor.expand(3, *shape)
    if change == "leaf" and (dtype.is_floating_point or dtype.is_complex):
        tensor.requires_grad_()
        if draw(st.booleans()):
            tensor.grad = torch.ones_like(tensor)
    return tensor


VALUES = st.recursive(
    PLAIN | tensors(),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=5), inner, max_size=4),
    ),
    max_leaves=12,
)


def equal(one, two) -> bool:
    """The same types, values, gradients; NaN equals itself."""
    if type(one) is not type(two):
        return False
    if isinstance(one, torch.Tensor):
        return (
            (one.dtype, one.shape, one.requires_grad) == (two.dtype, two.shape, two.requires_grad)
            and torch.equal(one, two)
            and equal(one.grad, two.grad)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    if isinstance(one, dict):
        return list(one) == list(two) and all(equal(one[key], two[key]) for key in one)
    return repr(one) == repr(two)


@amount(150)
@given(VALUES)
def test_anything_comes_out_as_it_went_in(value):
    arena = Arena("codec", 64 << 20)
    mapped = Mapped(arena.fd, arena.size_bytes)
    packer, exporter = Packer(), Exporter(arena)
    body = Encoder({torch.Tensor: packer.add}).encode(value)
    table = pickle.loads(pickle.dumps(packer.table(exporter)))

    def load(place):
        target = torch.empty(place_bytes(place), dtype=torch.uint8)
        return read_place(place, mapped.view, target)

    loaded = rebuild(table, load)
    found = Decoder(io.BytesIO(body), lambda place: loaded[-place], {}).load()
    assert equal(found, value)
    exporter.release()
    assert arena.used_bytes == 0
    mapped.close()
    arena.close()


@pytest.mark.parametrize("transport", ["inline", "process"])
def test_anything_sent_comes_home(transport):
    with fp.Cluster(1, transport=transport) as cluster:
        (worker,) = cluster

        @amount(60)
        @given(VALUES)
        def check(value):
            pointer = worker.send(value)
            assert equal(pointer.fetch(), value)
            assert equal(pointer.get(), value)

        check()
        assert len(worker.objects) == 0


# ---------------------------------------------------------------- whatever else is in a stream

HEADS = st.tuples(
    st.sampled_from([frames.VERSION, 0, 255]),
    st.integers(0, 255),
    st.integers(0, 65535),
    st.sampled_from([0, 1, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]),
    st.integers(0, 2**64 - 1),
    st.booleans(),
)


def head(version, kind, flags, length, sequence, honest) -> bytes:
    check = length ^ 0xFFFFFFFF if honest else length
    return struct.pack("<BBHIQI", version, kind, flags, length, sequence, check)


GARBAGE = st.one_of(st.binary(max_size=400), HEADS.map(lambda fields: head(*fields)))


class Wire:
    """A channel whose other end is in our hands."""

    def __init__(self) -> None:
        here, self.there = socket.socketpair()
        self.channel = Channel(here)

    def close(self) -> None:
        self.there.close()
        self.channel.close()


@amount(300)
@given(st.lists(GARBAGE, max_size=6))
def test_garbage_costs_no_memory_and_ends_or_waits(pieces):
    wire = Wire()
    tracemalloc.start()
    found = []
    with suppress(frames.ProtocolError):
        for piece in pieces:
            wire.there.sendall(piece)
            wire.channel.receive(found.append)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    wire.close()
    assert peak < MOST_BYTES
    assert sum(len(frame.body) for frame in found) <= sum(map(len, pieces))


def a_call() -> bytes:
    record = commands.Call("operator.add", (1, 2), {}, None)
    return frames.pack(
        commands.KIND[commands.Call],
        frames.PLAIN | frames.KEEP,
        1_000_000,
        pickle.dumps(tuple(record), protocol=5),
    )


BODIES = [
    b"", b"\x80", b"garbage", pickle.dumps(()), pickle.dumps((1,)), pickle.dumps(7),
    pickle.dumps(("operator.add",) * 40), b"\xff" * 100, pickle.dumps({"a": 1})[:-3],
]  # fmt: skip


def ended(worker):
    eventually(lambda: not worker.alive)
    with pytest.raises(fp.WorkerLostError, match=worker.name):
        worker.objects  # noqa: B018 - the look is what raises


@pytest.mark.faults
@pytest.mark.parametrize("transport", ["inline", "process"])
@pytest.mark.parametrize(
    "stream",
    [
        b"\x00" * 64,
        b"\xff" * 64,
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        head(frames.VERSION, 0, 0, 1 << 31, 1, True),
        head(frames.VERSION, 0, 0, 8, 1, False) + b"x" * 8,
        head(frames.VERSION, 99, frames.PLAIN, 0, 1_000_000, True),
    ],
    ids=["zeros", "ones", "http", "hostile length", "wrong check", "unknown kind"],
)
def test_a_worker_that_reads_garbage_ends_and_the_parent_says_so(transport, stream, capfd):
    with fp.Cluster(["alice", "bob"], transport=transport) as cluster:
        alice, bob = cluster
        pointer = bob.send([1])
        bob.link.channel.append(stream)
        bob.link.flush()
        ended(bob)
        with pytest.raises(fp.WorkerLostError):
            pointer.get()
        assert alice.run(abs, -1).get() == 1
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.faults
@pytest.mark.parametrize("transport", ["inline", "process"])
def test_a_body_that_cannot_be_read_fails_that_command_only(transport):
    cluster = fp.Cluster(1, transport=transport)
    (worker,) = cluster
    number = 1_000_000
    for kind, record in enumerate(commands.COMMANDS):
        for body in BODIES if record is not commands.Stop else ():
            for flags in (0, frames.PLAIN, frames.HAS_TENSORS, frames.FREES):
                number += 1
                worker.link.channel.append(frames.pack(kind, flags, number, body))
    worker.link.flush()
    eventually(lambda: worker.alive and worker.link.inbox.executed >= number)
    cluster.close()


REPLIES = {
    "zeros": b"\x00" * 64,
    "hostile length": head(frames.VERSION, 0, 0, 1 << 31, 1, True),
    "wrong check": head(frames.VERSION, 0, 0, 8, 1, False) + b"x" * 8,
    "unknown kind": frames.pack(99, frames.PLAIN, 1, b""),
    "unreadable failure": frames.pack(commands.KIND[commands.Failed], frames.PLAIN, 1, b"no"),
    "failure without fields": frames.pack(
        commands.KIND[commands.Failed], frames.PLAIN, 1, pickle.dumps((1,))
    ),
}


@pytest.mark.faults
@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
def test_a_worker_that_writes_garbage_is_lost_and_the_others_go_on(reply):
    with fp.Cluster(["alice", "bob"], transport="inline") as cluster:
        alice, bob = cluster
        wire = Wire()
        theirs, bob.link.channel._sock = bob.link.channel._sock, wire.channel._sock
        bob.link.hub.remove(bob.link)
        bob.link.hub.add(bob.link)
        wire.there.sendall(reply)
        ended(bob)
        assert alice.run(abs, -1).get() == 1
        theirs.close()
        wire.close()


@pytest.mark.faults
@pytest.mark.parametrize("cut", [1, frames.HEADER.size - 1, frames.HEADER.size, -1])
def test_a_stream_that_ends_inside_a_frame_is_a_lost_worker(cut):
    reply = frames.pack(commands.KIND[commands.Value], frames.PLAIN, 1, b"the answer")
    with fp.Cluster(["bob"], transport="inline") as cluster:
        (bob,) = cluster
        wire = Wire()
        theirs, bob.link.channel._sock = bob.link.channel._sock, wire.channel._sock
        bob.link.hub.remove(bob.link)
        bob.link.hub.add(bob.link)
        wire.there.sendall(reply[:cut])
        assert bob.alive
        wire.there.close()
        ended(bob)
        theirs.close()
        wire.close()


@pytest.mark.faults
@pytest.mark.parametrize("body", BODIES)
def test_an_answer_that_cannot_be_read_is_a_lost_worker(body):
    with fp.Cluster(["bob"], transport="inline") as cluster:
        (bob,) = cluster
        value = commands.KIND[commands.Value]
        bob.link.inbox.take(frames.Frame(value, frames.PLAIN, 1_000_000, body))
        if body in (pickle.dumps((1,)), pickle.dumps(("operator.add",) * 40)):
            return  # a tuple like any other
        with pytest.raises(fp.WorkerLostError, match="cannot be read"):
            bob.link.answer(1_000_000, "fetch")
        ended(bob)


@pytest.mark.faults
def test_flipped_bits_of_a_head_never_hang_a_worker():
    """Each flip: the call fails, means something else, or the worker is lost; never silence."""
    frame = a_call()
    longer = {32 + bit for bit in range(32)}  # of the length: the check word does not fit
    cluster = fp.Cluster(["bob"], transport="inline", restart=True)
    for bit in range(8 * frames.HEADER.size):
        broken = bytearray(frame)
        broken[bit // 8] ^= 1 << bit % 8
        bob = cluster["bob"]
        bob.link.channel.append(bytes(broken))
        bob.link.flush()
        eventually(lambda bob=bob: not bob.alive or bob.link.inbox.executed > 0)
        assert bob.alive is False or bit not in longer
        bob.kill()
    cluster.close()
