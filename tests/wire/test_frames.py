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


@given(FRAMES)
def test_round_trip(messages):
    stream = b"".join(frames.pack(*message) for message in messages)
    assert [tuple(frame) for frame, _ in frames.unpack(stream, 0)] == messages


@given(FRAMES, st.integers(0, 400))
def test_a_cut_stream_gives_the_whole_frames_before_the_cut(messages, cut):
    stream = b"".join(frames.pack(*message) for message in messages)[:cut]
    found = [tuple(frame) for frame, _ in frames.unpack(stream, 0)]
    assert found == messages[: len(found)]


@given(st.binary(min_size=frames.HEADER.size, max_size=100))
def test_garbage_is_noticed_or_incomplete(data):
    try:
        found = list(frames.unpack(data, 0))
    except frames.ProtocolError:
        return
    assert sum(frames.HEADER.size + len(frame.body) for frame, _ in found) <= len(data)


@given(st.lists(st.integers(1, 2**64 - 1), min_size=1, max_size=20), st.binary(max_size=20))
def test_ids_ride_in_front_of_a_body(ids, body):
    assert frames.split_frees(frames.with_frees(ids, body)) == (tuple(ids), body)


def test_another_version_is_refused():
    data = bytearray(frames.pack(1, 0, 7, b"body"))
    data[0] += 1
    with pytest.raises(frames.ProtocolError, match="version"):
        list(frames.unpack(bytes(data), 0))


def test_a_body_of_two_gibibytes_is_refused():
    class Huge(bytes):
        def __len__(self):
            return frames.LARGEST_BODY_BYTES

    with pytest.raises(ValueError, match="too large"):
        frames.pack(1, 0, 1, Huge())


def test_every_command_has_its_handler():
    names = [record.__name__.lower() for record in commands.COMMANDS]
    assert [handler.__name__.rstrip("_") for handler in HANDLERS] == names
