"""Waiting for replies, for all links of a cluster at once. Runs in the parent.

There is no reader thread: the thread that waits reads, for everybody (*leader*); others that wait
meanwhile (*followers*) are woken when something has arrived, and one of them takes over when the
leader has what it wanted. A janitor thread does what nobody waits for: it writes the tail of a
burst of commands, and sends the frees of dropped pointers. For event loops a *herald* waits.

Ctrl-C may raise KeyboardInterrupt in the main thread after any call, also after one that has just
taken a lock. So locks are taken by ``with`` on the lock itself (one step of the interpreter), or
tried inside ``list.extend(map(...))``, which notes the outcome in the same step; never through
Condition or Event, whose methods are Python code that can be interrupted with the lock in hand.

A signal handler of the user may wait, too, while the thread it interrupts leads. Mostly that one is
*at rest*, it looks or sleeps until something arrives: then the handler reads on in its place. In
the middle of reading or writing nobody can go on but the interrupted code: the handler is told so.
"""

import contextlib
import select
import threading
import time
from collections.abc import Callable
from typing import Protocol

from fedproc.ranges import deadline_of
from fedproc.remote.ending import reentered
from fedproc.remote.herald import Herald
from fedproc.remote.stalls import Stalls
from fedproc.transport.channel import Lookout

TAIL_SECONDS = 0.001
"""How long a command may wait for company before it is written."""
TIDY_SECONDS = 0.05
"""How often dropped pointers are looked for when no command takes their frees along."""
UPKEEP_SECONDS = 15.0
"""How often the parent's free memory is looked at; see ``worker.upkeep``."""
_FOLLOWER_SECONDS = 0.05
_POLL_SECONDS = 0.5


class Readable(Protocol):
    """What the hub asks of a link."""

    name: str

    def fileno(self) -> int:
        """Descriptor to poll, -1 when there is nothing to read any more."""

    def receive(self) -> None:
        """Take in what has arrived."""

    def resume(self) -> None:
        """Take in what an interrupt left half taken."""

    def flush(self) -> bool:
        """Write what can be written; whether everything was."""

    def written_by(self, thread: int) -> bool:
        """Whether that thread is in the middle of writing."""

    def tidy(self) -> None:
        """Send the frees of dropped pointers."""

    def look_after(self) -> None:
        """Notice a process that has ended without ending its stream."""

    @property
    def unsent(self) -> bool:
        """Whether something is still to be written."""


def _watch(links: dict[int, Readable]) -> "tuple[dict[int, Readable], select.poll]":
    poll = select.poll()
    for fd in links:
        poll.register(fd, select.POLLIN)
    return links, poll


