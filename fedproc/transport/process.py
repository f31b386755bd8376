"""The process transport: workers forked from a prepared interpreter, the zygote. Parent's side.

Where forking the zygote would not be safe (it has more than one thread, or the platform is not
Linux), every worker is executed on its own: slower, otherwise the same.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from fedproc.errors import WorkerStartError
from fedproc.transport import stacksignal
from fedproc.transport.base import Connection, WorkerSpec
from fedproc.transport.channel import open_channel
from fedproc.transport.zygote import Zygote, execute, zygote_for, zygote_pid

__all__ = ["ProcessTransport", "zygote_pid"]

_POLL_SECONDS = 0.002


class ForkedProcess:
    """A worker forked by a zygote."""

    def __init__(self, pid: int, zygote: Zygote, lifeline: int) -> None:
        """``lifeline``: write end of the pipe whose closing kills the worker."""
        self.pid = pid
        self._zygote = zygote
        self._lifeline = _Lifeline(lifeline)

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        return self.wait(0.0)

    def wait(self, timeout: float) -> int | None:
        """Wait for its end."""
        deadline = time.monotonic() + timeout
        code = self._zygote.exitcode(self.pid, timeout)
        while code is None and not self._zygote.alive:
            # The zygote died before it could tell. Whoever reaps the worker then takes his time
            # or never does it: a zombie has ended.
            if not _runs(self.pid):
                code = -signal.SIGKILL
            elif time.monotonic() >= deadline:
                break
            else:
                time.sleep(_POLL_SECONDS)
        if code is not None:
            self._lifeline.close()
        return code

    def kill(self) -> None:
        """SIGKILL to it and its children."""
        self._zygote.kill(self.pid)
        self._lifeline.close()

    def ask_stack(self) -> None:
        """Have it written to the side socket."""
        self._zygote.ask_stack(self.pid)


class ExecutedProcess:
    """A worker executed on its own."""

    def __init__(self, process: "subprocess.Popen[bytes]", lifeline: int) -> None:
        """``lifeline``: write end of the pipe whose closing kills the worker."""
        self.pid = process.pid
        self._process = process
        self._lifeline = _Lifeline(lifeline)

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        return self._process.poll()

    def wait(self, timeout: float) -> int | None:
        """Wait for its end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        if self._process.returncode is not None:
            self._lifeline.close()
        return self._process.returncode

    def kill(self) -> None:
        """SIGKILL to it and its children."""
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self.pid, signal.SIGKILL)
        self._lifeline.close()

    def ask_stack(self) -> None:
        """Have it written to the side socket."""
        if self._process.poll() is None:
            stacksignal.send(self.pid)


class _Lifeline:
    """Write end of a worker's lifeline; closed once, and in forked children."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        _lifelines.add(self)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


_lifelines: "weakref.WeakSet[_Lifeline]" = weakref.WeakSet()


def _close_lifelines() -> None:
    for lifeline in list(_lifelines):
        lifeline.close()


os.register_at_fork(after_in_child=_close_lifelines)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2]
    except OSError:
        return False
    return not state.startswith(("Z", "X"))


def _pair(
    ours: contextlib.ExitStack, theirs: contextlib.ExitStack
) -> tuple[socket.socket, socket.socket]:
    here, there = socket.socketpair()
    return ours.enter_context(here), theirs.enter_context(there)


class ProcessTransport:
    """Starts workers as processes."""

    inline = False

    def __init__(self, preload: tuple[str, ...]) -> None:
        """Start a zygote, unless workers are to be executed (``FEDPROC_START=exec``)."""
        self._preload = preload
        self._zygote: Zygote | None = None
        if sys.platform == "linux" and os.environ.get("FEDPROC_START") != "exec":
            self._zygote = zygote_for(preload)

    def prepare(self, timeout: float) -> None:
        """Wait for the zygote; for a new one if it has ended."""
        if self._zygote is None:
            return
        if not self._zygote.alive:
            self._zygote.close()
            self._zygote = zygote_for(self._preload)
        self._zygote.wait_ready(timeout)

    def start(self, spec: WorkerSpec, arena_fd: int, arena_size: int) -> Connection:
        """Start a worker process. Not to be interrupted: see ``undisturbed``."""
        here = str(Path.cwd())
        path = [entry or here for entry in sys.path]
        around = (here, dict(os.environ), path, arena_size)
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            try:
                data_here, data_there = _pair(ours, theirs)
                side_here, side_there = _pair(ours, theirs)
                read, lifeline = os.pipe2(os.O_CLOEXEC)
                theirs.callback(os.close, read)
                ours.callback(os.close, lifeline)  # if the worker runs already, this ends it
                fds = [data_there.fileno(), side_there.fileno(), read, arena_fd]
                for stream in (1, 2):
                    fds.append(os.dup(stream))
                    theirs.callback(os.close, fds[-1])
                process = self._start(spec, around, fds, lifeline)
            except OSError as error:
                raise WorkerStartError(
                    f"worker {spec.name!r} could not be started: {error}"
                ) from error
            ours.pop_all()
        channel = open_channel(data_here, "parent", spec.name, inline=False)
        return Connection(channel, side_here, process)

    def _start(
        self, spec: WorkerSpec, around: tuple[Any, ...], fds: list[int], lifeline: int
    ) -> ForkedProcess | ExecutedProcess:
        zygote = self._zygote
        if zygote is not None and zygote.forkable:
            return ForkedProcess(zygote.fork(spec, around, fds), zygote, lifeline)
        arguments = {"spec": tuple(spec), "around": around, "given": fds, "preload": self._preload}
        entry = ("fedproc.worker.main", "start_executed")
        return ExecutedProcess(execute(entry, (arguments,), tuple(fds)), lifeline)

    def close(self) -> None:
        """End a zygote of our own; the plain one stays for the next cluster."""
        if self._zygote is not None and self._preload and self._zygote.owner == os.getpid():
            self._zygote.close()
