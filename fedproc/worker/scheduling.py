"""How Linux schedules a worker: behind whoever gives it work, in long turns. Runs in the worker."""

import contextlib
import ctypes
import os
import platform
import struct

TURN_SECONDS = 0.02
"""How long a worker computes before another that waits for its core has a turn."""

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}.get(platform.machine())
_ATTRIBUTES = struct.Struct("IIQiIQQQ")  # size, class, flags, nice, priority, slice, two unused


def work_in_long_turns() -> None:
    """Make this process one of the batch class, with a long slice.

    Linux likes to wake a process where its waker runs, and lets it run at once: the parent, in the
    middle of giving work to the other workers, then stands still for milliseconds, and so does a
    worker whose command it has not written yet. A process of the batch class gets its share of the
    processor all the same, but waits until the waker sleeps or another core is idle.

    Where more workers compute than there are cores, they take turns of one to three milliseconds,
    and each finds the caches full of another's data: training took 1.1 to 1.2 times as long. A
    process with short turns, such as the parent, may still interrupt a long one when it wakes up.

    Somebody who has chosen another class for the parent has chosen it for its workers, too.
    """
    # where there is no such class, or a container forbids choosing one, only time is lost
    with contextlib.suppress(OSError):
        if hasattr(os, "SCHED_BATCH") and os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            _set_slice(os.SCHED_BATCH)


def _set_slice(kind: int) -> None:
    """Asks for the turns; Linux before 6.12 has none to choose, and ignores it."""
    if _SCHED_SETATTR is None:
        return
    nice, nanoseconds = os.getpriority(os.PRIO_PROCESS, 0), int(TURN_SECONDS * 1e9)
    wanted = _ATTRIBUTES.pack(_ATTRIBUTES.size, kind, 0, nice, 0, nanoseconds, 0, 0)
    ctypes.CDLL(None).syscall(_SCHED_SETATTR, 0, wanted, 0)
