"""The zygote: a prepared interpreter that workers are forked from. The parent's end of it.

One zygote per parent process (and per set of preloaded modules) is started when first needed. The
plain one stays until the parent ends, so that the next cluster starts in milliseconds; it ends
with the parent, however that ends. ``worker.zygote`` is the other end.
"""

import atexit
import contextlib
import itertools
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedproc.errors import WorkerStartError
from fedproc.memory.undisturbed import undisturbed
from fedproc.transport.base import WorkerSpec
from fedproc.transport.environment import environment

FORK_SECONDS = 30.0
_END_SECONDS = 5.0
_TURN_SECONDS = 0.05
_LENGTH = struct.Struct("<I")
_BOOT = (
    "import os, sys, pickle; "
    "path, ours, module, name, args = pickle.loads(bytes.fromhex(sys.argv[1])); "
    "[os.environ.pop(each, None) for each in ours]; sys.path[:] = path; import importlib; "
    "getattr(importlib.import_module(module), name)(*args)"
)


def execute(
    function: tuple[str, str], args: tuple[Any, ...], fds: tuple[int, ...]
) -> "subprocess.Popen[bytes]":
    """Run ``function`` (module, name) in a new interpreter that inherits ``fds``."""
    path = [entry or str(Path.cwd()) for entry in sys.path]
    settings = environment()
    ours = sorted({"LD_PRELOAD"} & (settings.keys() - os.environ.keys()))  # for it alone
    packed = pickle.dumps((path, ours, *function, args)).hex()
    return subprocess.Popen(
        [sys.executable, "-c", _BOOT, packed],
        env=settings,
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in the terminal is the parent's affair
    )


