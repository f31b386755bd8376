"""The inline transport: the worker's loop in a thread of the parent process.

For breakpoints and for tests without processes. The loop is named, not imported: this package
knows nothing of what a worker does.
"""

import importlib
import os
import socket
import sys
import threading
import traceback

from fedproc.errors import WorkerStartError
from fedproc.transport.base import Connection, WorkerSpec
from fedproc.transport.channel import Channel, open_channel

ENTRY = ("fedproc.worker.main", "serve_inline")
END_SECONDS = 2.0


class InlineProcess:
    """A thread, seen as a process."""

    def __init__(self, thread: threading.Thread, channel: Channel) -> None:
        """``channel``: the worker's end; closing it ends the loop."""
        self.pid = os.getpid()
        self._thread = thread
        self._channel = channel

    def poll(self) -> int | None:
        """None while the thread runs, and 0 afterwards."""
        return None if self._thread.is_alive() else 0

    def wait(self, timeout: float) -> int | None:
        """Wait for the thread's end."""
        self._thread.join(timeout)
        return self.poll()

    def kill(self) -> None:
        """Hang up; a command that runs now is the last."""
        self._channel.hang_up()

    def ask_stack(self) -> str:
        """Of the thread, as ``faulthandler`` writes it."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        calls = reversed(traceback.extract_stack(frame)) if frame is not None else ()
        lines = [f'  File "{c.filename}", line {c.lineno} in {c.name}\n' for c in calls]
        return "".join(["Stack (most recent call first):\n", *lines])


class InlineTransport:
    """Starts workers as threads."""

    inline = True

    def __init__(self, preload: tuple[str, ...]) -> None:
        """``preload``: names of modules to import before a worker starts."""
        self._preload = preload

    def prepare(self, timeout: float) -> None:  # noqa: ARG002 - part of the contract
        """Import the modules, in this process."""
        for module in self._preload:
            try:
                importlib.import_module(module)
            except Exception as error:
                raise WorkerStartError(
                    f"preload: module {module!r} could not be imported: "
                    f"{type(error).__name__}: {error}"
                ) from error

    def start(self, spec: WorkerSpec, arena_fd: int, arena_size: int) -> Connection:
        """Start the loop in a thread."""
        here, there = socket.socketpair()
        side_here, side_there = socket.socketpair()
        serve = getattr(importlib.import_module(ENTRY[0]), ENTRY[1])
        channel = open_channel(there, "worker", spec.name, inline=True)
        thread = threading.Thread(
            target=serve,
            args=(spec, channel, side_there, os.dup(arena_fd), arena_size),
            name=f"fedproc-inline-{spec.name}",
            daemon=True,
        )
        thread.start()
        mine = open_channel(here, "parent", spec.name, inline=True)
        return Connection(mine, side_here, InlineProcess(thread, channel))

    def close(self) -> None:
        """Nothing is shared."""
