"""The contract of a transport: how a worker is started, reached and ended. Read this first.

A transport starts a worker from a ``WorkerSpec`` and gives back a ``Connection``: a channel of
frames to it, a side socket for passing descriptors, and a ``Process`` to watch and end it. Two
transports exist: ``process`` (a process of its own, forked from a prepared one) and ``inline``
(the same loop in a thread of the parent: for breakpoints and quick tests). Everything above this
package is written against the contract alone; tests/contract runs on each transport.
"""

import errno
import os
import socket
from typing import NamedTuple, Protocol

from fedproc.transport.channel import Channel


class WorkerSpec(NamedTuple):
    """What a worker must know to start. Descriptors are passed beside it."""

    name: str
    seed: int
    threads: int
    memory_limit: int | None
    device: str


def receive_descriptor(side: socket.socket) -> int:
    """The next descriptor from the other side.

    At the limit of open files the kernel delivers the message and drops the descriptor.

    Raises:
        OSError: it was dropped (EMFILE), or the stream has ended.
    """
    data, received, _, _ = socket.recv_fds(side, 1, 1)
    if received:
        os.set_inheritable(received[0], False)
        return received[0]
    code = errno.EMFILE if data else errno.EPIPE
    raise OSError(code, f"the descriptor of a shared memory was not received: {os.strerror(code)}")


class Process(Protocol):
    """The process behind a worker."""

    pid: int

    def poll(self) -> int | None:
        """Exit code as in ``multiprocessing`` (negative: signal), None while it runs."""

    def wait(self, timeout: float) -> int | None:
        """Wait up to ``timeout`` seconds for the end; the exit code, None if it still runs."""

    def kill(self) -> None:
        """End it and its children now (SIGKILL)."""

    def ask_stack(self) -> str | None:
        """The Python stack of a thread; None: the process will write its own to the side socket.

        Writes ``Stack (most recent call first):`` and a line per call, innermost first.
        """


class Connection(NamedTuple):
    """A started worker."""

    channel: Channel
    side: socket.socket
    process: Process


class Transport(Protocol):
    """Starts workers."""

    inline: bool

    def prepare(self, timeout: float) -> None:
        """Wait until workers can be started, up to ``timeout`` seconds.

        Raises:
            WorkerStartError: they cannot.
        """

    def start(self, spec: WorkerSpec, arena_fd: int, arena_size: int) -> Connection:
        """Start a worker, after ``prepare``.

        Args:
            spec: what it must know.
            arena_fd: descriptor of the parent's arena.
            arena_size: bytes of the parent's arena.

        Raises:
            WorkerStartError: it could not be started.
        """

    def close(self) -> None:
        """Let go of what is shared by the started workers."""
