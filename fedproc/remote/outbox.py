"""What goes to a worker: numbering, order, and what is held back while it is read. Parent.

Any thread may send. The order of the numbers is the order in the stream is the order of execution.
The frees of dropped pointers ride in front of the next command: by then everything that used them
is in the stream already.
"""

import itertools
import pickle
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

from fedproc.remote.borrows import Borrows
from fedproc.remote.handle import Handle
from fedproc.remote.inbox import Inbox
from fedproc.remote.message import Message, plain
from fedproc.remote.site import Site
from fedproc.transport.channel import Channel
from fedproc.wire import commands, frames

BURST_SECONDS = 1e-3
"""A command that follows another this quickly waits for company before it is written."""
BURST_COMMANDS = 64
MOST_CODE_BYTES = 32 << 20
"""Shipped code that a worker keeps; beyond, it forgets all and is told again."""

_FREE = commands.KIND[commands.Free]
_RELEASE = commands.KIND[commands.Release]
_BOOKKEEPING = frozenset({commands.Free, commands.Define, commands.Attach})


class Outbox:
    """The commands to one worker."""

    def __init__(self, channel: Channel, inbox: Inbox, numbers: "itertools.count[int]") -> None:
        """``inbox`` is told what to expect; ``numbers`` is shared by all workers of a cluster."""
        self.lock = threading.RLock()
        self.trash: deque[int] = deque()
        self.handles: dict[int, weakref.ref[Handle]] = {}
        self.borrows = Borrows()
        self.sending = False  # the thread that has the lock is in the middle of it
        self.drawn = 0  # the number of the command that is being sent, or was sent last
        self.writes = 0  # commands so far that could change an existing tensor
        self.submitted = 0
        self.last = 0
        self._channel = channel
        self._inbox = inbox
        self._expect = inbox.expected.append
        self._numbers = numbers
        self._shipped: set[bytes] = set()
        self._shipped_bytes = 0
        self._held: deque[tuple[int, bytes, bool]] = deque()  # number, frame, writes
        self._written_at = 0.0

    def send(self, message: Message, site: Site) -> tuple[int, int]:
        """Number a command and queue it; the caller has the lock.

        Returns:
            The number, and how many frames wait to be written.
        """
        record, flags, body, what, writes, exporter, definitions = message
        if definitions:
            self._define(definitions)
        self.drawn = number = next(self._numbers)
        dropped = self._dropped() if self.trash else ()
        if dropped:
            flags |= frames.FREES
            body = frames.with_frees(dropped, body)
        frame = frames.pack(commands.KIND[record], flags, number, body)
        if writes:
            self.writes += 1  # what is known of objects may not be so any more
        if exporter is not None:
            self._inbox.hold(number, exporter)
        if record not in _BOOKKEEPING:
            self._expect((number, site, what))
            self.submitted += 1
        if self._held:
            self._let_held_go()
        waiting = 0
        if self._held or (writes and self.borrows.reading and self.borrows.hold(number)):
            self._held.append((number, frame, writes))
        else:
            waiting = self._channel.append(frame)
        # Only now: had an interrupt come before, nobody must wait for a command that was not sent,
        # and no id is lost that it would have freed. One that is freed twice is freed once.
        self.last = number
        for _ in dropped:
            self.trash.popleft()
        return number, waiting

    def disown(self, number: int, message: Message) -> None:
        """Nobody will have the result of a command: Ctrl-C came, or it was refused (number 0)."""
        if not number:
            if message.exporter is not None:
                message.exporter.release()
        elif message.record in commands.QUERIES:
            self._inbox.abandon(number)
        elif message.record is commands.Lend:
            self.release(number)
        else:
            self.trash.append(number)

    def _dropped(self) -> list[int]:
        """Ids of dropped pointers; they stay in the trash until their frame is on its way."""
        # By index: making an iterator may start the collector, whose finalizers add to the trash.
        dropped = [self.trash[at] for at in range(min(len(self.trash), frames.MOST_FREES))]
        for oid in dropped:
            self.handles.pop(oid, None)  # whoever moves an object still needs its handles
        return dropped

    def remove(self, oid: int) -> None:
        """The object was taken home or moved; all its ids go, in front of the next command."""
        with self.lock:
            self.writes += 1  # other handles of it must ask again, and be told
            self.trash.append(oid | frames.WHOLE)

    def remove_at_once(self, oid: int) -> None:
        """The same before all that is held back: what would still write to the object fails."""
        body = frames.with_frees((oid | frames.WHOLE,), pickle.dumps((), protocol=5))
        with self.lock:
            self.writes += 1
            self._channel.append(frames.pack(_FREE, frames.PLAIN | frames.FREES, 0, body))

    def _define(self, definitions: dict[bytes, bytes]) -> None:
        new = sum(len(code) for digest, code in definitions.items() if digest not in self._shipped)
        forget = self._shipped_bytes + new > MOST_CODE_BYTES
        if forget:
            self._shipped.clear()
            self._shipped_bytes = 0
        for digest, code in definitions.items():
            if digest not in self._shipped:
                record = commands.Define(digest, code, forget)
                self.send(plain(record, "define"), Site.nowhere())
                self._shipped.add(digest)
                self._shipped_bytes += len(code)
                forget = False

    def may_wait(self, waiting: int) -> bool:
        """Whether the last of so many frames may wait for company, as those before it do."""
        if waiting > 1:
            return waiting < BURST_COMMANDS
        return time.monotonic() - self._written_at <= BURST_SECONDS

    def flush(self) -> bool:
        """Write what can be written; whether everything was."""
        self._written_at = time.monotonic()
        return self._channel.flush()

    def tidy(self) -> None:
        """Send the frees of dropped pointers, if no command took them along."""
        while self.borrows.orphans:
            query, answered = self.borrows.orphans.popleft()
            self.borrows.reading.pop(query, None)
            (self._inbox.abandon if answered else self.release)(query)
        if self.trash or self._held:
            self._undisturbed(self._send_frees)

    def _send_frees(self) -> None:
        while self.trash:
            self.send(plain(commands.Free(), "free"), Site.nowhere())
        self._let_held_go()

    def _undisturbed(self, work: Callable[[], None]) -> None:
        """Work with the lock; who comes in between (a signal handler, a finalizer) is refused.

        One that is itself in between does nothing: the janitor comes again.
        """
        with self.lock:
            if not self.sending:
                self.sending = True
                try:
                    work()
                finally:
                    self.sending = False

    # ---- what waits for the end of a borrow

    @property
    def holding(self) -> bool:
        """Whether commands wait for the end of a borrow; to be asked with the lock."""
        return bool(self._held)

    def holds_back(self, number: int) -> bool:
        """Whether command ``number`` waits for the end of a borrow; needs no lock."""
        try:
            return bool(self._held) and number >= self._held[0][0]
        except IndexError:  # they went out since the look
            return False

    def go_on(self) -> None:
        """Send what waits for no borrow any more."""
        self._undisturbed(self._let_held_go)

    def _let_held_go(self) -> None:
        released = False
        while self._held and not (self._held[0][2] and self.borrows.hold(self._held[0][0])):
            self._channel.append(self._held[0][1])
            self._held.popleft()  # interrupted before, it goes twice: the worker sees that
            released = True
        if released:
            self.flush()

    def release(self, query: int) -> None:
        """The blocks that answered ``query`` are not read any more."""
        body = pickle.dumps(((query,),), protocol=5)
        # Number 0: it overtakes what a borrow holds back, so it must not count as progress.
        self._channel.append(frames.pack(_RELEASE, frames.PLAIN, 0, body))

    def refuse_deadlock(self, number: int, worker: str, *, awaiting: bool = False) -> None:
        """Refuse to wait in a borrow block for what waits for the end of that block.

        A task that awaits leaves its thread to the others: only its own blocks would wait for it.

        Raises:
            FedprocError: this would wait for ever.
        """
        if self.holds_back(number):
            first = self._held[0][0] if self._held else 0
            self.borrows.refuse_own(first, worker, awaiting=awaiting)

    def close(self) -> None:
        """Nothing goes out any more."""
        self._held.clear()
