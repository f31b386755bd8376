"""One incarnation of the connection to a worker. Runs in the parent.

::

      pointer, worker handle                          worker process
            |  submit (any thread)                         ^
            v                                              |
      [lock: number, frees of dropped pointers, frame] --> channel --> loop
            |                                              |
            |   held back while a borrow lasts             v
      wait  <-- answers, failures, progress <-- receive (the leader of the hub)

Commands are numbered over the whole cluster; the number is also the id of the object a command
makes. Submitting never waits. A reply tells that everything up to its number was executed. A
restarted worker has a new link: what belongs to the old one can be told from it.
"""

import copy
import itertools
import os
import pickle
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from fedproc.errors import ClosedError, CommandTimeoutError, FedprocError, WorkerLostError
from fedproc.memory.arena import Arena, Mapped
from fedproc.memory.tensors import Exporter
from fedproc.remote.failures import Failures
from fedproc.remote.handle import Handle
from fedproc.remote.hub import Hub
from fedproc.remote.site import Site
from fedproc.transport.base import Connection
from fedproc.wire import commands, frames
from fedproc.wire.frames import Frame

BURST_SECONDS = 5e-5
"""A command that follows another this quickly waits for company before it is written."""
BURST_COMMANDS = 64
MOST_UNANSWERED = 100_000
"""Commands in flight at which submitting waits for the worker to catch up."""
LOCKSTEP_SECONDS = 0.05
"""Inline workers share the parent's random generators: a quick command is done before the parent
goes on, so that neither sees the other's draws. A slow one runs beside it, as in a process."""
LOST_SECONDS = 1.0

_VALUE = commands.KIND[commands.Value]
_REFUSAL = commands.KIND[commands.Refusal]
_FAILED = commands.KIND[commands.Failed]
_RELEASE = commands.KIND[commands.Release]
_BOOKKEEPING = frozenset({commands.Free, commands.Release, commands.Define, commands.Attach})


class Message(NamedTuple):
    """A command ready to be numbered and sent."""

    record: type[Any]
    flags: int
    body: bytes
    what: str  # for errors: the operation, as a user would call it
    writes: bool = False  # it can change existing tensors: waits while one is borrowed
    exporter: Exporter | None = None  # holds blocks of our arena until it is executed
    definitions: dict[bytes, bytes] | None = None


def plain(record: Any, what: str, *, writes: bool = False) -> Message:
    """A message that refers to nothing outside itself."""
    body = pickle.dumps(tuple(record), protocol=5)
    return Message(type(record), frames.PLAIN, body, what, writes)


class Borrow:
    """Somebody reads the worker's memory: commands that may write wait until it ends."""

    def __init__(self, query: int, *, scoped: bool) -> None:
        """``query``: number of the fetch whose exported blocks are read."""
        self.query = query
        self.thread = threading.get_ident() if scoped else None


