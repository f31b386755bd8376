"""From tasks to updates in cohort order: who trains when, and what if a worker is lost.

Runs in the parent. Every worker trains its clients in cohort order, and updates are taken in
cohort order, so few of them wait. A worker that is lost gives its clients to the others.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fedproc.errors import ClosedError, FedprocError, WorkerLostError
from fedproc.federated.passing import Promise, abandon, call_there, take

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from fedproc.client.update import Task, Update
    from fedproc.federated.crew import Crew

# Updates that a worker may have finished or queued beyond the one that is taken next: enough that
# it never waits for the parent, few enough that memory does not grow with the cohort.
_WINDOW_BYTES: Final = 256 << 20
_WINDOW_LEAST: Final = 4
_WINDOW_MOST: Final = 256


@dataclass(frozen=True, slots=True)
class Broadcast:
    """What the clients of a round start from.

    Attributes:
        block: The global model: uint8, shape (nbytes,).
        shared: What the strategy sends to all clients besides.
        kept: Client -> what it kept; clients without anything are missing.
    """

    block: Tensor
    shared: Mapping[str, Tensor]
    kept: Mapping[str, Mapping[str, Any]]


class Collector:
    """Trains the clients of one round and gives back their updates."""

    def __init__(
        self, crew: Crew, broadcast: Broadcast, tasks: Mapping[str, Task], *, retries: int
    ) -> None:
        """Prepares a round.

        Args:
            crew: The trainers.
            broadcast: What the clients start from.
            tasks: Client -> its task, in cohort order.
            retries: How often a client that was training when its worker was lost trains again.
        """
        self._crew = crew
        self._broadcast = broadcast
        self._tasks = tasks
        self._retries = retries
        self._order = {client: place for place, client in enumerate(tasks)}
        self._losses = dict.fromkeys(tasks, 0)
        self._arrived: dict[str, Update | FedprocError] = {}
        # by worker: clients to submit, and updates on their way in the order of their commands
        self._homes: dict[str, str] = {}
        self._queues: dict[str, deque[str]] = {}
        self._pending: dict[str, dict[str, Promise]] = {}
        self._training: dict[str, deque[str]] = {}
        self._sent: dict[str, tuple[Any, Any]] = {}
        fitting = _WINDOW_BYTES // max(1, len(broadcast.block))
        self._window = min(_WINDOW_MOST, max(_WINDOW_LEAST, fitting))

    def updates(self) -> Iterator[tuple[str, Update | FedprocError]]:
        """Yields every client with its update or with why there is none, in cohort order.

        Raises:
            ClosedError: The cluster was closed.
            NotShippableError: The model or the local training cannot be sent.
        """
        self._enqueue(list(self._tasks))
        try:
            for client in self._tasks:
                yield client, self._take(client)
        finally:
            for pending in self._pending.values():
                for promise in pending.values():
                    abandon(promise)

    def _take(self, client: str) -> Update | FedprocError:
        while client not in self._arrived:
            try:
                self._submit(client)
                self._note_trained()
                self._fetch(client)
            except WorkerLostError as error:
                self._recover(error.worker or self._homes[client], error)
        return self._arrived.pop(client)

    def _fetch(self, client: str) -> None:
        """Takes one update home; every failure but a loss is the client's own."""
        promise = self._pending[self._homes[client]].pop(client)
        try:
            self._arrived[client] = take(promise)
        except ClosedError:
            raise
        except WorkerLostError:
            self._queues[self._homes[client]].appendleft(client)
            raise
        except FedprocError as error:
            self._arrived[client] = error

    def _submit(self, needed: str) -> None:
        """Keeps every worker supplied; the client that is needed next never waits for room."""
        for name, queue in self._queues.items():
            pending = self._pending.setdefault(name, {})
            while queue and (len(pending) < self._window or queue[0] == needed):
                trainer = self._crew.trainer(name)
                block, shared = self._broadcast_to(name)
                client, kept = queue[0], self._broadcast.kept.get(queue[0])
                # sent by itself: a call does not mix tensors from here with pointers
                state = self._crew.worker(name).send(dict(kept)) if kept else None
                pending[client] = call_there(
                    trainer, "train", block, self._tasks[client], state, shared
                )
                self._training.setdefault(name, deque()).append(queue.popleft())

    def _broadcast_to(self, name: str) -> tuple[Any, Any]:
        if name not in self._sent:
            worker, shared = self._crew.worker(name), self._broadcast.shared
            self._sent[name] = (
                worker.send(self._broadcast.block),
                worker.send(dict(shared)) if shared else None,
            )
        return self._sent[name]

    def _note_trained(self) -> None:
        """Remembers who has finished, so that a loss is blamed on who was training."""
        for name, training in self._training.items():
            pending = self._pending[name]
            while training and _is_done(pending.get(training[0])):
                training.popleft()

    def _recover(self, name: str, error: WorkerLostError) -> None:
        """Gives the clients of a lost worker to its replacement or to the others."""
        lost = [*self._pending.get(name, {}), *self._queues.pop(name, ())]
        for promise in self._pending.pop(name, {}).values():
            abandon(promise)
        self._sent.pop(name, None)
        training = self._training.pop(name, None)
        if training:
            suspect = training[0]
            self._losses[suspect] += 1
            if self._losses[suspect] > self._retries:
                self._arrived[suspect] = error
        self._drain()
        if self._restored():
            self._enqueue([client for client in lost if client not in self._arrived])
        else:
            self._arrived.update(dict.fromkeys(lost, error))

    def _drain(self) -> None:
        """Takes all updates on their way from the other workers.

        New data and a new trainer come to a worker only when nothing of it is being read.
        """
        for pending in self._pending.values():
            for client in list(pending):
                with contextlib.suppress(WorkerLostError):  # met again when it is needed
                    self._fetch(client)

    def _restored(self) -> bool:
        """Restores the data of lost workers; False if no worker is left."""
        while True:
            try:
                self._crew.data.restore()
            except WorkerLostError:  # another one was lost meanwhile, or there is none
                if not any(worker.alive for worker in self._crew.data.cluster.workers):
                    return False
            else:
                return True

    def _enqueue(self, clients: list[str]) -> None:
        """Puts clients into the queues of their workers, at their places in the cohort."""
        for client in clients:
            self._homes[client] = self._crew.home(client)
            self._queues.setdefault(self._homes[client], deque()).append(client)
        for name, queue in self._queues.items():
            self._queues[name] = deque(sorted(queue, key=self._order.__getitem__))


def _is_done(promise: Promise | None) -> bool:
    # What was lost counts as done for those who wait: done() may be the one to notice the loss.
    return promise is None or (promise.pointer.done() and promise.link.end is None)
