"""The parent's record of a remote object. Runs in the parent.

A ``Handle`` says where an object is; all pointers to the object share it, so when it moves they
follow.
"""

import weakref
from typing import TYPE_CHECKING, Any

from fedproc.errors import ObjectGoneError

if TYPE_CHECKING:
    from fedproc.remote.link import Link


class Handle:
    """Where an object is, and what is known of it."""

    # What most handles never hold stands here: every command makes one.
    gone: str | None = None  # why it cannot be used any more
    taken = False  # a thread is bringing it home
    facts: dict[str, Any] | None = None  # kind, shape ... as last told
    facts_at = -1  # link.outbox.writes when they were
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

    def check(self) -> None:
        """Refuse the use of what is gone.

        Raises:
            ObjectGoneError: fetched, moved away as a chain, or cleared.
        """
        if self.gone is not None:
            raise ObjectGoneError(self.gone)

    def take(self) -> None:
        """Only one thread brings an object home.

        Raises:
            ObjectGoneError: it is gone, or another thread is doing it.
        """
        self.check()
        self.link.check()
        with self.link.outbox.lock:
            if self.taken:
                raise ObjectGoneError(
                    f"object {self.oid} is being brought home from worker {self.link.name!r} by "
                    "another thread; only one get() can have it."
                )
            self.taken = True

    def moved(self, link: "Link", oid: int, number: int) -> None:
        """The object is elsewhere now."""
        self.link.outbox.handles.pop(self.oid, None)
        self.link, self.oid, self.number = link, oid, number
        self.facts_at = -1  # a cut graph changes requires_grad and is_leaf
        link.note(self)

    def drop(self) -> None:
        """Nobody needs the object any more: note its id.

        Called by finalizers, so nothing else is allowed here: they run in any thread, in the middle
        of anything, and one that locks or writes has deadlocked every system that had it.
        """
        if self.gone is None:
            self.link.trash.append(self.oid)