class Link:
    """Commands to one worker, and what it answers."""

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
        self.owner = os.getpid()
        self.trash: deque[int] = deque()
        self.handles: dict[int, weakref.ref[Handle]] = {}
        self.failures = Failures(name)
        self.mapped: Mapped | None = None
        self.attached: set[str] = set()
        self.end: FedprocError | None = None
        self.lost_seen = True
        self.writes = 0
        self.submitted = 0
        self.lockstep: float | None = 0.0
        self._numbers = numbers
        self._lock = threading.RLock()
        self._shipped: set[bytes] = set()
        self._sites: deque[tuple[int, Site, str]] = deque()
        self._last = 0
        self._executed = 0
        self._answers: dict[int, Frame] = {}
        self._abandoned: set[int] = set()
        self._exporters: deque[tuple[int, Exporter]] = deque()
        self._borrows: list[Borrow] = []
        self._held: list[tuple[int, bytes]] = []
        self._written_at = 0.0

    # ---- submitting

    def submit(self, message: Message, site: Site, *, urgent: bool = False) -> int:
        """Number and send a command; returns its number at once.

        Args:
            message: the command.
            site: where the user issued it.
            urgent: somebody is about to wait for it.

        Raises:
            ClosedError: the cluster was closed, or this is a forked child.
            WorkerLostError: the worker's process has ended.
        """
        self.check()  # before the lock: in a forked child it may be held for ever
        with self._lock:
            if self.end is not None:
                self.check()
            if self.trash:
                self._free()
            if message.definitions:
                self._define(message.definitions)
            number = self._send(message, site)
        if urgent or time.monotonic() - self._written_at > BURST_SECONDS:
            self.flush()
        else:
            self.hub.tail()
        if self.lockstep != 0.0 and not urgent:
            self._in_step(number)
        elif number - self._executed > MOST_UNANSWERED and self._last - self._executed > 0:
            self._catch_up()
        return number

    def _send(self, message: Message, site: Site) -> int:
        number = next(self._numbers)
        kind = commands.KIND[message.record]
        frame = frames.pack(kind, message.flags, number, message.body)
        if message.writes:
            self.writes += 1
        if message.exporter is not None:
            self._exporters.append((number, message.exporter))
        if message.record not in _BOOKKEEPING:
            self._sites.append((number, site, message.what))
            self.submitted += 1
        self._last = number
        if self._borrows and (message.writes or self._held):
            self._held.append((number, frame))
        elif self.channel.append(frame) >= BURST_COMMANDS:
            self.flush()
        return number

    def _free(self) -> None:
        dropped = []
        while self.trash:
            dropped.append(self.trash.popleft())
            self.handles.pop(dropped[-1], None)
        self._send(plain(commands.Free(tuple(dropped)), "free"), Site.nowhere())

    def _define(self, definitions: dict[bytes, bytes]) -> None:
        for digest, code in definitions.items():
            if digest not in self._shipped:
                self._send(plain(commands.Define(digest, code), "define"), Site.nowhere())
                self._shipped.add(digest)

    def _in_step(self, number: int) -> None:
        self.flush()
        self.hub.wait_until(lambda: self.executed(number), self.lockstep)
        if self.lockstep is None:  # FEDPROC_SYNC: errors are raised where the call was made
            self.failures.raise_for(number)

    def _catch_up(self) -> None:
        self.flush()
        half = MOST_UNANSWERED // 2
        target = self._last
        self.hub.wait_until(lambda: self.end is not None or target - self._executed < half)

    def flush(self) -> bool:
        """Write what can be written; whether everything was."""
        self._written_at = time.monotonic()
        return self.channel.flush()

    def tidy(self) -> None:
        """Send the frees of dropped pointers, if the last command took none along."""
        if self.trash and self.end is None and self._lock.acquire(blocking=False):
            try:
                self._free()
            finally:
                self._lock.release()

    def note(self, handle: Handle) -> None:
        """Find ``handle`` by its id from now on."""
        self.handles[handle.oid] = weakref.ref(handle)

    def handle(self, oid: int) -> Handle | None:
        """The handle of an id, while somebody holds it."""
        found = self.handles.get(oid)
        return None if found is None else found()

    # ---- waiting

    def executed(self, number: int) -> bool:
        """Whether command ``number`` was executed, or never will be."""
        return self._executed >= number or self.end is not None

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
            raise self._late(what, timeout)
        if self._executed < number:
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
            arrived = self.hub.wait_until(
                lambda: number in self._answers or self.end is not None, timeout
            )
        except BaseException:
            self._abandon(number)
            raise
        if not arrived:
            self._abandon(number)
            raise self._late(what, timeout)
        frame = self._answers.pop(number, None)
        if frame is None:
            self.check()
            raise FedprocError(f"{what}: no answer from worker {self.name!r}")
        fields = pickle.loads(frame.body)
        if frame.kind == _REFUSAL:
            self.failures.refused(number, *fields)
            raise AssertionError("unreachable: refused() raises")
        return fields[1]

    def _abandon(self, number: int) -> None:
        # First the note, then the look: whichever way the leader is just going, it or we release.
        self._abandoned.add(number)
        if self._answers.pop(number, None) is not None:
            self._abandoned.discard(number)
            self.release(number)

    def _late(self, what: str, timeout: float | None) -> CommandTimeoutError:
        return CommandTimeoutError(
            f"{what}: worker {self.name!r} was not done within {timeout:g} s. The command goes on "
            "and the object is unchanged: ask again, or end the worker with worker.kill()."
        )

    def refuse_deadlock(self, number: int) -> None:
        """Refuse to wait in a borrow block for what waits for the end of that block.

        Raises:
            FedprocError: this would wait for ever.
        """
        if not self._held or number < self._held[0][0]:
            return
        if any(borrow.thread == threading.get_ident() for borrow in self._borrows):
            raise FedprocError(
                f"this would wait for ever: the command on worker {self.name!r} may write, so it "
                "waits for the end of the `with pointer.borrow()` block it is waited for in. Use "
                "its result after the block."
            )

    # ---- receiving (the leader of the hub)

    @property
    def unsent(self) -> bool:
        """Whether something is still to be written."""
        return self.channel.unsent

    def fileno(self) -> int:
        """Descriptor to poll, -1 when the link has ended."""
        return -1 if self.end is not None else self.channel.fileno()

    def receive(self) -> None:
        """Take in what has arrived."""
        try:
            self.channel.receive(self._take)
        except frames.ProtocolError as error:
            self.lose(f"the stream is out of step: {error}")
            return
        if self.channel.ended:
            self.lose("its process ended")

    def _take(self, frame: Frame) -> None:
        # May see a frame twice (see Channel.receive): every step here can be repeated.
        number = frame.sequence
        if frame.kind == _FAILED:
            self.failures.add(number, self._site(number), *pickle.loads(frame.body))
        elif frame.kind in (_VALUE, _REFUSAL):
            if frame.kind == _REFUSAL:
                self.failures.note_site(number, self._site(number))
            if number in self._abandoned:
                self._abandoned.discard(number)
                self.release(number)
            else:
                self._answers[number] = frame
        elif number == 0:
            self._answers[0] = frame
        self._executed = max(self._executed, number)
        while self._sites and self._sites[0][0] <= self._executed:
            self._sites.popleft()
        while self._exporters and self._exporters[0][0] <= self._executed:
            self._exporters.popleft()[1].release()

    def _site(self, number: int) -> Site:
        return next((site for n, site, _ in self._sites if n == number), Site.nowhere())

    def greeted(self) -> bool:
        """Whether the worker serves, or never will."""
        return 0 in self._answers or self.end is not None or self.failures.failed(0)

    def greeting(self) -> int:
        """Bytes of the worker's arena, told when it serves.

        Raises:
            RemoteError, WorkerLostError: it does not.
        """
        self.failures.raise_for(0)
        self.check()
        return int(pickle.loads(self._answers.pop(0).body)[1])

    @staticmethod
    def usual_lockstep(*, inline: bool) -> float:
        """How long a command may take before the parent goes on, in seconds."""
        return LOCKSTEP_SECONDS if inline else 0.0

    # ---- borrowing

    def borrow(self, message: Message, site: Site, *, scoped: bool) -> Borrow:
        """Send a query that exports memory; from it on, commands that may write wait.

        Args:
            message: the query.
            site: where it was issued.
            scoped: the user holds it in a ``with`` block, and could wait for himself in it.
        """
        with self._lock:  # nobody gets a write in between
            borrow = Borrow(self.submit(message, site, urgent=True), scoped=scoped)
            self._borrows.append(borrow)
        return borrow

    def give_back(self, borrow: Borrow) -> None:
        """The end of a borrow: what waited for it goes out."""
        with self._lock:
            self._borrows.remove(borrow)
            self.release(borrow.query)
            if not self._borrows:
                held, self._held = self._held, []
                for _, frame in held:
                    self.channel.append(frame)
                if held:
                    self.flush()

    def release(self, query: int) -> None:
        """The blocks that answered ``query`` are not read any more."""
        if self.end is None:
            body = pickle.dumps(((query,),), protocol=5)
            # Number 0: it overtakes what a borrow holds back, so it must not count as progress.
            self.channel.append(frames.pack(_RELEASE, frames.PLAIN, 0, body))
            self.hub.tail()

    # ---- the end

    def check(self) -> None:
        """Refuse the use of a link that has ended.

        Raises:
            ClosedError: closed, or this is a forked child.
            WorkerLostError: the worker's process ended.
        """
        if self.owner != os.getpid():
            raise ClosedError(
                f"worker {self.name!r} belongs to process {self.owner}, from which this one was "
                "forked. Make a Cluster of its own in the child."
            )
        if self.end is not None:
            self.lost_seen = True
            raise copy.copy(self.end)

    def lose(self, why: str) -> None:
        """The worker is gone: everything pending on it has failed."""
        with self._lock:
            if self.end is not None:
                return
            pending = [what for number, _, what in self._sites if number > self._executed]
            code = self.process.wait(LOST_SECONDS) if self.process.pid != os.getpid() else None
            self.lost_seen = not pending
            self.end = WorkerLostError(
                f"worker {self.name!r} (process {self.process.pid}) is gone: {why}"
                f"{_ending(code)}. {_last_words(pending)}Its objects are lost; send them again to "
                'another worker, or use Cluster(restart=True) and cluster["' + self.name + '"].',
                worker=self.name,
                exitcode=code,
                last_command=pending[0] if pending else None,
            )
        self._drop_everything()
        self.hub.remove(self)

    def close(self) -> None:
        """The cluster was closed: whoever uses a pointer is told so."""
        with self._lock:
            if self.end is None:
                self.lost_seen = True
                self.end = ClosedError(
                    f"the cluster of worker {self.name!r} is closed; its objects are gone. "
                    "Fetch what you need before the end of the `with` block."
                )
        self._drop_everything()

    def abandon(self) -> None:
        """In a forked child: let go of the descriptors; the parent's are not touched."""
        self.channel.close()
        self.side.close()

    def _drop_everything(self) -> None:
        while self._exporters:
            self._exporters.popleft()[1].release()
        self._held.clear()
        self.channel.close()
        self.side.close()
        if self.mapped is not None:
            self.mapped.close()

    def exitcode(self) -> int | None:
        """Exit code of the process, None while it runs and for inline workers."""
        return None if self.process.pid == self.owner else self.process.poll()

    def kill(self) -> None:
        """End the process now; its end is noticed like any other."""
        self.process.kill()
        self.hub.wait_until(lambda: self.end is not None, LOST_SECONDS)

    def pending(self) -> bool:
        """Whether commands are still to be executed."""
        return self.end is None and self._executed < self._last

    @property
    def last(self) -> int:
        """Number of the newest command."""
        return self._last

    def unseen(self) -> Iterator[tuple[int, Any]]:
        """Errors that nobody has looked at: (number, function that raises it)."""
        yield from self.failures.unseen()
        if isinstance(self.end, WorkerLostError) and not self.lost_seen:
            yield self._executed + 1, self.check


def _ending(code: int | None) -> str:
    if code is None:
        return ""
    if code >= 0:
        return f" with exit code {code}"
    import signal

    name = signal.Signals(-code).name
    hint = " (the kernel does this when memory runs out: see `dmesg`)" if code == -9 else ""
    return f" by {name}{hint}"


def _last_words(pending: list[str]) -> str:
    return (
        f"It had not finished {len(pending)} command(s), first `{pending[0]}`. " if pending else ""
    )
