"""Ctrl-C put off while a process is started or ended. Runs in the parent.

Starting a worker takes some twenty steps, each of which opens or hands over a descriptor; ending
one has as many. KeyboardInterrupt between two of them would leave a process, a pipe or a mapping
that nobody knows of. So it comes after the last of them: what was begun is then whole and noted.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C during the body is handled at its end, by the handler that was installed before.

    Python runs handlers in the main thread only: in any other the body cannot be interrupted
    anyway. A handler that is not a Python function cannot be put off, nor does it raise.
    """
    installed = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(installed):
        yield
        return
    came: list[FrameType | None] = []

    def note(_number: int, frame: FrameType | None) -> None:
        came.append(frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        # What came until now is noted by this call itself, what comes later is not ours.
        signal.signal(signal.SIGINT, installed)
        if came:
            installed(signal.SIGINT, came[0])
