"""From tasks to updates in cohort order: who trains when, and what if a worker is lost or late.

Runs in the parent. Every worker trains its clients in cohort order, and updates are taken in
cohort order, so few of them wait. A worker that is lost gives its clients to the others; one that
misses the deadline is replaced.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fedproc.client.update import Updates, pack_tasks
from fedproc.errors import (
    ClosedError,
    CommandTimeoutError,
    FedprocError,
    RemoteError,
    WorkerLostError,
)
from fedproc.federated.lane import Batch, Deadline, Lane, missed
from fedproc.federated.passing import call_there, take

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from fedproc.client.update import Task, Update
    from fedproc.federated.crew import Crew

# Updates that a worker may have finished or queued beyond the one that is taken next: enough that
# it never waits for the parent, few enough that memory does not grow with the cohort.
_WINDOW_BYTES: Final = 64 << 20
_WINDOW_LEAST: Final = 4
_WINDOW_MOST: Final = 256
# What was finished at the deadline is taken all the same; its worker answers at once.
_GRACE_SECONDS: Final = 1.0


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
        self,
        crew: Crew,
        broadcast: Broadcast,
        tasks: Mapping[str, Task],
        retries: int,
        deadline: float | None = None,
    ) -> None:
        """Prepares a round.

        Args:
            crew: The trainers.
            broadcast: What the clients start from.
            tasks: Client -> its task, in cohort order.
            retries: How often a client that was training when its worker was lost trains again.
            deadline: Seconds from now; a client that is not done then is a failure.
        """
        self._crew = crew
        self._broadcast = broadcast
        self._tasks = tasks
        self._retries = retries
        self._deadline = Deadline(deadline)
        self._losses = dict.fromkeys(tasks, 0)
        self._arrived: dict[str, Update | FedprocError] = {}
        self._open = set(tasks)
        self._homes: dict[str, str] = {}
        self._lanes: dict[str, Lane] = {}
        self._block_bytes = len(broadcast.block)
        fitting = _WINDOW_BYTES // max(1, self._block_bytes)
        self._window = min(_WINDOW_MOST, max(_WINDOW_LEAST, fitting))

    def updates(self) -> Iterator[tuple[Task, Update | FedprocError]]:
        """Yields every task with its update or with why there is none, in cohort order.

        Raises:
            ClosedError: The cluster was closed.
            NotShippableError: The model or the local training cannot be sent.
        """
        self._enqueue(list(self._tasks))
        try:
            for client, task in self._tasks.items():
                while client not in self._arrived:
                    self._advance(client)
                yield task, self._arrived.pop(client)
        finally:
            for lane in self._lanes.values():
                lane.abandon()

    def home(self, client: str) -> str:
        """Returns the name of the worker that trains a client, or trained it."""
        return self._homes[client]

    def _advance(self, client: str) -> None:
        """Does one thing that brings the update of ``client`` nearer."""
        try:
            if self._deadline.over():
                self._expire()
                return
            try:
                self._submit()
                self._fetch(self._lanes[self._homes[client]], self._deadline.left())
            except WorkerLostError as error:
                self._recover(error.worker or self._homes[client], error)
        except CommandTimeoutError:
            self._expire()

    # ---- submitting

    def _submit(self) -> None:
        """Keeps every worker supplied; one with nothing to do always gets something."""
        for name, lane in self._lanes.items():
            while lane.queue and (not lane.batches or lane.on_the_way < self._window):
                size = 1 if self._deadline.seconds else self._crew.batch_size(self._block_bytes)
                clients = [lane.queue[place] for place in range(min(size, len(lane.queue)))]
                lane.submit(Batch(clients, self._call(name, lane, clients)))
                for _ in clients:
                    lane.queue.popleft()

    def _call(self, name: str, lane: Lane, clients: list[str]) -> Any:
        worker, trainer = self._crew.worker(name), self._crew.trainer(name)
        block, shared = self._broadcast_to(name, lane)
        kept = {c: dict(self._broadcast.kept[c]) for c in clients if self._broadcast.kept.get(c)}
        # sent by itself: a call does not mix tensors from here with pointers
        if len(clients) == 1:
            (client,) = clients
            state = worker.send(kept[client]) if kept else None
            return call_there(trainer, "train", block, self._tasks[client], state, shared)
        states = worker.send(kept) if kept else None
        tasks = pack_tasks([self._tasks[client] for client in clients])
        return call_there(trainer, "train_some", block, tasks, states, shared)

    def _broadcast_to(self, name: str, lane: Lane) -> tuple[Any, Any]:
        if lane.sent is None:
            worker, shared = self._crew.worker(name), self._broadcast.shared
            lane.sent = (
                worker.send(self._broadcast.block),
                worker.send(dict(shared)) if shared else None,
            )
        return lane.sent

    # ---- taking

    def _fetch(self, lane: Lane, timeout: float | None) -> None:
        """Takes one batch home; every failure but a loss is the clients' own."""
        batch = lane.batches[0]
        batch.spent = True
        try:
            result = take(batch.promise, timeout)
        except (ClosedError, WorkerLostError):
            raise
        except FedprocError as error:
            if isinstance(error, CommandTimeoutError) and not isinstance(error, RemoteError):
                raise
            for client in batch.clients:
                self._settle(client, error)
        else:
            if isinstance(result, Updates):
                self._unpack(lane, batch, result)
            else:
                self._settle(batch.clients[0], result)
        lane.taken()

    def _unpack(self, lane: Lane, batch: Batch, result: Updates) -> None:
        """Takes several updates apart; what made a client fail is asked for by itself."""
        name, updates = self._homes[batch.clients[0]], result.unpacked(self._block_bytes)
        for client, update in zip(batch.clients, updates, strict=True):
            if update is None:
                promise = call_there(self._crew.trainer(name), "failure", client)
                lane.submit(Batch([client], promise))
            else:
                self._settle(client, update)

    def _settle(self, client: str, result: Update | FedprocError) -> None:
        if client in self._open:
            self._open.remove(client)
            self._arrived[client] = result
            if not isinstance(result, FedprocError):
                self._crew.pace.learn(result.ended - result.began)

    # ---- losses and the deadline

    def _recover(self, name: str, error: WorkerLostError) -> None:
        """Gives the clients of a lost worker to its replacement or to the others."""
        lane = self._lanes.pop(name, Lane())
        submitted = [client for batch in lane.batches for client in batch.clients]
        lost = lane.abandon()
        if submitted:
            suspect = self._suspect(name, submitted)
            self._losses[suspect] += 1
            if self._losses[suspect] > self._retries:
                self._settle(suspect, error)
        self._drain()
        left = [client for client in lost if client in self._open]
        if self._crew.restored():
            self._enqueue(left)
        else:
            for client in left:
                self._settle(client, error)

    def _suspect(self, name: str, submitted: list[str]) -> str:
        """Returns who was training; the first one that is not known to have finished, in doubt."""
        place = self._crew.last_step(name)
        found = [client for client in submitted if self._tasks[client].place == place]
        return found[0] if found else submitted[0]

    def _drain(self) -> None:
        """Takes all updates on their way from the other workers.

        New data and a new trainer come to a worker only when nothing of it is being read.
        """
        for lane in self._lanes.values():
            with contextlib.suppress(WorkerLostError):  # met again when it is needed
                while lane.batches:
                    self._fetch(lane, self._deadline.left())

    def _expire(self) -> None:
        """Ends the round: workers that still train are replaced, what is not done has failed."""
        training, late = set[str](), list[str]()
        for name, lane in self._lanes.items():
            with contextlib.suppress(WorkerLostError, CommandTimeoutError):
                while lane.batches and lane.batches[0].finished():
                    self._fetch(lane, _GRACE_SECONDS)
            if lane.batches:
                late.append(name)
                training.update(lane.batches[0].clients)
            lane.abandon()
            lane.queue.clear()
        for client in sorted(self._open, key=lambda client: self._tasks[client].place):
            task, seconds = self._tasks[client], self._deadline.seconds
            self._settle(client, missed(task, seconds, training=client in training))
        for name in late:
            self._crew.replace(name)
        self._crew.restored()

    def _enqueue(self, clients: list[str]) -> None:
        """Puts clients into the queues of their workers, at their places in the cohort."""
        self._homes.update(self._crew.homes(clients))
        for client in clients:
            self._lanes.setdefault(self._homes[client], Lane()).queue.append(client)
        for lane in self._lanes.values():
            lane.queue = deque(sorted(lane.queue, key=lambda client: self._tasks[client].place))
