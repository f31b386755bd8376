"""Frames: how commands and replies are cut out of a byte stream. Used on both sides.

A frame is a 20-byte header and a body::

    version  u8    refused when it is not ours
    kind     u8    which command or reply
    flags    u16   see the constants below
    length   u32   bytes of the body
    sequence u64   commands: number of the command; replies: number of the command answered
    check    u32   complement of length: a stream out of step is noticed at once
"""

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

VERSION = 1
HEADER = struct.Struct("<BBHIQI")
LARGEST_BODY_BYTES = 1 << 31

HAS_TENSORS = 1
"""Flag: the body starts with a table of the tensors it refers to."""
PLAIN = 2
"""Flag: the body refers to nothing outside itself; the ordinary unpickler will do."""
SHARED = 4
"""Flag: the receiver keeps the tensors of this message in its arena."""
KEEP = 8
"""Flag: the result of this call is kept as an object."""
FREES = 16
"""Flag: in front of the body stand ids that nobody holds any more: a count (u16), then u64 each."""
MOST_FREES = 1024
WHOLE = 1 << 63
"""Bit of an id to free: the object was taken home or moved, and all its ids go."""

EXPORTED = 32
"""Flag of an answer: its blocks are held until ``Release``."""
RECORD = 64
"""Flag of an answer: a record: its name, place, dtype and shape of its tensor, plain values."""

_pack_header = HEADER.pack
_COUNT = struct.Struct("<H")
_ONE_ID = struct.Struct("<HQ")


class ProtocolError(Exception):
    """The stream does not hold a frame where one must be; the connection is of no use any more."""


class Frame(NamedTuple):
    """One message."""

    kind: int
    flags: int
    sequence: int
    body: bytes


def pack(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """The bytes of a frame.

    Raises:
        ValueError: the body is 2 GiB or larger (tensors never are: they go through the arena).
    """
    length = len(body)
    if length >= LARGEST_BODY_BYTES:
        raise ValueError(f"a message of {length} bytes is too large; send large data as tensors")
    return _pack_header(VERSION, kind, flags, length, sequence, length ^ 0xFFFFFFFF) + body


def with_frees(ids: Sequence[int], body: bytes) -> bytes:
    """A body with ids to free in front; its frame needs the flag ``FREES``."""
    count = len(ids)
    if count == 1:  # a chain of operations drops one for each it makes
        return _ONE_ID.pack(1, ids[0]) + body
    return struct.pack(f"<H{count}Q", count, *ids) + body


def split_frees(body: bytes) -> tuple[tuple[int, ...], bytes]:
    """The ids in front of a body, and the body."""
    (count,) = _COUNT.unpack_from(body)
    if count == 1:
        return _ONE_ID.unpack_from(body)[1:], body[_ONE_ID.size :]
    start = _COUNT.size + 8 * count
    return struct.unpack_from(f"<{count}Q", body, _COUNT.size), body[start:]


def missing(data: bytes, start: int) -> int:
    """How many bytes must follow ``data`` until the frame, or header, cut off in it is whole."""
    have = len(data) - start
    if have < HEADER.size:
        return HEADER.size - have
    return HEADER.size + int(HEADER.unpack_from(data, start)[3]) - have


def cut_in_python(data: bytes, start: int) -> tuple[Frame, int] | None:
    """The frame that begins at ``start``, and where it ends; None if it is not whole.

    Raises:
        ProtocolError: wrong version, wrong check word, or an impossible length.
    """
    if len(data) - start < HEADER.size:
        return None
    version, kind, flags, length, sequence, check = HEADER.unpack_from(data, start)
    if version != VERSION or check != length ^ 0xFFFFFFFF or length >= LARGEST_BODY_BYTES:
        raise ProtocolError(f"no frame at byte {start}: version {version}, length {length}")
    end = start + HEADER.size + length
    if end > len(data):
        return None
    return Frame(kind, flags, sequence, data[start + HEADER.size : end]), end


cut: Callable[[bytes, int], tuple[Frame, int] | None] = cut_in_python
"""The same, compiled where there was a C compiler."""
try:
    from fedproc.wire import _frames
except ImportError:  # not built: where there was no C compiler
    pass
else:
    _classes = {"frame_class": Frame, "protocol_error": ProtocolError}
    _frames.prepare(_classes, (VERSION, LARGEST_BODY_BYTES))
    cut = _frames.cut
