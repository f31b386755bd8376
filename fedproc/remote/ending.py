"""The errors for a worker that has ended, or does not answer. Runs in the parent."""

import os
import signal

from fedproc.errors import ClosedError, CommandTimeoutError, FedprocError, WorkerLostError
from fedproc.memory import pages
from fedproc.transport.base import Process

ENDED = "its process ended"
_NO_STREAM = "it closed its stream"
END_SECONDS = 0.4
"""How long a process whose stream has ended may take to end itself, and again after SIGKILL."""


def lost(
    worker: str, process: Process, why: str, unfinished: list[str], oom_kills: int | None
) -> WorkerLostError:
    """Who, how, what it had not finished, and what to do.

    A process that goes on without its stream can never be reached again: it is ended.

    Args:
        worker: its name.
        process: its process; of an inline worker this one.
        why: what was noticed.
        unfinished: what it was asked and has not done.
        oom_kills: ``pages.oom_kills()`` when it was started.
    """
    code = None
    if process.pid != os.getpid():
        code = process.wait(END_SECONDS)
        if code is None:
            process.kill()
            code = process.wait(END_SECONDS)
            why = f"{_NO_STREAM if why == ENDED else why}, and its process was ended"
    return WorkerLostError(
        f"worker {worker!r} (process {process.pid}) is gone: {why}{_how(code, oom_kills)}. "
        f"{_last_words(unfinished)}"
        "Its objects are lost; send them again to another worker, or to the new one that "
        f"cluster[{worker!r}] is with Cluster(restart=True).",
        worker=worker,
        exitcode=code,
        last_command=unfinished[0] if unfinished else None,
    )


def late(worker: str, what: str, timeout: float | None) -> CommandTimeoutError:
    """An answer that did not come in time."""
    return CommandTimeoutError(
        f"{what}: worker {worker!r} was not done within {timeout:g} s. The command goes on "
        "and the object is unchanged: ask again, or end the worker with worker.kill()."
    )


def reentered(worker: str, what: str) -> FedprocError:
    """A signal handler has interrupted its own thread where only that one can go on."""
    return FedprocError(
        f"{what}: a signal handler or finalizer cannot use worker {worker!r} here: it has "
        "interrupted its own thread in the middle of sending, reading or writing. Set a flag in it "
        "and act on it outside, or let another thread do it."
    )


def closed(worker: str) -> ClosedError:
    """The cluster was closed."""
    return ClosedError(
        f"the cluster of worker {worker!r} is closed; its objects are gone. "
        "Fetch what you need before the end of the `with` block."
    )


def forked(worker: str, owner: int) -> ClosedError:
    """Used in a child of the process that has the cluster."""
    return ClosedError(
        f"worker {worker!r} belongs to process {owner}, from which this one was "
        "forked. Make a Cluster of its own in the child."
    )


def _how(code: int | None, oom_kills: int | None) -> str:
    if code is None:
        return ""
    if code >= 0:
        return f" with exit code {code}"
    known = {each.value: each.name for each in signal.Signals}
    name = known.get(-code, f"signal {-code}")
    return f" by {name}{_memory(oom_kills) if code == -signal.SIGKILL else ''}"


def _memory(before: int | None) -> str:
    """What the kernel tells about a SIGKILL: was it short of memory?"""
    now = pages.oom_kills()
    if before is None or now is None:
        return " (the kernel does this when memory runs out: see `dmesg`)"
    if now == before:
        return ""
    return (
        f" (the kernel has killed {now - before} process(es) for lack of memory since this one "
        "was started: run fewer workers, or give them a memory_limit)"
    )


def _last_words(unfinished: list[str]) -> str:
    if not unfinished:
        return ""
    return f"It had not finished {len(unfinished)} command(s), first `{unfinished[0]}`. "
