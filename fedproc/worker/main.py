"""Where a worker starts: as a process of its own, or as a thread of the parent (inline).

Runs in the worker. A process has been forked by the zygote, or executed by ``start_executed``
where forking is not safe.
"""

import faulthandler
import os
import pickle
import signal
import socket
import sys
from typing import Any, NamedTuple

import torch

from fedproc.memory.spares import SPARES
from fedproc.transport.base import WorkerSpec
from fedproc.transport.channel import Channel, open_channel
from fedproc.transport.stacksignal import STACK_SIGNAL
from fedproc.wire import frames
from fedproc.wire.commands import KIND, Failed, Ready
from fedproc.worker import compiler, failure
from fedproc.worker.host import PARENT, Host
from fedproc.worker.lifeline import hold_lifeline
from fedproc.worker.loop import serve
from fedproc.worker.randomness import Turns, derive, seed_all
from fedproc.worker.scheduling import work_in_long_turns


class Surroundings(NamedTuple):
    """What a worker process takes over from its parent."""

    directory: str
    environment: dict[str, str]
    path: list[str]
    arena_size: int


class Descriptors(NamedTuple):
    """The descriptors a worker process is given, in the order they are passed."""

    data: int
    side: int
    lifeline: int
    arena: int
    stdout: int
    stderr: int


def serve_process(spec: WorkerSpec, around: Surroundings, given: Descriptors) -> None:
    """Be a worker process; returns when the parent says stop or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hold_lifeline(given.lifeline)
    work_in_long_turns()
    _standard_streams(given)
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(around.environment)
    os.chdir(around.directory)
    sys.path[:] = around.path
    torch.set_num_threads(spec.threads)
    seed_all(derive(spec.seed, spec.name))
    sock = socket.socket(fileno=given.data)
    channel = open_channel(sock, "worker", spec.name, inline=False)
    side = socket.socket(fileno=given.side)
    # Of the thread it interrupts only: others would run on while their stacks are read.
    faulthandler.register(STACK_SIGNAL, file=given.side, all_threads=False)
    host = _open(spec, channel, side, given.arena, around.arena_size, is_process=True)
    if host is not None:
        SPARES.open(host)  # an inline worker is in the process of a cluster, which has done that
        serve(host)
        channel.flush()


def serve_inline(
    spec: WorkerSpec, channel: Channel, side: socket.socket, arena_fd: int, arena_size: int
) -> None:
    """Be a worker in this thread; returns when told to stop, or killed."""
    turns = Turns(derive(spec.seed, spec.name), spec.threads)
    host = _open(spec, channel, side, arena_fd, arena_size, is_process=False)
    if host is not None:
        serve(host, turns.turn, spin_seconds=0.0)
        channel.flush()
        host.close()


def _open(
    spec: WorkerSpec,
    channel: Channel,
    side: socket.socket,
    arena_fd: int,
    arena_size: int,
    *,
    is_process: bool,
) -> Host | None:
    """The host with the parent's arena mapped; the parent has been told either way."""
    host = None
    try:
        _require_device(spec.device)
        host = Host(spec, channel, side, is_process=is_process)
        host.map(PARENT, arena_fd, arena_size)
        socket.send_fds(side, [b"a"], [host.arena.fd])
        host.reply(Ready(os.getpid(), host.arena.size_bytes), 0)
    except Exception as error:  # noqa: BLE001 - answers the request to start
        _reply_failed(channel, error)
        # a thread of the parent must let go itself; what was written can still be read
        for opened in (side, channel) if host is None else (host,):
            opened.close()
        return None
    finally:
        os.close(arena_fd)
    channel.flush()
    return host


def _require_device(name: str) -> None:
    """Raises ValueError for a device that torch does not know or this machine does not have."""
    try:
        torch.empty(0, device=name)
    except Exception as error:
        # torch lists all its backends below the first line
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"device {name!r} cannot be used here: {why}. Cluster(devices=[...]) takes what torch "
            "knows and this machine has, such as 'cpu' or 'cuda:0'"
        ) from error


def _reply_failed(channel: Channel, error: Exception) -> None:
    body = pickle.dumps(tuple(Failed(0, failure.describe(error, private=False))))
    channel.append(frames.pack(KIND[Failed], frames.PLAIN, 0, body))
    channel.flush()


def _standard_streams(given: Descriptors) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (given.stdout, 1), (given.stderr, 2)):
        os.dup2(source, target)
        os.close(source)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace", buffering=1, closefd=False)  # noqa: SIM115


def start_executed(arguments: dict[str, Any]) -> None:
    """Entry of a worker that was executed, not forked."""
    for module in arguments["preload"]:
        __import__(module)
    compiler.defer()
    spec, around, given = arguments["spec"], arguments["around"], arguments["given"]
    serve_process(WorkerSpec(*spec), Surroundings(*around), Descriptors(*given))
    sys.stdout.flush()
    os._exit(0)