class Hub:
    """Reads for all links of a cluster."""

    def __init__(self, upkeep: Callable[[], None]) -> None:
        """No links yet; ``upkeep`` is called by the janitor now and then."""
        self._upkeep = upkeep
        self._watched = _watch({})  # links by descriptor, and a poll object for them
        self._leader = threading.Lock()
        self._leads = 0  # the thread that has it
        self._at_rest = False  # that thread: nothing is half taken
        self._mutex = threading.RLock()  # a signal handler may wait, too, with it in hand
        self._changed = threading.Condition(self._mutex)
        self._followers = 0
        self._bell = threading.Lock()  # locked: silent; the janitor waits for its release
        self._bell.acquire()
        self._closing = False
        self._lookout = Lookout()
        self._janitor: threading.Thread | None = None
        self.herald = Herald(self)
        self._stalls = Stalls()

    def add(self, link: Readable) -> None:
        """Read for ``link`` from now on."""
        self._watched = _watch({**self._watched[0], link.fileno(): link})
        if self._janitor is None:
            self._janitor = threading.Thread(
                target=self._clean, name="fedproc-janitor", daemon=True
            )
            self._janitor.start()

    def remove(self, link: Readable) -> None:
        """Do not read for ``link`` any more."""
        rest = {fd: other for fd, other in self._watched[0].items() if other is not link}
        self._watched = _watch(rest)
        self.notify()

    def wait_until(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """Read until ``ready()``; False when ``timeout`` seconds have passed before.

        ``ready`` is called by this thread only, often; it must be cheap and must not wait.

        Raises:
            ValueError: ``timeout`` is neither a number nor None.
            FedprocError: a signal handler would wait for what it has interrupted.
        """
        deadline = deadline_of(timeout)
        if ready():
            return True
        here = threading.get_ident()
        if self._interrupts(here):
            self._watched = _watch(self._watched[0])  # the other poll object is in use below us
            try:
                return self._lead(ready, deadline)
            finally:
                self._at_rest = True
        while True:
            tried: list[bool] = []
            try:
                tried.extend(map(self._leader.acquire, (False,)))
                if tried[0]:
                    self._leads = here
                    return self._lead(ready, deadline)
            finally:
                if tried and tried[0]:
                    self._leads = 0
                    self._leader.release()
                    self.notify()
            self._follow(ready, deadline)
            if ready():
                return True
            if deadline is not None and time.monotonic() >= deadline:
                return False

    def _interrupts(self, thread: int) -> bool:
        """Whether this is a signal handler within a wait of its thread, which is at rest.

        Raises:
            FedprocError: it is one in the middle of something that only its thread can end.
        """
        if self._leads == thread and self._at_rest:
            return True
        for link in self._watched[0].values():
            if self._leads == thread or link.written_by(thread):
                raise reentered(link.name, "wait")
        return False

    def _lead(self, ready: Callable[[], bool], deadline: float | None) -> bool:
        self._at_rest = False
        for link in self._watched[0].values():
            link.resume()
        while not ready():
            wait = None if deadline is None else deadline - time.monotonic()
            if wait is not None and wait <= 0:
                return False
            self._read(wait)
        return True

    def _follow(self, ready: Callable[[], bool], deadline: float | None) -> None:
        wait = _FOLLOWER_SECONDS
        if deadline is not None:
            wait = min(wait, max(0.0, deadline - time.monotonic()))
        with self._mutex:
            self._followers += 1
            try:
                if not ready():
                    self._changed.wait(wait)
            finally:
                self._followers -= 1

    def _read(self, wait: float | None) -> None:
        """Read once from whoever has something to say."""
        links, poll = self._watched
        for fd, link in links.items():
            if link.unsent and wait != 0.0:  # who only looks does not write
                poll.modify(fd, select.POLLIN | select.POLLOUT)
        # An end to every poll: what is waited for may come about without anything to read.
        wait = _POLL_SECONDS if wait is None else min(wait, _POLL_SECONDS)
        self._at_rest = True
        events = self._lookout.look(poll, wait) or poll.poll(wait * 1000)
        self._at_rest = False
        for fd, event in events:
            if event & select.POLLOUT and links[fd].flush():
                poll.modify(fd, select.POLLIN)
            if event & ~select.POLLOUT:
                links[fd].receive()
        if self._followers:
            self.notify()

    def look(self) -> None:
        """Take in what has arrived, without waiting."""
        tried: list[bool] = []
        try:
            tried.extend(map(self._leader.acquire, (False,)))
            if tried[0]:
                self._leads, self._at_rest = threading.get_ident(), False
                self._read(0.0)
        finally:
            if tried and tried[0]:
                self._leads = 0
                self._leader.release()
                self.notify()

    def notify(self) -> None:
        """Wake the followers: something has changed."""
        if self._followers:
            with self._mutex:
                self._changed.notify_all()

    def tail(self) -> None:
        """Something is buffered: the janitor shall write it if nobody else does."""
        if self._bell.locked():
            with contextlib.suppress(RuntimeError):  # another thread rang this moment
                self._bell.release()

    def _clean(self) -> None:
        again = False
        upkeep_at = time.monotonic() + UPKEEP_SECONDS
        while not self._closing:
            rung = self._bell.acquire(timeout=TAIL_SECONDS if again else TIDY_SECONDS)
            if rung:
                time.sleep(TAIL_SECONDS)
            idle = not (rung or again)
            again = False
            for link in self._watched[0].values():
                link.tidy()
                again |= not link.flush()
                if idle:  # it asks the system; a burst has better things to do
                    link.look_after()
            self._stalls.look(self._watched[0].values())
            if idle and time.monotonic() > upkeep_at:
                self._upkeep()
                upkeep_at = time.monotonic() + UPKEEP_SECONDS

    def close(self) -> None:
        """End the janitor and the herald."""
        self._closing = True
        self.herald.close()
        self.tail()
        janitor, self._janitor = self._janitor, None
        if janitor is not None and janitor is not threading.current_thread():
            janitor.join()
