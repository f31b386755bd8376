"""Waiting on behalf of event loops. Runs in the parent, in a thread of its own.

A task must not wait in the hub: it would stop its loop. So it leaves a note (link, number of a
command, whom to call), and the *herald* waits in the hub as any thread does: it leads when nobody
else reads, and follows otherwise. When the command is executed, or never will be, it calls.

::

      task: note --> [SimpleQueue] --> herald: hub.wait_until(some noted command is done)
        ^                                 |
        +---- loop.call_soon_threadsafe --+

There is one herald per hub, started by the first note; nothing is polled. The descriptors of the
links are not given to the loop (``loop.add_reader``): a link may be closed by any thread at any
time, and a selector that still holds a closed descriptor breaks when its number is used again.

Notes go through a ``SimpleQueue`` because its ``put`` is one step of the interpreter: a Ctrl-C in
the thread of the loop cannot come in its middle.
"""

import asyncio
import heapq
import itertools
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fedproc.remote.hub import Hub
    from fedproc.remote.link import Link


class Note(NamedTuple):
    """Call ``call`` when command ``number`` of ``link`` is executed, or never will be.

    Notes are ordered by number; ``tie`` keeps equal numbers from comparing links.
    """

    number: int
    tie: int
    link: "Link"
    call: Callable[[], None]


class Herald:
    """Tells tasks what has been executed."""

    def __init__(self, hub: "Hub") -> None:
        """Wait in ``hub``; the thread is started by the first note."""
        self._hub = hub
        self._new: SimpleQueue[Note | None] = SimpleQueue()  # None: the end
        self._waiting: dict[Link, list[Note]] = {}  # the herald's own: a heap per link
        self._ties = itertools.count()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._ended = False

    def note(self, link: "Link", number: int, call: Callable[[], None]) -> None:
        """Have ``call`` called, in any thread, once or twice; it must not wait or raise."""
        if self._thread is None:
            self._start()
        self._new.put(Note(number, next(self._ties), link, call))
        # Done already, or the herald has ended: nothing may come any more that wakes it.
        if link.executed(number):
            call()

    def _start(self) -> None:
        with self._starting:
            if self._thread is None and not self._ended:
                thread = threading.Thread(target=self._serve, name="fedproc-herald", daemon=True)
                thread.start()
                self._thread = thread

    def close(self) -> None:
        """End the thread; the links have ended, so every call is made."""
        with self._starting:
            self._ended = True
            thread, self._thread = self._thread, None
        self._new.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _serve(self) -> None:
        while not self._ended:
            if not self._waiting:
                self._take(self._new.get())
            self._hub.wait_until(self._something_to_tell)
            self._tell()
        self._something_to_tell()
        self._tell()

    def _take(self, note: Note | None) -> None:
        if note is not None:
            heapq.heappush(self._waiting.setdefault(note.link, []), note)

    def _something_to_tell(self) -> bool:
        """Also takes in new notes: it is asked again after every read."""
        try:
            while True:
                self._take(self._new.get_nowait())
        except Empty:
            pass
        if self._ended or not self._waiting:
            return True
        return any(link.executed(heap[0].number) for link, heap in self._waiting.items())

    def _tell(self) -> None:
        for link, heap in list(self._waiting.items()):
            while heap and link.executed(heap[0].number):
                heapq.heappop(heap).call()
            if not heap:
                del self._waiting[link]


async def executed(link: "Link", number: int) -> None:
    """Wait on the running loop until command ``number`` of ``link`` is executed, or never will be.

    Raises:
        FedprocError: it waits for a borrow of this task.
    """
    link.refuse_deadlock(number, awaiting=True)
    if not link.flush():
        link.hub.tail()
    if link.executed(number):
        await asyncio.sleep(0)  # a task that only awaits what is done must not starve the others
        return
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    link.hub.herald.note(link, number, lambda: call_soon(loop, _settle, done))
    await done


def call_soon(loop: asyncio.AbstractEventLoop, call: Callable[..., Any], *args: Any) -> None:
    """Call in the loop's thread; a loop that was closed needs nothing any more."""
    try:
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise


def _settle(done: "asyncio.Future[None]") -> None:
    if not done.done():  # cancelled, or told twice
        done.set_result(None)
