"""Looking for an answer without sleeping goes on only while it pays."""

import itertools
import select
import socket

import pytest

from fedproc.transport.channel import Lookout


class Counted:
    """A poll object that counts how often it is asked."""

    def __init__(self, sock):
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self.asked = 0

    def poll(self, milliseconds):
        self.asked += 1
        return self._poll.poll(milliseconds)


@pytest.fixture
def stream():
    here, there = socket.socketpair()
    with here, there:
        yield Counted(here), there, here


def looks(lookout, poll):
    """Whether it looked more than once."""
    before = poll.asked
    lookout.look(poll)
    return poll.asked > before + 1


def test_what_is_there_is_seen_at_once(stream):
    poll, there, here = stream
    there.send(b"x")
    assert Lookout(10.0).look(poll) == [(here.fileno(), select.POLLIN)]
    assert poll.asked == 1


def test_looks_in_vain_become_rare_and_stay_so_up_to_a_limit(stream):
    poll, _, _ = stream
    lookout = Lookout(0.001)
    looked = [place for place in range(100) if looks(lookout, poll)]
    gaps = [after - before for before, after in itertools.pairwise(looked)]
    assert gaps[:4] == [3, 5, 9, 17]
    assert set(gaps[4:]) == {17}


def test_a_look_that_pays_is_followed_by_others(stream):
    poll, there, here = stream
    lookout = Lookout(0.001)
    while not looks(lookout, poll):
        pass
    for _ in range(2):  # in vain: two waits without a look
        assert not looks(lookout, poll)

    class Arriving(Counted):
        def poll(self, milliseconds):
            if self.asked == 2:
                there.send(b"x")
            return super().poll(milliseconds)

    assert lookout.look(Arriving(here)) == [(here.fileno(), select.POLLIN)]
    here.recv(1)
    assert looks(lookout, poll)


def test_no_longer_than_it_is_told(stream):
    poll, _, _ = stream
    assert Lookout(1000.0).look(poll, 0.001) == []
