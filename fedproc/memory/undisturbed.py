"""Ctrl-C put off while something is in pieces: a process, the tables of an arena. In the parent.

Starting a worker takes some twenty steps, each of which opens or hands over a descriptor; ending
one has as many. KeyboardInterrupt between two of them would leave a process, a pipe or a mapping
that nobody knows of. So it comes after the last of them: what was begun is then whole and noted.
Memory is handed out in several steps, too; between two of them a range is neither free nor taken.
"""

import contextlib
import threading

# What module signal wraps, which looks for an enum each time: 20 us of a block in shared memory.
from _signal import getsignal, signal  # type: ignore[import-not-found]
from collections.abc import Iterator
from signal import SIGINT
from types import FrameType

from fedproc.errors import FedprocError


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C during the body is handled at its end, by the handler that was installed before.

    Python runs handlers in the main thread only: in any other the body cannot be interrupted
    anyway. A handler that is not a Python function cannot be put off, nor does it raise.
    """
    installed = getsignal(SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(installed):
        yield
        return
    came: list[FrameType | None] = []

    def note(_number: int, frame: FrameType | None) -> None:
        came.append(frame)

    signal(SIGINT, note)
    try:
        yield
    finally:
        # What came until now is noted by this call itself, what comes later is not ours.
        signal(SIGINT, installed)
        if came:
            installed(SIGINT, came[0])


class SteadyLock:
    """A lock whose holder Ctrl-C does not disturb; for what is in pieces while it is held.

    Other signal handlers of the holding thread run in the middle. There they are refused the lock:
    they would wait for the code that they have interrupted.
    """

    def __init__(self) -> None:
        """Free."""
        self._lock = threading.Lock()
        self._holder = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold it for the length of the body.

        Raises:
            FedprocError: this is a signal handler that has interrupted its holder.
        """
        here = threading.get_ident()
        if self._holder == here:
            raise FedprocError(
                "a signal handler cannot use shared memory here: it has interrupted its own thread "
                "while that changes it. Set a flag in it and act on it outside."
            )
        with undisturbed(), self._lock:
            self._holder = here
            try:
                yield
            finally:
                self._holder = 0
