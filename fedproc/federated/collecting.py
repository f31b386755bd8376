"""From tasks to updates in cohort order: who trains when, and what if a worker is lost or late.

Runs in the parent. Every worker trains its clients in cohort order, and updates are taken in
cohort order, so few of them wait. A worker that is lost gives its clients to the others; one that
misses the deadline is replaced.
"""

from __future__ import annotations

import contextlib
from collections import deque
from itertools import takewhile
from typing import TYPE_CHECKING, Final

from fedproc.client.row_loss import NotVectorizableError
from fedproc.client.update import Updates
from fedproc.errors import (
    ClosedError,
    CommandTimeoutError,
    FedprocError,
    RemoteError,
    WorkerLostError,
)
from fedproc.federated.commanding import Broadcast, Commands
from fedproc.federated.lane import Batch, Deadline, Lane, missed
from fedproc.federated.passing import call_there, see, take, wait_for_any
from fedproc.federated.supply import Supply

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from fedproc.client.update import Task, Update
    from fedproc.federated.crew import Crew
    from fedproc.federated.rules import Rules

# What was finished at the deadline is taken all the same; its worker answers at once.
_GRACE_SECONDS: Final = 1.0


class Collector:
    """Trains the clients of one round and gives back their updates."""

    def __init__(
        self,
        crew: Crew,
        broadcast: Broadcast,
        tasks: Mapping[str, Task],
        rules: Rules,
        meanwhile: Callable[[], None],
    ) -> None:
        """Prepares a round.

        Args:
            crew: The trainers.
            broadcast: What the clients start from.
            tasks: Client -> its task, in cohort order.
            rules: Say how often a client that was training when its worker was lost trains again,
                and in how many seconds from now one that is not done is a failure.
            meanwhile: Called once, when the workers have something to do.
        """
        self._crew = crew
        self._commands = Commands(crew, broadcast, tasks)
        self._tasks = tasks
        self._retries = rules.retries
        self._deadline = Deadline(rules.deadline)
        self._meanwhile = meanwhile
        self._losses = dict.fromkeys(tasks, 0)
        self._arrived: dict[str, Update | FedprocError] = {}
        self._seen: dict[str, Batch] = {}  # of updates that are read where they are
        self._open = set(tasks)
        self._homes: dict[str, str] = {}
        self._lanes: dict[str, Lane] = {}
        self._block_bytes = len(broadcast.block)
        self._supply = Supply(crew, tasks, self._losses, self._block_bytes)

    def runs(self) -> Iterator[Sequence[tuple[Task, Update | FedprocError]]]:
        """Yields every task with its update or with why there is none, in cohort order.

        Those that have come by then are yielded together: folding many costs little more than
        folding one. Their updates may be read until the next are asked for.

        Raises:
            ClosedError: The cluster was closed.
            NotShippableError: The model or the local training cannot be sent.
        """
        self._enqueue(list(self._tasks))
        if self._lanes:
            self._supply.ask(next(iter(self._lanes)), self._deadline)
        if self._crew.stacking.on is None:
            self._measure()
        order = deque(self._tasks)
        try:
            while order:
                while order[0] not in self._arrived:
                    self._advance(order[0])
                clients = list(takewhile(self._arrived.__contains__, order))
                yield [(self._tasks[client], self._arrived.pop(client)) for client in clients]
                for _ in clients:
                    order.popleft()
                self._read(clients)
        finally:
            self._read(list(self._seen))
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
                meanwhile, self._meanwhile = self._meanwhile, lambda: None
                meanwhile()
                self._fetch_or_wait(self._lanes[self._homes[client]])
            except WorkerLostError as error:
                self._recover(error.worker or self._homes[client], error)
        except CommandTimeoutError:
            self._expire()

    def _measure(self) -> None:
        """Lets one worker train its first clients in both ways, for nothing but the time."""
        name, lane = max(self._lanes.items(), key=lambda item: len(item[1].queue))
        clients = self._supply.sample(lane)
        patience = Deadline(self._deadline.seconds and self._deadline.seconds / 2)

        def train(method: str) -> Updates:
            promise = self._commands.train(name, lane, clients, method)
            result: Updates = take(promise, patience.left())
            return result

        if len(clients) > 1:
            self._crew.stacking.decide(train)
        if patience.over():  # it is busy with them, and the round needs it
            lane.sent = None
            self._crew.replace(name)
            self._crew.restored()

    # ---- submitting

    def _submit(self) -> None:
        """Keeps every worker supplied; one with nothing to do always gets something."""
        for name, lane in self._lanes.items():
            while self._supply.has_room(lane) and (lane.queue or self._takes_over(name, lane)):
                self._supply.submit(name, lane, self._commands, self._deadline)

    def _takes_over(self, name: str, lane: Lane) -> bool:
        """Gives a worker that is done clients of another one, if there are any."""
        lane.queue.extend(self._supply.spared(lane, self._lanes.values()))
        self._homes.update(dict.fromkeys(lane.queue, name))
        return bool(lane.queue)

    # ---- taking

    def _fetch_or_wait(self, lane: Lane) -> None:
        """Takes the next batch of a worker, or waits until there is somebody to be supplied."""
        others = self._supply.awaited(self._lanes.values())
        if others:
            wait_for_any([lane.batches[0].promise, *others], self._deadline.left())
        if not others or lane.batches[0].promise.is_done():
            self._fetch(lane, self._deadline.left())

    def _fetch(self, lane: Lane, timeout: float | None) -> None:
        """Takes one batch home; every failure but a loss is the clients' own."""
        batch = lane.batches[0]
        batch.spent = True
        try:
            result = see(batch.promise, timeout)
        except (ClosedError, WorkerLostError):
            raise
        except FedprocError as error:
            if isinstance(error, NotVectorizableError):
                self._see_all()
                raise
            if isinstance(error, CommandTimeoutError) and not isinstance(error, RemoteError):
                raise
            for client in batch.clients:
                self._settle(client, error)
        else:
            self._note(batch)
            if isinstance(result, Updates):
                self._unpack(lane, batch, result)
            else:
                self._settle(batch.clients[0], result)
        lane.taken()

    def _note(self, batch: Batch) -> None:
        """Remembers whose updates lie in the worker's memory until they are read."""
        batch.unread = len(batch.clients)
        self._seen.update(dict.fromkeys(batch.clients, batch))

    def _read(self, clients: Sequence[str]) -> None:
        """Notes that updates were folded, or are not needed."""
        for client in clients:
            if (batch := self._seen.pop(client, None)) is not None:
                batch.read()

    def _see_all(self) -> None:
        """Takes what is on its way: others refuse for the same reason, and it is told once."""
        for batch in [b for lane in self._lanes.values() for b in lane.batches if not b.spent]:
            batch.spent = True
            with contextlib.suppress(FedprocError):
                take(batch.promise, self._deadline.left())

    def _unpack(self, lane: Lane, batch: Batch, result: Updates) -> None:
        """Takes several updates apart; what made a client fail is asked for by itself."""
        name = self._homes[batch.clients[0]]
        updates = result.unpacked(self._block_bytes)
        for client, update in zip(batch.clients, updates, strict=True):
            if update is None:
                promise = call_there(self._crew.trainer(name), "failure", client)
                lane.submit(Batch([client], promise))
            else:
                self._settle(client, update)

    def _settle(self, client: str, result: Update | FedprocError) -> None:
        if isinstance(result, FedprocError):
            result.__traceback__ = None  # the history keeps it: its frames hold the whole round
        if client in self._open:
            self._open.remove(client)
            self._arrived[client] = result
            if not (self._crew.stacking.on or isinstance(result, FedprocError)):
                self._crew.pace.learn(result.ended - result.began)

    # ---- losses and the deadline

    def _recover(self, name: str, error: WorkerLostError) -> None:
        """Gives the clients of a lost worker to its replacement or to the others."""
        lane = self._lanes.pop(name, Lane())
        suspects = self._suspects(name, lane)
        lane.abandon()
        for suspect in suspects:
            self._losses[suspect] += 1
            if self._losses[suspect] > self._retries:
                self._settle(suspect, error)
        self._drain()
        left = self._unsubmitted()
        if self._crew.restored():
            self._enqueue(left)
        else:
            for client in left:
                self._settle(client, error)

    def _unsubmitted(self) -> list[str]:
        """Empties all queues, since it has changed who can train whom; returns who is to train."""
        submitted = set[str]()
        for lane in self._lanes.values():  # there is one if another worker was lost, too
            lane.queue.clear()
            submitted.update(client for batch in lane.batches for client in batch.clients)
        return [c for c in self._tasks if c in self._open and c not in submitted]

    def _suspects(self, name: str, lane: Lane) -> list[str]:
        """Returns who was training; the first not known to have finished, in doubt."""
        submitted = [(client, batch) for batch in lane.batches for client in batch.clients]
        if not submitted:
            return []
        place = self._crew.last_step(name)
        found = [pair for pair in submitted if self._tasks[pair[0]].place == place]
        client, batch = found[0] if found else submitted[0]
        return list(batch.clients) if batch.stacked else [client]

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
        """Puts clients, in cohort order, into the empty queues of their workers."""
        self._homes.update(self._crew.assigned(clients))
        for client in clients:
            self._lanes.setdefault(self._homes[client], Lane()).queue.append(client)
