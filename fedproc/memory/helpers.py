"""Threads that do a part of large copies and sums. Runs in parent and workers.

They are kept from one copy to the next: a new thread begins on the core of whoever started it, and
a copy of 100 MB is a quarter done before the system moves it to another one. Before a fork they
end, since threads are not copied, and Python warns of a fork that has some.
"""

import _thread
import os
import queue
from collections.abc import Callable

MOST_IDLE = 4
_idle: "list[Helper]" = []


class Helper:
    """A thread that calls what it is given; it ends with this object."""

    def __init__(self) -> None:
        """Start it.

        Raises:
            RuntimeError: there are too many threads.
        """
        self._cores = os.sched_getaffinity(0)
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._ends: queue.SimpleQueue[None] = queue.SimpleQueue()
        _thread.start_new_thread(_serve, (self._jobs, self._ends))

    def __del__(self) -> None:
        """End the thread, when it is done with what it does."""
        self._jobs.put(None)

    @property
    def may_run_here(self) -> bool:
        """Whether it runs on the cores of this thread, as one that is started now would."""
        return self._cores == os.sched_getaffinity(0)

    def start(self, job: Callable[[], object]) -> None:
        """Let it call ``job``, which must not raise anything."""
        self._jobs.put(job)

    def wait(self) -> None:
        """Wait until the job has ended; once for each."""
        self._ends.get()

    def end(self) -> None:
        """End the thread, and wait for that."""
        self._jobs.put(None)
        self._ends.get()


def _serve(
    jobs: "queue.SimpleQueue[Callable[[], object] | None]", ends: "queue.SimpleQueue[None]"
) -> None:
    # Does not know its Helper: else that would never die.
    while (job := jobs.get()) is not None:
        try:
            job()
        finally:
            del job  # what it holds may be large
            ends.put(None)
    ends.put(None)


def take() -> Helper:
    """A helper for this thread alone: an idle one, or a new one.

    Raises:
        RuntimeError: there are too many threads.
    """
    while (helper := _pop()) is not None:
        if helper.may_run_here:
            return helper
    return Helper()


def give_back(helpers: list[Helper]) -> None:
    """Keep helpers, whose jobs have ended, for whoever needs some next."""
    _idle.extend(helpers)
    del _idle[MOST_IDLE:]


def _pop() -> Helper | None:
    try:
        return _idle.pop()
    except IndexError:  # there is none, or another thread was first
        return None


def _end_all() -> None:
    while (helper := _pop()) is not None:
        helper.end()


# A helper that another thread gave back this moment is none in the child.
os.register_at_fork(before=_end_all, after_in_child=_idle.clear)
