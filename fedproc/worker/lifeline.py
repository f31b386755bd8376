"""How a process dies with its parent. Runs in worker and zygote; imports nothing heavy."""

import fcntl
import os
import signal

F_SETSIG = 10
"""fcntl: which signal O_ASYNC sends; Linux, not in module fcntl."""


def hold_lifeline(descriptor: int) -> None:
    """Ask the kernel to kill this process when the write end of the pipe is closed.

    That end is in the parent alone, so the parent's death kills us, whatever we are doing, C code
    that holds the interpreter included. (PR_SET_PDEATHSIG would fire when the *thread* that
    forked us ends.)
    """
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(descriptor, F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
    try:
        if os.read(descriptor, 1) == b"":
            os._exit(1)  # it was closed before we asked
    except BlockingIOError:
        pass


def let_go(descriptor: int) -> None:
    """The closing of the pipe no longer kills this process."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_ASYNC)
    os.close(descriptor)
