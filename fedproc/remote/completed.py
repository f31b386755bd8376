"""Pointers in the order in which they are done, for threads and for event loops. Parent."""

import asyncio
import time
import weakref
from collections import deque
from collections.abc import Iterable

from fedproc.errors import CommandTimeoutError
from fedproc.ranges import deadline_of
from fedproc.remote.gathering import pointers_among
from fedproc.remote.herald import call_soon
from fedproc.remote.pointer import Pointer


class Completed:
    """What ``as_completed`` gives: to be used in ``for`` or in ``async for``."""

    def __init__(self, pointers: Iterable[Pointer], timeout: float | None) -> None:
        """``timeout``: seconds from now."""
        self._waiting = pointers_among(pointers, "as_completed needs")
        self._ready: deque[Pointer] = deque()
        self._timeout = timeout
        self._deadline = deadline_of(timeout)
        self._noted: asyncio.AbstractEventLoop | None = None
        self._came: asyncio.Future[None] | None = None
        for pointer in self._waiting:
            handle = pointer._data()
            handle.link.check_process()
            if not handle.link.flush():
                handle.link.hub.tail()

    def _look(self) -> bool:
        """Whether one can be given; those that are done change lists."""
        if not self._ready:
            states = [(pointer, _is_done(pointer)) for pointer in self._waiting]
            self._ready.extend(pointer for pointer, done in states if done)
            self._waiting = [pointer for pointer, done in states if not done]
        return bool(self._ready)

    def _left(self) -> float | None:
        return None if self._deadline is None else self._deadline - time.monotonic()

    def _late(self) -> CommandTimeoutError:
        names = ", ".join(sorted({repr(p._data().link.name) for p in self._waiting}))
        return CommandTimeoutError(
            f"as_completed: {len(self._waiting)} of the pointers, on {names}, "
            f"were not done within {self._timeout:g} s. They go on; ask again."
        )

    # ---- in a thread

    def __iter__(self) -> "Completed":
        """Itself: it can be gone through once."""
        return self

    def __next__(self) -> Pointer:
        """Wait for one that is done.

        Raises:
            CommandTimeoutError: none within what is left of ``timeout``.
        """
        if not self._look():
            if not self._waiting:
                raise StopIteration
            handles = [pointer._data() for pointer in self._waiting]
            for handle in handles:
                handle.link.refuse_deadlock(handle.number)
            left = self._left()
            if (left is not None and left <= 0) or not handles[0].link.hub.wait_until(
                self._look, left
            ):
                raise self._late()
        return self._ready.popleft()

    # ---- on an event loop

    def __aiter__(self) -> "Completed":
        """Itself: it can be gone through once."""
        return self

    async def __anext__(self) -> Pointer:
        """Wait on the running loop for one that is done.

        Raises:
            CommandTimeoutError: none within what is left of ``timeout``.
        """
        loop = asyncio.get_running_loop()
        if self._noted is not loop:
            self._noted = loop
            self._note(loop)
        while not self._look():
            if not self._waiting:
                raise StopAsyncIteration
            for pointer in self._waiting:
                handle = pointer._data()
                handle.link.refuse_deadlock(handle.number, awaiting=True)
            self._came = loop.create_future()
            left = self._left()
            if left is not None and left <= 0:
                raise self._late()
            await asyncio.wait([self._came], timeout=left)
        return self._ready.popleft()

    def _note(self, loop: asyncio.AbstractEventLoop) -> None:
        """Once for all pointers: each tells this loop when it is done."""
        this = weakref.ref(self)  # an iteration that was left keeps no object alive
        for pointer in self._waiting:
            handle = pointer._data()
            herald = handle.link.hub.herald
            herald.note(handle.link, handle.number, lambda: call_soon(loop, _wake, this))


def _wake(this: "weakref.ref[Completed]") -> None:
    completed = this()
    if completed is not None and completed._came is not None and not completed._came.done():
        completed._came.set_result(None)


def _is_done(pointer: Pointer) -> bool:
    handle = pointer._data()
    return handle.gone is not None or handle.link.executed(handle.number)


def as_completed(pointers: Iterable[Pointer], timeout: float | None = None) -> Completed:
    """The pointers in the order in which they are done, failed ones too.

    To be used in ``for``, or on an event loop in ``async for``: then other tasks run meanwhile.

    Args:
        pointers: of one cluster.
        timeout: seconds from this call; None: as long as the workers live.

    Raises:
        TypeError: something that is no pointer.
        CommandTimeoutError: while iterating: the time has passed and some are not done.
        ClosedError: this is a forked child.
    """
    return Completed(pointers, timeout)
