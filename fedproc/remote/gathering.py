"""The values of several pointers at once. Runs in the parent."""

import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fedproc.errors import ArenaFullError, with_article
from fedproc.ranges import deadline_of
from fedproc.remote import reading
from fedproc.remote.borrows import Borrow
from fedproc.remote.handle import TakenAway
from fedproc.remote.link import Link
from fedproc.remote.outbox import BURST_COMMANDS
from fedproc.remote.pointer import Pointer


def pointers_among(given: Iterable[Pointer], what: str) -> list[Pointer]:
    """``given`` as a list.

    Args:
        given: what a user passes as pointers.
        what: who does what with them, for the error.

    Raises:
        TypeError: something that is no pointer.
    """
    try:
        found = iter(given)
    except TypeError as error:
        came = with_article(type(given).__qualname__)
        raise TypeError(f"{what} a list of pointers, not {came}") from error
    pointers = list(found)
    for pointer in pointers:
        if not issubclass(type(pointer), Pointer):
            came = with_article(type(pointer).__qualname__)
            raise TypeError(f"{what} pointers, not {came}")
    return pointers


def gather(pointers: Iterable[Pointer], timeout: float | None = None) -> list[Any]:
    """Copies of the values of several pointers, waited for together.

    Raises:
        Exception: the first error in the order of the arguments, after all are done.
        TypeError: something that is no pointer; nothing was asked for.
        CommandTimeoutError: not all done within ``timeout`` seconds.
    """
    wanted = pointers_among(pointers, "gather needs")
    return [value for value, _ in _together(wanted, timeout)]


def bring_home(pointers: Sequence[Pointer], timeout: float | None = None) -> list[Any]:
    """The values of several pointers; the objects are gone afterwards, all of them or none.

    Errors as of ``gather``; an object that another thread has taken is gone.
    """
    if any(pointer._chain is not None for pointer in pointers):
        gather(pointers, timeout)  # raises what stands in the way of any
        return [pointer.get() for pointer in pointers]
    handles = [pointer._handle for pointer in pointers]
    # in one order everywhere: two threads with the same members would wait for each other
    taken = [TakenAway(handle, "get", timeout) for handle in sorted(handles, key=id)]
    try:  # no ExitStack: Ctrl-C on the way into its end would leave all of them taken
        for each in taken:
            each.__enter__()
        found = _together(pointers, timeout)
        for handle, (_, ids) in zip(handles, found, strict=True):
            handle.brought_home(ids)
    finally:
        for each in taken:
            each.__exit__()
    return [value for value, _ in found]


def _together(pointers: Sequence[Pointer], timeout: float | None) -> list[tuple[Any, Any]]:
    """Value and ids of every object."""
    deadline = deadline_of(timeout)
    asked = _ask_all(pointers)
    found = [_gathered(one, deadline) for one in asked]
    for place, one in enumerate(found):
        # All together had no room in the worker's memory; the others have left by now.
        if isinstance(one, _Failed) and isinstance(one.error, ArenaFullError):
            found[place] = _gathered(_ask(pointers[place]), deadline)
    failed = [place for place, one in enumerate(found) if isinstance(one, _Failed)]
    if failed:
        _leave_unseen([asked[place] for place in failed])
    for one in found:
        if isinstance(one, _Failed):
            raise one.error
    return [one for one in found if not isinstance(one, _Failed)]


def _leave_unseen(failed: "list[_Asked | _Failed]") -> None:
    """Only the first error is raised: the others are still to be told by somebody else."""
    first, *others = failed
    raised = None if isinstance(first, _Failed) else first.cause
    for other in others:
        if isinstance(other, _Asked) and other.is_news and other.cause != raised:
            other.link.failures.unsee(other.oid)


class _Failed:
    """In place of a value; an exception may itself be a value."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Asked(NamedTuple):
    """A value on its way. ``is_news``: that its object failed was not known, or told to nobody."""

    link: Link
    borrow: Borrow
    oid: int
    is_news: bool

    @property
    def cause(self) -> tuple[Link, int]:
        """What made its object fail, if it did: the first command that failed."""
        return self.link, self.link.failures.cause(self.oid)


def _ask_all(pointers: Sequence[Pointer]) -> "list[_Asked | _Failed]":
    """Ask for all; what is asked is written in bursts, so that workers begin with the first."""
    asked: list[_Asked | _Failed] = []
    for start in range(0, len(pointers), BURST_COMMANDS):
        burst = [_ask(pointer) for pointer in pointers[start : start + BURST_COMMANDS]]
        for link in {one.link for one in burst if isinstance(one, _Asked)}:
            link.flush()
        asked += burst
    return asked


def _ask(pointer: Pointer) -> "_Asked | _Failed":
    try:
        handle = pointer._data()
        link, oid = handle.link, handle.oid
        is_news = not link.failures.is_seen(oid)
        return _Asked(link, reading.start(link, handle, "gather", more=True), oid, is_news)
    except Exception as error:  # noqa: BLE001 - raised when all have been waited for
        return _Failed(error)


def _gathered(
    asked: "_Asked | _Failed", deadline: float | None
) -> "tuple[Any, tuple[int, ...]] | _Failed":
    if isinstance(asked, _Failed):
        return asked
    left = None if deadline is None else max(0.0, deadline - time.monotonic())
    try:
        return reading.finish_with_ids(asked.link, asked.borrow, "gather", left)
    except Exception as error:  # noqa: BLE001 - raised when all have been waited for
        return _Failed(error)
