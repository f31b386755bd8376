"""What a worker does now: its stack on demand, and in the log when a command takes long. Parent.

A process is sent a signal. The handler (``faulthandler``, C code) writes the Python stack of the
main thread, where commands run, to the side socket; it needs neither the interpreter nor the loop,
so it works while C code holds both. The signal is sent **twice**: real-time signals are queued, so
when the second stack begins, the first one is whole. What a late answer leaves in the socket is
thrown away before the next question.

The janitor of the hub looks whether the oldest command of a worker has changed; nothing is done per
command. What it finds is reported by a thread that lives for the length of the report.
"""

import contextlib
import logging
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import psutil

from fedproc.errors import CommandTimeoutError, FedprocError
from fedproc.ranges import deadline_of

if TYPE_CHECKING:
    from fedproc.remote.link import Link

STALL_SECONDS = 30.0
"""A command that takes longer is reported, unless ``FEDPROC_STALL_SECONDS`` says otherwise."""
STACK_SECONDS = 5.0
"""How long a stack is waited for."""
_LOOK_SECONDS = 0.05
_POLL_SECONDS = 0.5
_HEAD = b"Stack (most recent call first):\n"
_log = logging.getLogger("fedproc")


def stack(link: "Link", timeout: float | None) -> str:
    """The Python stack of a worker's main thread, innermost call first.

    Raises:
        ValueError: ``timeout`` is neither a number nor None.
        CommandTimeoutError: it did not show its stack in time; a stopped process does not.
        WorkerLostError, ClosedError: it has ended.
    """
    deadline = deadline_of(timeout)
    link.check_process()
    link.hub.look()
    with link.asking:
        link.check()
        if link.process.pid == link.owner:
            return link.process.ask_stack() or ""
        _drain(link.side)
        received = b""
        link.process.ask_stack()
        link.process.ask_stack()
        while received.count(_HEAD) < 2:
            left = _POLL_SECONDS if deadline is None else deadline - time.monotonic()
            if timeout is not None and left <= 0:
                raise _unseen(link, timeout)
            received += _received(link, min(left, _POLL_SECONDS))
    return (_HEAD + received.split(_HEAD)[1]).decode(errors="replace")


def _drain(side: socket.socket) -> None:
    """Throw away what an earlier question left, without waiting."""
    with contextlib.suppress(OSError):  # nothing more, or it was closed: that is noticed elsewhere
        while side.recv(65536, socket.MSG_DONTWAIT):
            pass


def _received(link: "Link", seconds: float) -> bytes:
    poll = select.poll()
    try:
        poll.register(link.side, select.POLLIN)
        if not poll.poll(seconds * 1000):
            data = b""
        else:
            data = link.side.recv(65536, socket.MSG_DONTWAIT)
            if not data:  # its end: the exit code is known in a moment
                link.hub.wait_until(lambda: link.end is not None, seconds)
    except BlockingIOError:
        data = b""
    except (OSError, ValueError):  # another thread closed the link
        data = b""
    link.check()
    return data


def _unseen(link: "Link", timeout: float) -> CommandTimeoutError:
    try:
        state: str = psutil.Process(link.process.pid).status()
    except psutil.Error:
        state = "unknown"
    remedy = "Continue it with SIGCONT" if state == psutil.STATUS_STOPPED else "Ask again"
    return CommandTimeoutError(
        f"stack: worker {link.name!r} (process {link.process.pid}, {state}) did not show its stack "
        f"within {timeout:g} s. {remedy}, or end the worker with worker.kill()."
    )


class Stalls:
    """Looks for commands that take long, for all links of a hub; called by its janitor."""

    def __init__(self) -> None:
        """Take the time from the environment.

        Raises:
            ValueError: ``FEDPROC_STALL_SECONDS`` is no number.
        """
        text = os.environ.get("FEDPROC_STALL_SECONDS", "")
        try:
            self._seconds = float(text or STALL_SECONDS)
        except ValueError:
            raise ValueError(
                f"FEDPROC_STALL_SECONDS must be a number of seconds (0: never), not {text!r}"
            ) from None
        # Of each worker: its oldest command and since when it is that; infinity once reported.
        self._since: weakref.WeakKeyDictionary[Link, tuple[int, float]] = (
            weakref.WeakKeyDictionary()
        )
        self._next_look = 0.0

    def look(self, links: "Iterable[Any]") -> None:
        """Report each command that has become too old, once, as far as is known here."""
        now = time.monotonic()
        if now < self._next_look or self._seconds <= 0:
            return
        self._next_look = now + _LOOK_SECONDS
        for link in links:
            oldest = link.inbox.oldest()
            if oldest is None or link.end is not None or link.outbox.holds_back(oldest[0]):
                self._since.pop(link, None)
                continue
            number, since = self._since.get(link, (0, now))
            if number != oldest[0]:
                self._since[link] = (oldest[0], now)
            elif now - since >= self._seconds:
                self._since[link] = (number, float("inf"))
                told = threading.Thread(
                    target=_report, args=(link, now - since), name="fedproc-stall", daemon=True
                )
                told.start()


def _report(link: "Link", seconds: float) -> None:
    link.hub.look()  # perhaps it was done long ago, and nobody has waited for anything since
    oldest = link.inbox.oldest()
    if oldest is None or link.done() >= oldest[0]:
        return
    try:
        shown = stack(link, STACK_SECONDS)
    except FedprocError as error:
        if link.end is not None:
            return  # whoever waits is told
        shown = f"(not to be had: {error})"
    _, site, what = oldest
    _log.warning(
        "worker %r (process %d) has worked for %.3g s on `%s`, issued at %s; %d command(s) wait. "
        "It goes on; worker.kill() ends it. Its stack:\n%s",
        link.name, link.process.pid, seconds, what, site, link.inbox.unanswered(), shown,
    )  # fmt: skip
