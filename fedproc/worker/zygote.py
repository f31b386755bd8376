"""The zygote: a prepared interpreter that forks workers on request.

Runs in a process of its own, started once by the parent and kept while the parent lives. It has
imported torch and used an optimizer, so a worker starts in milliseconds and shares these pages. It
has exactly one thread, never runs autograd and never touches a GPU: forking it is safe, which
forking the user's process is not.

Messages on the control socket are pickles with a length in front. Requests carry descriptors.
"""

import contextlib
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from fedproc.transport import stacksignal
from fedproc.worker.lifeline import hold_lifeline, let_go

LENGTH = struct.Struct("<I")


def main(control_fd: int, lifeline_fd: int, preload: tuple[str, ...]) -> None:
    """Prepare, then fork workers until the parent is gone."""
    hold_lifeline(lifeline_fd)
    control = socket.socket(fileno=control_fd)
    try:
        _prepare(preload)
    except BaseException as error:  # noqa: BLE001 - answers the request to start
        _send(control, ("failed", f"{type(error).__name__}: {error}"))
        return
    # From here on the end of the control stream tells us, and there is something to do then.
    let_go(lifeline_fd)
    zygote = Zygote(control)
    try:
        _send(control, ("ready", _threads()))
        zygote.serve()
    except OSError:  # the parent has gone in the middle of a message
        pass
    zygote.kill_all()


def _prepare(preload: tuple[str, ...]) -> None:
    gc.disable()  # a quarter of the time of the imports; next to nothing of them is garbage
    import numpy  # noqa: F401, ICN001
    import torch

    import fedproc.worker.main  # noqa: F401
    from fedproc.worker import compiler

    for module in preload:
        importlib.import_module(module)
    compiler.defer()
    torch.set_num_threads(1)
    parameter = torch.nn.Parameter(torch.zeros(1))
    for kind in (torch.optim.SGD, torch.optim.Adam):
        optimizer = kind([parameter], lr=0.1)
        parameter.grad = torch.zeros(1)
        optimizer.step()
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()
    gc.enable()


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def _send(control: socket.socket, message: tuple[Any, ...]) -> None:
    data = pickle.dumps(message)
    control.sendall(LENGTH.pack(len(data)) + data)


def receive(control: socket.socket, fds: int) -> tuple[Any, list[int]] | None:
    """One message and its descriptors; None at the end of the stream."""
    data, received, flags, _ = socket.recv_fds(control, LENGTH.size, fds)
    if flags & socket.MSG_CTRUNC:
        raise OSError("descriptors were lost on the way: too many open files")
    for fd in received:  # a program that a command executes would keep the stream from its end
        os.set_inheritable(fd, False)
    while data and len(data) < LENGTH.size:
        data += control.recv(LENGTH.size - len(data))
    if not data:
        return None
    (length,) = LENGTH.unpack(data)
    body = b""
    while len(body) < length:
        chunk = control.recv(length - len(body))
        if not chunk:
            return None
        body += chunk
    return pickle.loads(body), list(received)


class Zygote:
    """Forks, reaps and kills workers."""

    def __init__(self, control: socket.socket) -> None:
        """``control``: to the parent."""
        self._control = control
        self._children: set[int] = set()
        self._wake, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def serve(self) -> None:
        """Until the parent is gone."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._wake in ready:
                os.read(self._wake, 4096)
            self._reap()
            if self._control.fileno() in ready:
                received = receive(self._control, 16)
                if received is None:
                    break
                self._handle(*received)

    def kill_all(self) -> None:
        """The parent is gone: nobody of ours is left behind."""
        for pid in self._children:
            _kill_group(pid)

    def _reap(self) -> None:
        for pid in list(self._children):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            # What the worker has started must not outlive it. Before the reaping: afterwards the
            # number may belong to somebody else.
            _kill_group(pid)
            _, status = os.waitpid(pid, 0)
            self._children.discard(pid)
            _send(self._control, ("exit", pid, os.waitstatus_to_exitcode(status)))

    def _handle(self, message: tuple[Any, ...], fds: list[int]) -> None:
        if message[0] in ("kill", "stack"):
            if message[1] in self._children:  # not reaped: the number is still its
                (_kill_group if message[0] == "kill" else stacksignal.send)(message[1])
            return
        pid = os.fork()
        if pid == 0:
            self._become_worker(message, fds)
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)  # as the child does: whoever is first
        self._children.add(pid)
        for fd in fds:
            os.close(fd)
        _send(self._control, ("started", message[1], pid))

    def _become_worker(self, message: tuple[Any, ...], fds: list[int]) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setpgid(0, 0)
            for fd in (self._wake, self._wake_write):
                os.close(fd)
            self._control.close()
            from fedproc.transport.base import WorkerSpec
            from fedproc.worker.main import Descriptors, Surroundings, serve_process

            _, _, spec, around = message
            serve_process(WorkerSpec(*spec), Surroundings(*around), Descriptors(*fds))
            sys.stdout.flush()
            sys.stderr.flush()
            status = 0
        except BaseException:  # noqa: BLE001 - os._exit() would show nothing of it
            traceback.print_exc()
        finally:
            os._exit(status)


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