class Zygote:
    """The parent's end of a zygote."""

    def __init__(self, preload: tuple[str, ...]) -> None:
        """Start it. It imports torch meanwhile: :meth:`wait_ready` before anything else."""
        self.owner = os.getpid()
        self._preload = preload
        self._lock = threading.RLock()
        self._exits: dict[int, int] = {}
        self._ready: tuple[Any, ...] | None = None
        self._started: dict[int, int] = {}
        self._requests = itertools.count(1)
        self._input: tuple[bytes, list[bytes]] = (b"", [])
        try:
            with undisturbed():
                self._launch()
        except BaseException:
            self.close()
            raise

    def _launch(self) -> None:
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            try:
                here, there = socket.socketpair()
                self._control = ours.enter_context(here)
                theirs.enter_context(there)
                lifeline, self._lifeline = os.pipe2(os.O_CLOEXEC)
                theirs.callback(os.close, lifeline)
                ours.callback(os.close, self._lifeline)
                fds = (there.fileno(), lifeline)
                arguments = (*fds, self._preload)
                self._process = execute(("fedproc.worker.zygote", "main"), arguments, fds)
            except OSError as error:
                raise WorkerStartError(
                    f"the interpreter that workers are forked from could not be started: {error}"
                ) from error
            ours.pop_all()
        _open_zygotes.add(self)

    def wait_ready(self, timeout: float) -> None:
        """Wait until it can fork, up to ``timeout`` seconds; an interrupt changes nothing.

        Raises:
            WorkerStartError: It cannot, or not in time. A shared one that is merely slow goes on:
                others may wait for it with more patience.
        """
        self._pump_until(lambda: self._ready is not None, time.monotonic() + timeout)
        ready = self._ready
        if ready is None or ready[0] != "ready":
            is_slow = ready is None and self.alive
            if self._preload or not is_slow:
                self.close()
            why = "it is too slow" if is_slow else "it has ended" if ready is None else ready[1]
            raise WorkerStartError(
                f"the interpreter that workers are forked from could not be prepared: {why}. "
                f"Check that torch and the modules in preload={list(self._preload)} import in a "
                f"new `{sys.executable}`, or raise start_timeout (now {timeout:g} s)."
            )

    @property
    def forkable(self) -> bool:
        """Whether forking it is safe: it is ready and has one thread."""
        return self._ready == ("ready", 1)

    @property
    def pid(self) -> int:
        """Process id of the zygote."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can start workers."""
        return self.owner == os.getpid() and self._process.poll() is None

    def fork(self, spec: WorkerSpec, around: tuple[Any, ...], fds: list[int]) -> int:
        """Fork a worker; its process id."""
        request = next(self._requests)
        data = pickle.dumps(("fork", request, tuple(spec), around))
        packet = _LENGTH.pack(len(data)) + data
        with self._lock:
            sent = socket.send_fds(self._control, [packet], fds)
            if sent < len(packet):
                self._control.sendall(packet[sent:])
        # Answers carry the number of the request: one that was interrupted is not taken for ours.
        self._pump_until(lambda: request in self._started, time.monotonic() + FORK_SECONDS)
        if request not in self._started:
            raise WorkerStartError(
                f"worker {spec.name!r}: the process that workers are forked from does not answer. "
                "Try again: a new one is started if it has ended."
            )
        return self._started.pop(request)

    def kill(self, pid: int) -> None:
        """Kill a worker with all its children."""
        data = pickle.dumps(("kill", pid))
        with self._lock, contextlib.suppress(OSError):
            self._control.sendall(_LENGTH.pack(len(data)) + data)
            return
        with contextlib.suppress(OSError):  # no zygote: nobody reaps, so the number is still its
            os.killpg(pid, signal.SIGKILL)

    def ask_stack(self, pid: int) -> None:
        """Have a worker write its stack to its side socket."""
        data = pickle.dumps(("stack", pid))
        with self._lock, contextlib.suppress(OSError):
            self._control.sendall(_LENGTH.pack(len(data)) + data)

    def exitcode(self, pid: int, timeout: float) -> int | None:
        """Exit code of a worker, waiting for its end up to ``timeout`` seconds."""
        self._pump_until(lambda: pid in self._exits, time.monotonic() + timeout)
        return self._exits.get(pid)

    def _pump_until(self, arrived: Callable[[], bool], deadline: float) -> None:
        """Take in what the zygote says until ``arrived()``, the deadline, or its end."""
        while not arrived():
            left = deadline - time.monotonic()
            with self._lock:  # in turns: others wait, too, some with less patience
                if arrived():
                    return
                said = self._pump(min(left, _TURN_SECONDS))
            if said is None or (left <= 0 and not said):
                return

    def _pump(self, wait: float) -> bool | None:
        """Take in what the zygote says; whether it said something within ``wait`` seconds.

        Can be interrupted anywhere, as a Channel: what was received is noted in the same step.

        Returns:
            None at the end of the stream.
        """
        if self._control.fileno() < 0:
            return None  # it died and was replaced; its workers live on, and ask here
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        if not poll.poll(max(0.0, wait) * 1000):
            return False
        data, chunks = self._input
        try:
            chunks.extend(map(self._control.recv, (65536,)))
        except OSError:
            return None
        if not chunks[-1]:
            return None
        data += b"".join(chunks)
        self._input = (data, [])
        while len(data) >= _LENGTH.size:
            stop = _LENGTH.size + _LENGTH.unpack_from(data)[0]
            if len(data) < stop:
                break
            self._note(pickle.loads(data[_LENGTH.size : stop]))
            data = data[stop:]
            self._input = (data, [])
        return True

    def _note(self, message: tuple[Any, ...]) -> None:
        if message[0] == "exit":
            self._exits[message[1]] = message[2]
        elif message[0] == "started":
            self._started[message[1]] = message[2]
        else:
            self._ready = message

    def close(self) -> None:
        """End it, and with it what it has forked. Idempotent."""
        with undisturbed(), self._lock:
            if self in _open_zygotes:
                _open_zygotes.discard(self)
                self._control.close()
                os.close(self._lifeline)
                try:
                    self._process.wait(_END_SECONDS)
                except subprocess.TimeoutExpired:  # somebody has stopped it: it notices nothing
                    self._process.kill()
                    self._process.wait()

    def abandon(self) -> None:
        """In a forked child: let go of the parent's descriptors, so that its end is noticed."""
        _open_zygotes.discard(self)
        self._control.close()
        with contextlib.suppress(OSError):
            os.close(self._lifeline)


_open_zygotes: "weakref.WeakSet[Zygote]" = weakref.WeakSet()
_kept: list[Zygote] = []
"""The zygote without preloaded modules, kept between clusters."""
_starting = threading.Lock()


def zygote_pid() -> int | None:
    """Process id of the helper that stays between clusters, None when there is none."""
    return _kept[0].pid if _kept and _kept[0].alive else None


def zygote_for(preload: tuple[str, ...]) -> Zygote:
    """A zygote that imports these modules, not waited for; the plain one is shared."""
    if preload:
        return Zygote(preload)
    with _starting:
        if _kept and not _kept[0].alive:
            _kept.pop().close()
        if not _kept:
            _kept.append(Zygote(()))
        return _kept[0]


def _forget_in_child() -> None:
    for zygote in list(_open_zygotes):
        zygote.abandon()
    _kept.clear()


def _end_at_exit() -> None:
    for zygote in list(_open_zygotes):
        if zygote.owner == os.getpid():
            zygote.close()
    _kept.clear()


os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_end_at_exit)
