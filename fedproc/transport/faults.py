"""Faults at the boundaries of frames, for tests. Nothing imports this unless it is asked for.

The environment variable ``FEDPROC_FAULT`` holds rules, separated by ``;``, each of fields
separated by spaces. A cluster started while it is set has a ``FaultyChannel`` where a rule applies,
in the parent, in the worker (which gets the parent's environment), or both; every other channel is
the plain one, which knows nothing of this::

    in=worker on=write frame=Value n=3 do=cut bytes=7

======== ==================================================================================
in       ``parent`` or ``worker``: on whose side
worker   name of the worker whose connection is meant; all if not given
on       ``read`` or ``write``
frame    name of the record (``wire.commands``); any if not given
n        at the how-manieth such frame of the connection; 1 if not given
do       ``kill`` the process (an inline worker hangs up), ``eof`` (hang up), ``cut`` (write
         ``bytes`` of the frame, then hang up), ``garbage`` in front of the frame, ``dup``
         (the frame twice), ``delay`` by ``seconds``; ``short``: every call of the system on
         this connection moves one byte
bytes    of the frame that are still written before ``kill`` and ``cut``; 0 if not given
seconds  how long ``delay`` takes
======== ==================================================================================
"""

import functools
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from fedproc.transport.channel import Channel
from fedproc.wire import commands
from fedproc.wire.frames import HEADER, Frame, ProtocolError

_GARBAGE = b"\xff" * HEADER.size
_DEEDS = {
    "read": ("kill", "eof", "garbage", "dup", "delay", "short"),
    "write": ("kill", "eof", "cut", "garbage", "dup", "delay", "short"),
}
_KINDS = {record.__name__: kind for record, kind in commands.KIND.items()}


class Rule(NamedTuple):
    """One fault: where it strikes, and what it does."""

    side: str
    worker: str
    on: str
    kind: int | None
    nth: int
    do: str
    nbytes: int
    seconds: float


def parse(text: str) -> list[Rule]:
    """The rules in the value of ``FEDPROC_FAULT``.

    Raises:
        ValueError: a field that does not exist, or a value it cannot have.
    """
    return [_rule(part) for part in text.split(";") if part.strip()]


def _rule(text: str) -> Rule:
    fields = dict(field.partition("=")[::2] for field in text.split())
    frame = fields.pop("frame", None)
    rule = Rule(
        fields.pop("in", ""),
        fields.pop("worker", ""),
        fields.pop("on", ""),
        None if frame is None else _KINDS[frame],
        int(fields.pop("n", "1")),
        fields.pop("do", ""),
        int(fields.pop("bytes", "0")),
        float(fields.pop("seconds", "0")),
    )
    known = rule.side in {"parent", "worker"} and rule.do in _DEEDS.get(rule.on, ())
    if fields or not known or (rule.do == "delay") != (rule.seconds > 0):
        raise ValueError(f"FEDPROC_FAULT: {text!r} is no rule; see fedproc.transport.faults")
    return rule


def faulty(sock: socket.socket, side: str, worker: str, *, inline: bool) -> Channel | None:
    """The channel with the faults that are asked for on this side; None: there are none."""
    rules = [
        rule
        for rule in parse(os.environ["FEDPROC_FAULT"])
        if rule.side == side and rule.worker in {"", worker}
    ]
    return FaultyChannel(sock, rules, inline=inline) if rules else None


class FaultyChannel(Channel):
    """A channel in which faults strike."""

    def __init__(self, sock: socket.socket, rules: list[Rule], *, inline: bool) -> None:
        """``inline``: the process is shared, so nobody may kill it."""
        super().__init__(sock)
        self._inline = inline
        self._rules = rules
        self._counts = [0] * len(rules)
        self._gone = False
        short = {rule.on for rule in rules if rule.do == "short"}
        if short:
            self._sock = _OneByte(sock, short)  # type: ignore[assignment]  # as a socket, as far as used

    def append(self, frame: bytes) -> int:
        """As without faults, unless one strikes here."""
        waiting = 0
        for part in self._struck("write", frame[1], frame):
            waiting = super().append(part)
        return waiting

    def receive(self, handle: Callable[[Frame], None]) -> None:
        """As without faults, unless one strikes here."""
        super().receive(functools.partial(self._hand_over, handle))

    def resume(self, handle: Callable[[Frame], None]) -> None:
        """As without faults, unless one strikes here."""
        super().resume(functools.partial(self._hand_over, handle))

    def _hand_over(self, handle: Callable[[Frame], None], frame: Frame) -> None:
        for part in self._struck("read", frame.kind, frame):
            handle(part)

    def _struck(self, on: str, kind: int, frame: Any) -> list[Any]:
        """What becomes of a frame: nothing, itself, or more."""
        if self._gone:
            return []
        parts = [frame]
        for place, rule in enumerate(self._rules):
            if rule.on != on or rule.kind not in {None, kind}:
                continue
            self._counts[place] += 1
            if self._counts[place] == rule.nth:
                parts = self._strike(rule, parts)
        return parts

    def _strike(self, rule: Rule, parts: list[Any]) -> list[Any]:
        if rule.do == "delay":
            time.sleep(rule.seconds)
        elif rule.do == "dup":
            return [*parts, *parts]
        elif rule.do == "garbage" and rule.on == "read":
            raise ProtocolError("garbage, as FEDPROC_FAULT asks for")
        elif rule.do == "garbage":
            return [_GARBAGE, *parts]
        elif rule.do in {"kill", "eof", "cut"}:
            if rule.nbytes:
                super().append(parts[0][: rule.nbytes])
            self._end(kill=rule.do == "kill")
            return []
        return parts

    def _end(self, *, kill: bool) -> None:
        self._gone = True
        poll = select.poll()
        poll.register(self, select.POLLOUT)
        while not self.flush():  # what came before this frame was written
            poll.poll()
        if kill and not self._inline:
            os.kill(os.getpid(), signal.SIGKILL)
        self.hang_up()


class _OneByte:
    """A socket of which every call moves one byte."""

    def __init__(self, sock: socket.socket, short: set[str]) -> None:
        self._real = sock
        self._short = short

    def recv(self, size: int) -> bytes:
        return self._real.recv(1 if "read" in self._short else size)

    def send(self, data: memoryview) -> int:
        return self._real.send(data[:1] if "write" in self._short else data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)
