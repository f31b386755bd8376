"""One incarnation of the connection to a worker. Runs in the parent.

::

      pointer, worker handle                          worker process
            |  submit (any thread)                         ^
            v                                              |
      [lock: number, frees of dropped pointers, frame] --> channel --> loop
            |                                              |
            |   held back while a borrow lasts             v
      wait  <-- inbox: answers, failures, progress <-- receive (the leader of the hub)

Commands are numbered over the whole cluster; the number is also the id of the object a command
makes. Submitting never waits. A reply tells that everything up to its number was executed. A
restarted worker has a new link: what belongs to the old one can be told from it.
"""

import copy
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from fedproc.errors import FedprocError, WorkerLostError
from fedproc.memory import pages
from fedproc.memory.arena import Arena, Mapped
from fedproc.remote.ending import ENDED, closed, forked, late, lost, reentered
from fedproc.remote.handle import Handle
from fedproc.remote.hub import Hub
from fedproc.remote.inbox import Inbox
from fedproc.remote.message import Message
from fedproc.remote.outbox import Outbox
from fedproc.remote.site import Site
from fedproc.transport.base import Connection
from fedproc.wire import frames

MOST_UNANSWERED = 100_000
"""Commands in flight at which submitting waits for the worker to catch up."""
DEAD_LOOKS = 3
"""How often a process is seen dead before its stream, which may hold last words, is given up."""
LOST_SECONDS = 1.0
"""How long the end of a worker that was killed is waited for."""


