"""The errors for a worker that has ended, or does not answer. Runs in the parent."""

import signal

from fedproc.errors import ClosedError, CommandTimeoutError, WorkerLostError

_BY_SIGKILL = " (the kernel does this when memory runs out: see `dmesg`)"


def lost(
    worker: str, pid: int, why: str, code: int | None, unfinished: list[str]
) -> WorkerLostError:
    """Who, how, what it had not finished, and what to do."""
    return WorkerLostError(
        f"worker {worker!r} (process {pid}) is gone: {why}{_how(code)}. {_last_words(unfinished)}"
        "Its objects are lost; send them again to another worker, or use Cluster(restart=True) "
        f"and cluster[{worker!r}].",
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


def _how(code: int | None) -> str:
    if code is None:
        return ""
    if code >= 0:
        return f" with exit code {code}"
    known = {each.value: each.name for each in signal.Signals}
    name = known.get(-code, f"signal {-code}")
    return f" by {name}{_BY_SIGKILL if code == -signal.SIGKILL else ''}"


def _last_words(unfinished: list[str]) -> str:
    if not unfinished:
        return ""
    return f"It had not finished {len(unfinished)} command(s), first `{unfinished[0]}`. "
