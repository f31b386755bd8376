"""How an update reaches the parent: asked for when the training is, taken when its turn comes.

Runs in the parent. Only this and ``sharing`` of the federated layer go below pointers. A worker
executes in order, so a fetch that is sent when the update is wanted would wait for all clients
that were queued meanwhile. Here the command that trains asks for the update, too: the worker
answers as soon as it has it, and the parent takes it when the fold gets there.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fedproc.errors import FedprocError
from fedproc.memory.copying import fresh
from fedproc.memory.lending import room_in
from fedproc.remote import lending, reading
from fedproc.remote.calls import fold, run_there
from fedproc.remote.encode import sent_as
from fedproc.remote.pointer import KINDS
from fedproc.remote.worker import put

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fedproc.client.update import Update, Updates
    from fedproc.cluster.cluster import Cluster
    from fedproc.remote.borrows import Borrow
    from fedproc.remote.link import Link
    from fedproc.remote.worker import Worker


ALONG_BYTES: Final = 64 << 10
"""A model of this size goes with the first command of a round: sending it by itself, as an object
of the worker, takes as long as training several rows."""


@dataclass(frozen=True, slots=True, eq=False)
class Promise:
    """A result of a trainer on its way.

    Attributes:
        link: The connection it comes through.
        query: The command that was asked for it.
    """

    link: Link
    query: Borrow

    def is_done(self) -> bool:
        """Tells whether the worker is done with it, as far as is known here; does not look."""
        return self.link.executed(self.query.query)

    def arrived(self) -> bool:
        """Tells whether it can be taken without waiting."""
        # What was lost counts as executed for those who wait: the look may be what notices it.
        return reading.has_arrived(self.link, self.query.query) and self.link.end is None


def readable(cluster: Cluster, nbytes: int) -> Tensor:
    """Allocates memory (uint8, 1-d, uninitialised) that all workers read where it is.

    Sending it copies nothing in this process. It may not be written to once it was sent. What goes
    along with a command is ordinary memory.
    """
    if nbytes <= ALONG_BYTES or cluster.closed:
        return fresh(nbytes)
    return room_in(cluster._supervisor.arena, nbytes)


def send_along(worker: Worker, value: Any) -> Any:
    """Sends ``value`` with the call that follows at once: a pointer, see :meth:`Worker.send`.

    An idle worker that got the two one by one would be woken for each.
    """
    return put(worker.link, value, what="send", more=True)


def make_there(worker: Worker, kind: type[Any], *args: Any) -> Any:
    """Makes an object in a worker: a pointer, at once; it must write to nothing but itself.

    So it does not wait for those who read there. Two aggregators in two threads, each of which has
    updates to read in one worker and waits for a trainer in the other one's, would wait for ever.
    """
    function, what = sent_as(kind)
    return run_there(KINDS["object"], function, args, what=what, link=worker.link, writes=False)


def call_there(trainer: Any, method: str, *args: Any) -> Promise:
    """Calls a method of a trainer and asks for the result; returns at once.

    Args:
        trainer: Pointer to a :class:`fedproc.client.trainer.Trainer`.
        method: Name of the method.
        *args: Its arguments.

    Raises:
        WorkerLostError: The worker has ended.
        NotShippableError: An argument cannot be pickled.
    """
    return Promise(*fold("fedproc.worker.parts.method", (trainer, method, *args), what=method))


def wait_for_any(promises: Sequence[Promise], timeout: float | None) -> None:
    """Waits until a worker is done with one of them, or for so many seconds."""
    for promise in promises:
        promise.link.flush()
    promises[0].link.hub.wait_until(lambda: any(p.is_done() for p in promises), timeout)


def take(promise: Promise, timeout: float | None = None) -> Any:
    """Waits for a result and copies it into this process.

    Raises:
        RemoteError: The client failed.
        WorkerLostError: Its worker was lost.
        CommandTimeoutError: It did not come within ``timeout`` seconds; it cannot be taken later.
    """
    return reading.finish(promise.link, promise.query, "train", timeout)


def see(promise: Promise, timeout: float | None = None) -> Update | Updates:
    """Waits for updates and shows them where they are: they may be read until ``give_back``.

    Errors as of :func:`take`. Only the blocks, which come first, are shown: what clients keep
    outlives the round.
    """
    return reading.seen(promise.link, promise.query, "train", timeout)  # type: ignore[no-any-return]


def give_back(promise: Promise) -> None:
    """Lets the worker have the memory of updates that were seen."""
    lending.give_back(promise.link, promise.query)


def take_all(promises: Sequence[Promise]) -> list[Any]:
    """Takes all results; if one fails, the others are given up."""
    results = []
    for place, promise in enumerate(promises):
        try:
            results.append(take(promise))
        except BaseException:
            for other in promises[place + 1 :]:
                abandon(other)
            raise
    return results


def abandon(promise: Promise) -> None:
    """Gives up a result, so that nothing in the worker waits for it to be read."""
    with contextlib.suppress(FedprocError):
        take(promise, timeout=0)
