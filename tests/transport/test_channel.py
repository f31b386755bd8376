"""The channel: short reads and writes, full sockets, the end of the stream."""

import socket
import threading

import pytest

from fedproc.transport.channel import Channel
from fedproc.wire import frames
from fedproc.wire.frames import HEADER


@pytest.fixture
def pair():
    one, other = (Channel(sock) for sock in socket.socketpair())
    yield one, other
    one.close()
    other.close()


def _receive(channel, count):
    found = []
    while len(found) < count and not channel.ended:
        channel.receive(found.append)
    return found


def test_frames_arrive_in_order(pair):
    here, there = pair
    for number in range(1000):
        here.append(frames.pack(1, 0, number, b"x" * (number % 7)))
    assert here.flush() is True
    found = _receive(there, 1000)
    assert [frame.sequence for frame in found] == list(range(1000))
    assert [len(frame.body) for frame in found] == [number % 7 for number in range(1000)]


def test_a_full_socket_does_not_block(pair):
    here, there = pair
    body = bytes(1 << 20)
    for number in range(40):
        here.append(frames.pack(1, 0, number, body))
    assert here.flush() is False
    assert here.unsent is True
    found = []
    while len(found) < 40:
        there.receive(found.append)
        here.flush()
    assert all(frame.body == body for frame in found)
    assert here.unsent is False


def test_a_large_frame_is_joined_once(pair):
    here, there = pair
    body = bytes(range(256)) * (1 << 16)
    here.append(frames.pack(1, 0, 1, body))
    here.append(frames.pack(1, 0, 2, b"next"))
    found, joined = [], []
    while len(found) < 2:
        here.flush()
        there.receive(found.append)
        if not joined or there._input[0] is not joined[-1]:
            joined.append(there._input[0])
    assert [frame.body for frame in found] == [body, b"next"]
    # what came first, until the frame was whole; nothing is kept of it then
    assert len(joined) == 2
    assert 0 < len(joined[0]) < len(body)
    assert there._input == (b"", 0, [], 0, 0)
    assert there.moved_bytes == here.moved_bytes == len(body) + len(b"next") + 2 * HEADER.size


@pytest.mark.parametrize("first", [1, HEADER.size - 1, HEADER.size, HEADER.size + 1])
def test_a_frame_that_comes_in_pieces_is_whole_when_its_last_byte_is_there(pair, first):
    here, there = pair
    stream = frames.pack(1, 0, 1, b"body") + frames.pack(1, 0, 2, b"")
    found, counts = [], []
    for piece in (stream[:first], *(stream[n : n + 1] for n in range(first, len(stream)))):
        here.append(piece)
        here.flush()
        there.receive(found.append)
        counts.append(len(found))
    whole = HEADER.size + len(b"body")
    assert counts == [
        int(n >= whole) + int(n == len(stream)) for n in range(first, len(stream) + 1)
    ]
    assert [frame.body for frame in found] == [b"body", b""]


class OneByte:
    """A socket that reads and writes one byte at a time."""

    def __init__(self, sock):
        self._sock = sock

    def recv(self, _size):
        return self._sock.recv(1)

    def send(self, data):
        return self._sock.send(data[:1])

    def __getattr__(self, name):
        return getattr(self._sock, name)


def test_one_byte_at_a_time():
    here, there = (Channel(OneByte(sock)) for sock in socket.socketpair())
    for number in range(5):
        here.append(frames.pack(2, 3, number, b"body"))
    here.flush()
    found = _receive(there, 5)
    assert [tuple(frame) for frame in found] == [(2, 3, number, b"body") for number in range(5)]
    here.close()
    there.close()


def test_the_end_of_the_stream_is_noticed(pair):
    here, there = pair
    here.append(frames.pack(1, 0, 1, b"last"))
    here.flush()
    here.close()
    found = []
    while not there.ended:
        there.receive(found.append)
    assert [frame.body for frame in found] == [b"last"]
    assert there.flush() is True


def test_an_interrupted_hand_over_is_taken_up_again(pair):
    here, there = pair
    for number in range(3):
        here.append(frames.pack(1, 0, number, b""))
    here.flush()
    seen = []

    def interrupted(frame):
        seen.append(frame.sequence)
        if frame.sequence == 1 and seen.count(1) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        there.receive(interrupted)
    there.resume(interrupted)
    assert seen == [0, 1, 1, 2]


def test_several_threads_may_append(pair):
    here, there = pair

    def write(first):
        for number in range(first, first + 500):
            here.append(frames.pack(1, 0, number, b""))
            here.flush()

    threads = [threading.Thread(target=write, args=(500 * place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    found = _receive(there, 2000)
    for thread in threads:
        thread.join()
    assert sorted(frame.sequence for frame in found) == list(range(2000))
