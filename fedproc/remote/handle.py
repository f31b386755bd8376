"""The parent's record of a remote object. Runs in the parent.

A ``Handle`` says where an object is; all pointers to the object share it, so when it moves they
follow.
"""

import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fedproc.errors import ObjectGoneError
from fedproc.remote.ending import late, reentered

if TYPE_CHECKING:
    from fedproc.remote.link import Link


class Handle:
    """Where an object is, and what is known of it."""

    # What most handles never hold stands here: every command makes one.
    gone: str | None = None  # why it cannot be used any more
    # By the thread that brings it home or moves it; weakly: Ctrl-C on the way into the end of that
    # block leaves nothing else that would tell of its end.
    taken: "weakref.ref[TakenAway] | None" = None
    facts: dict[str, Any] | None = None  # kind, shape ... as last told
    facts_at = -1  # link.outbox.writes when they were
    place: "tuple[Link, int, list[Any]] | None" = None  # see ``reading._lent``
    labels: tuple[frozenset[str], str] = (frozenset(), "")  # tags, description
    whole: "Handle | None" = None  # of what this is a part, and where in it
    path: tuple[Any, ...] = ()
    parts: "weakref.WeakSet[Handle] | None" = None  # handles of parts that are held

    def __init__(self, link: "Link", oid: int) -> None:
        """Object ``oid`` of the worker behind ``link``."""
        self.link = link
        self.oid = oid
        self.number = oid  # of the command that makes it

    def is_part_of(self, other: "Handle", path: tuple[Any, ...]) -> None:
        """Follow ``other`` (or what that is itself a part of) when it moves."""
        whole = other.whole or other
        self.whole, self.path = whole, other.path + path
        if whole.parts is None:
            whole.parts = weakref.WeakSet()
        whole.parts.add(self)

    def taker(self) -> "TakenAway | None":
        """Who brings it home or moves it just now."""
        return None if self.taken is None else self.taken()

    def check(self) -> None:
        """Refuse the use of what is gone.

        Raises:
            ObjectGoneError: fetched, moved away as a chain, or cleared.
        """
        if self.gone is not None:
            raise ObjectGoneError(self.gone)

    def brought_home(self, ids: Iterable[int]) -> None:
        """The value is in this process now; ``ids``: all that the object has in its worker."""
        link, oid = self.link, self.oid
        link.outbox.remove(oid)
        gone = (
            f"object {oid} was brought home from worker {link.name!r} with get(): it is not there "
            "any more. Use the value that get() returned, or fetch() next time."
        )
        for each in (self, *filter(None, map(link.handle, ids))):
            each.gone = gone
        link.outbox.handles.pop(oid, None)

    def moved(self, link: "Link", oid: int, number: int) -> None:
        """The object is elsewhere now."""
        self.link.outbox.handles.pop(self.oid, None)
        self.link, self.oid, self.number = link, oid, number
        self.facts_at = -1  # a cut graph changes requires_grad and is_leaf
        self.place = None
        link.note(self)

    def drop(self) -> None:
        """Nobody needs the object any more: note its id.

        Called by finalizers, so nothing else is allowed here: they run in any thread, in the middle
        of anything, and one that locks or writes has deadlocked every system that had it.
        """
        if self.gone is None:
            self.link.trash.append(self.oid)


class TakenAway:
    """A block in which this thread brings an object home or moves it; others wait for its end.

    Raises:
        ObjectGoneError: it is gone, perhaps since the other thread has it.
        CommandTimeoutError: the other thread was not done within ``timeout`` seconds.
        FedprocError: a signal handler would wait for what it has interrupted.
    """

    def __init__(self, handle: Handle, what: str, timeout: float | None = None) -> None:
        """``what``: the operation, for errors."""
        self._handle = handle
        self._what = what
        self._timeout = timeout
        self._thread = threading.get_ident()

    def __enter__(self) -> None:
        """Wait for who has it, and take it."""
        handle, link = self._handle, self._handle.link
        try:
            while (other := self._take()) is not None:
                if other._thread == self._thread:
                    raise reentered(link.name, self._what)
                if not link.hub.wait_until(lambda: handle.taker() is None, self._timeout):
                    raise late(link.name, self._what, self._timeout)
        except BaseException:  # also when Ctrl-C came right after it was taken
            self.__exit__()
            raise

    def _take(self) -> "TakenAway | None":
        """Take it, or tell who has it."""
        handle = self._handle
        handle.check()
        handle.link.check()
        with handle.link.outbox.lock:
            other = handle.taker()
            if other is None:
                handle.taken = weakref.ref(self)
            return other

    def __exit__(self, *_: object) -> None:
        """Let others have it."""
        if self._handle.taker() is self:
            self._handle.taken = None
            self._handle.link.hub.notify()
