"""Frames: whole ones come out, however the stream is cut; anything else is noticed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedproc.wire import commands, frames
from fedproc.worker.handlers import HANDLERS

FRAMES = st.lists(
    st.tuples(
        st.integers(0, 255),
        st.integers(0, 65535),
        st.integers(0, 2**64 - 1),
        st.binary(max_size=50),
    ),
    max_size=8,
)


CUTS = {"python": frames.cut_in_python, "compiled": frames.cut}
each_way = pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)


def unpack(stream, cut):
    """Every whole frame from the beginning on."""
    found, end = [], 0
    while (one := cut(stream, end)) is not None:
        frame, end = one
        assert type(frame) is frames.Frame
        found.append(tuple(frame))
    return found


@each_way
@given(FRAMES)
def test_round_trip(cut, messages):
    stream = b"".join(frames.pack(*message) for message in messages)
    assert unpack(stream, cut) == messages


@each_way
@given(FRAMES, st.integers(0, 400))
def test_a_cut_stream_gives_the_whole_frames_before_the_cut(cut, messages, length):
    stream = b"".join(frames.pack(*message) for message in messages)
    whole, end = [], 0
    for message in messages:
        end += frames.HEADER.size + len(message[3])
        whole += [message] if end <= length else []
    assert unpack(stream[:length], cut) == whole


@each_way
@given(st.binary(min_size=frames.HEADER.size, max_size=100))
def test_garbage_is_noticed_or_incomplete(cut, data):
    try:
        found = unpack(data, cut)
    except frames.ProtocolError:
        return
    assert sum(frames.HEADER.size + len(body) for *_, body in found) <= len(data)


@given(st.binary(max_size=60), st.integers(0, 70))
def test_both_ways_say_the_same(data, start):
    told = []
    for cut in CUTS.values():
        try:
            told.append(cut(data, start))
        except frames.ProtocolError as error:
            told.append(str(error))
    assert told[0] == told[1]


@given(st.lists(st.integers(1, 2**64 - 1), min_size=1, max_size=20), st.binary(max_size=20))
def test_ids_ride_in_front_of_a_body(ids, body):
    assert frames.split_frees(frames.with_frees(ids, body)) == (tuple(ids), body)


@each_way
def test_another_version_is_refused(cut):
    data = bytearray(frames.pack(1, 0, 7, b"body"))
    data[0] += 1
    with pytest.raises(frames.ProtocolError, match="version"):
        cut(bytes(data), 0)


def test_a_body_of_two_gibibytes_is_refused():
    class Huge(bytes):
        def __len__(self):
            return frames.LARGEST_BODY_BYTES

    with pytest.raises(ValueError, match="too large"):
        frames.pack(1, 0, 1, Huge())


def test_every_command_has_its_handler():
    names = [record.__name__.lower() for record in commands.COMMANDS]
    assert [handler.__name__.rstrip("_") for handler in HANDLERS] == names
