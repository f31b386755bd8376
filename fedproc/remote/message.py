"""A command ready to be numbered and sent. Runs in the parent."""

import pickle
from typing import Any, NamedTuple

from fedproc.memory.tensors import Exporter
from fedproc.wire import frames


class Message(NamedTuple):
    """A command without a number."""

    record: type[Any]
    flags: int
    body: bytes
    what: str  # for errors: the operation, as a user would call it
    writes: bool = False  # it can change existing tensors: waits while one is borrowed
    exporter: Exporter | None = None  # holds blocks of our arena until it is executed
    definitions: dict[bytes, bytes] | None = None  # code it refers to, by digest


def call_message(record: type[Any], flags: int, body: bytes, what: str, writes: bool) -> Message:
    """A message that refers to nothing outside itself; past the constructor, which costs more."""
    return _new(Message, (record, flags, body, what, writes, None, None))


_new = tuple.__new__


def plain(record: Any, what: str) -> Message:
    """A message that refers to nothing outside itself."""
    return Message(type(record), frames.PLAIN, pickle.dumps(tuple(record), protocol=5), what)
