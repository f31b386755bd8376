"""The signal that makes a worker process show its stack. Used by parent, zygote and worker.

The worker hands it to ``faulthandler``, which writes the stack of the thread that is interrupted.
So it must be the main thread: a signal to the process as a whole may be taken by any of its
threads, also by one of torch's own, which has no Python stack.
"""

import ctypes
import signal

STACK_SIGNAL = signal.SIGRTMIN + 10
"""A real-time signal: two of them are not taken for one, and hardly anybody else uses this one."""


def send(pid: int) -> None:
    """Interrupt the main thread of process ``pid``; nothing happens if it has ended."""
    ctypes.CDLL(None).tgkill(pid, pid, int(STACK_SIGNAL))
