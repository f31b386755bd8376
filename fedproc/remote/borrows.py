"""Who reads the memory of a worker: what may write there waits for them. Runs in the parent."""

import asyncio
import threading
import weakref
from collections import deque
from typing import Any

from fedproc.errors import FedprocError


class Borrow:
    """Somebody reads the worker's memory: commands that may write wait until it ends."""

    _among: "Borrows | None" = None  # while it lasts

    def __init__(self, *, scoped: bool) -> None:
        """``scoped``: the user holds it in a ``with`` block, which is his code to the end."""
        self.query = 0
        self.answered = True  # its query is one; else the memory is read without an answer
        self.exported = True  # blocks of the worker, as far as is known
        self.scoped = scoped
        self.thread = threading.get_ident()
        self.task = _current_task() if scoped else None

    @property
    def lasts(self) -> bool:
        """Whether it has begun and not ended."""
        return self._among is not None

    def __del__(self) -> None:
        """An interrupt took away whoever would have ended it: leave a note, as all finalizers."""
        if self._among is not None:
            self._among.orphans.append((self.query, self.answered))


class Borrows:
    """The borrows of one worker."""

    def __init__(self) -> None:
        """None yet."""
        # By the number of the query; weakly: one that was interrupted is gone with who held it.
        self.reading: dict[int, weakref.ref[Borrow]] = {}
        self.orphans: deque[tuple[int, bool]] = deque()  # queries of those, whether answered

    def begin(self, borrow: Borrow, query: int) -> None:
        """The query is sent: ``query`` is its number."""
        borrow.query = query
        borrow._among = self
        self.reading[query] = weakref.ref(borrow)

    def read_a_copy(self, borrow: Borrow) -> None:
        """What is read does not change: writes need not wait, but the blocks are still in use."""
        self.reading.pop(borrow.query, None)

    def end(self, borrow: Borrow) -> None:
        """Nothing is read any more."""
        self.reading.pop(borrow.query, None)
        borrow._among = None

    def hold(self, number: int) -> bool:
        """Whether somebody reads for whom command ``number`` has to wait, if it may write.

        A borrow whose query comes after it does not read yet: it must not hold itself.
        """
        # of a copy: finalizers, which may run at any moment, fetch and end borrows of their own
        found = self.reading.copy().items()
        return any(query < number and ref() is not None for query, ref in found)

    def refuse_own(self, number: int, worker: str, *, awaiting: bool) -> None:
        """Refuse to wait for command ``number``, which this thread or task holds back itself.

        Raises:
            FedprocError: this would wait for ever.
        """
        here = threading.get_ident()
        readers = [b for ref in self.reading.copy().values() if (b := ref()) is not None]
        mine = [borrow for borrow in readers if borrow.thread == here and borrow.query < number]
        if awaiting:
            mine = [borrow for borrow in mine if borrow.task is _current_task()]
        if mine:
            where = "`with pointer.borrow()` block" if mine[0].scoped else "get() or fetch()"
            raise FedprocError(
                f"this would wait for ever: the command on worker {worker!r} may write, so it "
                f"waits for the end of the {where} it is waited for in. Use its result after that."
            )


def _current_task() -> "asyncio.Task[Any] | None":
    loop = asyncio._get_running_loop()  # in a thread without one, current_task raises: 5 us
    return None if loop is None else asyncio.current_task(loop)
