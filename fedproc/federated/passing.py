"""How an update reaches the parent: asked for when the training is, taken when its turn comes.

Runs in the parent. The only part of the federated layer that goes below pointers. A worker
executes in order, so a fetch that is sent when the update is wanted would wait for all clients
that were queued meanwhile. Here each training is followed at once by the fetch of its update: the
worker answers as soon as it has it, and the parent takes it when the fold gets there.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedproc.errors import FedprocError
from fedproc.remote import reading
from fedproc.remote.calls import run_there
from fedproc.remote.pending import PendingPointer

if TYPE_CHECKING:
    from fedproc.client.update import Update
    from fedproc.remote.link import Borrow, Link


@dataclass(frozen=True, slots=True, eq=False)
class Promise:
    """An update on its way.

    Attributes:
        pointer: Keeps the update alive in the worker until it was taken.
        link: The connection it comes through.
        query: The fetch that was sent with the training.
    """

    pointer: PendingPointer
    link: Link
    query: Borrow


def train_there(trainer: Any, *args: Any) -> Promise:
    """Lets a trainer train one client; returns at once.

    Args:
        trainer: Pointer to a :class:`fedproc.client.trainer.Trainer`.
        *args: Arguments of its ``train``.

    Raises:
        WorkerLostError: The worker has ended.
        NotShippableError: An argument cannot be pickled.
    """
    # A training changes nothing that a pointer shows, so it need not wait for those who read.
    # Its result is an update: of private data too, the aggregator may take it to fold it.
    pointer = run_there(
        PendingPointer,
        "fedproc.worker.parts.method",
        (trainer, "train", *args),
        what="train",
        writes=False,
        update=True,
    )
    query = reading.start(pointer._data(), "update", folding=True)
    return Promise(pointer, pointer._data().link, query)


def take(promise: Promise, timeout: float | None = None) -> Update:
    """Waits for an update and copies it into this process.

    Raises:
        RemoteError: The client failed.
        WorkerLostError: Its worker was lost.
        CommandTimeoutError: It did not come within ``timeout`` seconds; it cannot be taken later.
    """
    update: Update = reading.finish(promise.link, promise.query, "update", timeout)
    return update


def abandon(promise: Promise) -> None:
    """Gives up an update, so that nothing in the worker waits for it to be read."""
    with contextlib.suppress(FedprocError):
        take(promise, timeout=0)