class Link:
    """Commands to one worker, and what it answers."""

    here = os.getpid()
    """This process. Asking the system in every command would cost 0.2 us."""
    wiring: tuple[Any, ...] | None = None  # what flat calls touch of it: see ``flat``

    def __init__(
        self,
        name: str,
        connection: Connection,
        hub: Hub,
        arena: Arena,
        numbers: "itertools.count[int]",
    ) -> None:
        """Talk over ``connection``; ``numbers`` is shared by all links of a cluster."""
        self.name = name
        self.arena_name = f"{name}/{connection.process.pid}/{id(self)}"
        self.hub = hub
        self.arena = arena
        self.channel, self.side, self.process = connection
        self.worker: Any = None
        self.owner = Link.here
        self.inbox = Inbox(name, self.release, self.handle)
        self.outbox = Outbox(self.channel, self.inbox, numbers)
        self.failures, self.trash = self.inbox.failures, self.outbox.trash
        self.mapped: Mapped | None = None
        self.attached: set[str] = set()
        self.registered: Mapping[Any, bytes] | None = None  # code it has, where it takes no other
        self.end: FedprocError | None = None
        self.lost_seen = True
        self.lockstep: float | None = 0.0
        self.keeps_private = False  # since something private was sent there or made there
        self.closing = False  # the cluster ends: a dead process is no news
        self.asking = threading.Lock()  # whoever reads its stack
        self._dead_looks = 0
        self._oom_kills = pages.oom_kills()

    # ---- submitting

    def submit(
        self, message: Message, site: Site, *, urgent: bool = False, more: bool = False
    ) -> int:
        """Number and send a command; returns its number at once.

        Args:
            message: the command.
            site: where the user issued it.
            urgent: somebody is about to wait for it.
            more: another command follows at once, and takes it along: an idle worker is woken once.

        Raises:
            ClosedError: the cluster was closed, or this is a forked child.
            WorkerLostError: the worker's process has ended.
        """
        outbox, number = self.outbox, 0
        try:
            # Before the lock: in a forked child it may be held for ever.
            if self.end is not None or self.owner != Link.here:
                self.check()
            with outbox.lock:
                if self.end is not None or outbox.sending:
                    self.refuse(message.what)
                idle, outbox.sending, outbox.drawn = self.inbox.executed >= outbox.last, True, 0
                try:
                    number, waiting = outbox.send(message, site)
                finally:
                    number, outbox.sending = outbox.drawn, False
            # should nothing follow in spite of ``more``: the janitor writes what waits, too
            if urgent or (not more and (idle or not outbox.may_wait(waiting))):
                self.flush()
            elif not more:
                self.hub.tail()
            if not urgent and (self.lockstep != 0.0 or self.inbox.unanswered() > MOST_UNANSWERED):
                self.keep_step(number)
        except BaseException:
            outbox.disown(number, message)
            raise
        return number

    def refuse(self, what: str) -> NoReturn:
        """Raise why nothing can be sent now."""
        self.check()
        raise reentered(self.name, what)

    def keep_step(self, number: int) -> None:
        """Go on when not too much is unanswered; in lockstep when the command is done."""
        if not self.lockstep:  # a limit of seconds ends by itself
            self.refuse_deadlock(number)
        self.flush()
        if self.lockstep == 0.0:
            half = MOST_UNANSWERED // 2
            self.hub.wait_until(lambda: self.end is not None or self.inbox.unanswered() < half)
            return
        self.hub.wait_until(lambda: self.executed(number), self.lockstep)
        if self.lockstep is None:  # FEDPROC_SYNC: errors are raised where the call was made
            self.failures.raise_for(number)

    def flush(self) -> bool:
        """Write what can be written; whether everything was."""
        return self.outbox.flush()

    def tidy(self) -> None:
        """Send the frees of dropped pointers, if no command took them along."""
        if self.end is None:
            self.outbox.tidy()

    def look_after(self) -> None:
        """Notice a process that ended while a child of its own keeps the stream open."""
        if self.end is None and self.process.poll() is not None:
            self._dead_looks += 1
            if self._dead_looks >= DEAD_LOOKS:
                self.lose(ENDED)

    def note(self, handle: Handle) -> None:
        """Find ``handle`` by its id from now on."""
        self.outbox.handles[handle.oid] = weakref.ref(handle)

    def handle(self, oid: int) -> Handle | None:
        """The handle of an id, while somebody holds it."""
        found = self.outbox.handles.get(oid)
        return None if found is None else found()

    def written_by(self, thread: int) -> bool:
        """Whether that thread is in the middle of writing."""
        return self.channel.writer == thread

    # ---- waiting

    def executed(self, number: int) -> bool:
        """Whether command ``number`` was executed, or never will be."""
        return self.inbox.executed >= number or self.end is not None

    def done(self) -> int:
        """The last command that was executed, also if the worker has not told, or no more can."""
        mapped = self.mapped
        if mapped is None or self.end is not None:
            return self.inbox.executed
        return max(self.inbox.executed, pages.number_at(mapped.fd, mapped.size_bytes))

    def pending(self) -> bool:
        """Whether commands are still to be executed."""
        return self.end is None and self.inbox.executed < self.outbox.last

    def wait(self, number: int, timeout: float | None, what: str) -> None:
        """Wait until command ``number`` was executed.

        Raises:
            CommandTimeoutError: not within ``timeout`` seconds.
            WorkerLostError, ClosedError: it never will be.
            FedprocError: it waits for a borrow of this thread.
        """
        self.refuse_deadlock(number)
        self.flush()
        if not self.hub.wait_until(lambda: self.executed(number), timeout):
            raise late(self.name, what, timeout)
        if self.inbox.executed < number:
            self.check()

    def ask(self, message: Message, site: Site, timeout: float | None = None) -> Any:
        """Send a query and wait for its answer: the payload of ``Value``."""
        return self.answer(self.submit(message, site, urgent=True), message.what, timeout)

    def answer(self, number: int, what: str, timeout: float | None = None) -> Any:
        """The payload of the answer to query ``number``.

        Raises:
            CommandTimeoutError: no answer within ``timeout`` seconds; the answer will be ignored.
            RemoteError, FedprocError: the query, or a command before it, failed.
        """
        try:
            self.refuse_deadlock(number)
            self.flush()
            if not self.hub.wait_until(
                lambda: self.inbox.has(number) or self.end is not None, timeout
            ):
                raise late(self.name, what, timeout)
        except BaseException:
            self.inbox.abandon(number)
            raise
        if not self.inbox.has(number):
            self.check()
        try:
            return self.inbox.open(number)
        except frames.ProtocolError as error:
            self._garbled(error)
            self.check()
            raise

    def refuse_deadlock(self, number: int, *, awaiting: bool = False) -> None:
        """Refuse to wait for what waits for a borrow of this thread or task (see ``Outbox``)."""
        self.outbox.refuse_deadlock(number, self.name, awaiting=awaiting)

    # ---- receiving (the leader of the hub)

    @property
    def unsent(self) -> bool:
        """Whether something is still to be written."""
        return self.channel.unsent

    def fileno(self) -> int:
        """Descriptor to poll, -1 when the link has ended."""
        return -1 if self.end is not None else self.channel.fileno()

    def resume(self) -> None:
        """Take in what an interrupt left half taken."""
        self._take_in(self.channel.resume)

    def receive(self) -> None:
        """Take in what has arrived."""
        self._take_in(self.channel.receive)
        if self.channel.ended:
            self.lose(ENDED)

    def _take_in(self, read: Callable[[Callable[[frames.Frame], None]], None]) -> None:
        try:
            read(self.inbox.take)
        except frames.ProtocolError as error:
            self._garbled(error)

    def _garbled(self, error: frames.ProtocolError) -> None:
        """Nothing that the worker says can be believed any more."""
        self.process.kill()
        self.lose(f"its stream is out of step ({error}), so it was ended")

    def release(self, query: int) -> None:
        """The blocks that answered ``query`` are not read any more.

        Nobody waits for that: it goes with the next command, or with the next round of the janitor.
        """
        self.outbox.release(query)

    # ---- the end

    def check(self) -> None:
        """Refuse the use of a link that has ended.

        Raises:
            ClosedError: closed, or this is a forked child.
            WorkerLostError: the worker's process ended.
        """
        self.check_process()
        if self.end is not None:
            self.lost_seen = True
            raise copy.copy(self.end)

    def check_process(self) -> None:
        """Refuse the use in a forked child (ClosedError): the workers are the parent's."""
        if self.owner != Link.here:
            raise forked(self.name, self.owner)

    def lose(self, why: str) -> None:
        """The worker is gone: everything pending on it has failed."""
        if self.closing:
            self.close()
            return
        with self.outbox.lock:
            if self.end is not None:
                return
            unfinished = self.inbox.unfinished(self.done(), self.outbox.last)
            self.lost_seen = not unfinished
            self.end = lost(self.name, self.process, why, unfinished, self._oom_kills)
        self._let_go()
        self.hub.remove(self)

    def close(self) -> None:
        """The cluster was closed: whoever uses a pointer is told so."""
        with self.outbox.lock:
            if self.end is None:
                self.end = closed(self.name)
        self._let_go()
        self.hub.remove(self)

    def abandon(self) -> None:
        """In a forked child: let go of the descriptors; the parent's are not touched."""
        self.channel.close()
        self.side.close()

    def _let_go(self) -> None:
        self.inbox.close()
        self.outbox.close()
        self.abandon()
        if self.mapped is not None:
            self.mapped.close()

    def exitcode(self) -> int | None:
        """Exit code of the process, None while it runs and for inline workers."""
        return None if self.process.pid == self.owner else self.process.poll()

    def kill(self) -> None:
        """End the process now; its end is noticed like any other."""
        self.check_process()
        self.process.kill()
        self.hub.wait_until(lambda: self.end is not None, LOST_SECONDS)

    def unseen(self) -> Iterator[tuple[int, Any]]:
        """Errors that nobody has looked at: (number, function that raises it)."""
        yield from self.failures.unseen()
        if isinstance(self.end, WorkerLostError) and not self.lost_seen:
            yield self.inbox.executed + 1, self.check


def _note_process() -> None:
    Link.here = os.getpid()


os.register_at_fork(after_in_child=_note_process)
