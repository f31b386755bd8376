"""One attempt at a secure sum: the four steps of the protocol over the workers, with fresh keys.

Runs in the parent, which relays messages and is the server of
:class:`fedproc.federated.secure_sum.SecureSum`. Keys live in workers and end with them.
"""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from fedproc.client.secure import Setup
from fedproc.errors import (
    ClosedError,
    CommandTimeoutError,
    FedprocError,
    RemoteError,
    WorkerLostError,
)
from fedproc.federated.lane import missed
from fedproc.federated.passing import abandon, call_there, send_along, take
from fedproc.federated.secure_sum import SecureSum

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    from fedproc.client.secure_trainer import MaskedUpdate
    from fedproc.client.summed import SummedVector
    from fedproc.client.update import Task
    from fedproc.federated.commanding import Broadcast
    from fedproc.federated.crew import Crew
    from fedproc.federated.lane import Deadline
    from fedproc.federated.passing import Promise

    Taken = Callable[[str, str, "MaskedUpdate | FedprocError"], None]
    """Is told client, worker and what came of it."""

# Masked rows that a worker may have finished or queued beyond the one that is taken next.
_WINDOW_BYTES: Final = 256 << 20
_WINDOW_LEAST: Final = 2
_WINDOW_MOST: Final = 64
# What was finished at the deadline is taken all the same; its worker answers at once.
_GRACE_SECONDS: Final = 1.0


class KeysLostError(Exception):
    """A worker was lost with the keys of its clients before anything was released.

    Attributes:
        error: The loss.
    """

    def __init__(self, error: WorkerLostError) -> None:
        super().__init__(str(error))
        self.error = error


class Attempt:
    """The four steps, once.

    Attributes:
        sum: The server's side of the protocol.
        failures: Client -> why its update does not count.
        relayed_bytes: Keys and shares, up and down, if clients were remote.
    """

    def __init__(
        self,
        crew: Crew,
        tasks: Mapping[str, Task],
        broadcast: Broadcast,
        vector: SummedVector,
        threshold: int,
        *,
        deadline: Deadline,
        taken: Taken,
        last: bool,
    ) -> None:
        """Prepares it.

        Args:
            crew: The trainers.
            tasks: Client -> its task, in cohort order.
            broadcast: What the clients start from.
            vector: The form of what they send.
            threshold: How many clients must be left after every step.
            deadline: When clients that still train have failed.
            taken: Told of every client once, when its update was added or has failed.
            last: Go on without the clients of a lost worker, instead of raising KeysLostError.
        """
        setup = Setup(os.urandom(32), tuple(tasks), threshold)
        self.sum = SecureSum(setup, vector.numel)
        self.failures: dict[str, BaseException] = {}
        self.relayed_bytes = 0
        self._crew, self._tasks, self._broadcast = crew, tasks, broadcast
        self._vector = vector
        self._deadline, self._taken, self._last = deadline, taken, last
        self._homes = crew.homes(list(tasks))
        # A worker that is replaced has a new trainer without keys: these are asked, or nobody.
        self._trainers = {name: crew.trainer(name) for name in dict.fromkeys(self._homes.values())}
        self._settled: set[str] = set()
        self._queues: dict[str, deque[str]] = {}
        self._flying: dict[str, dict[str, Promise]] = {}
        self._sent: dict[str, tuple[Any, Any]] = {}
        row_bytes = 8 * vector.numel
        self._window = min(_WINDOW_MOST, max(_WINDOW_LEAST, _WINDOW_BYTES // row_bytes))

    def exchange_keys(self) -> None:
        """Steps 0 and 1.

        Raises:
            QuorumError: Too few clients are left, as in the steps below.
            KeysLostError: A worker was lost, unless this attempt is the last.
        """
        setup, here = self.sum.setup, self._tasks
        self.sum.take_keys(self._ask(here, "advertise_keys", lambda own: (setup, own)))
        keys = self.sum.keys
        self.sum.take_shares(self._ask(keys, "share_keys", lambda _: (keys,)))
        everybody = {client: self.sum.sealed_for(client) for client in self.sum.sharing}
        shares = sum(len(sealed) for box in everybody.values() for sealed in box.values())
        public = sum(len(key) for pair in keys.values() for key in pair)
        # every client sends its public keys and its shares, and receives those of the others
        self.relayed_bytes += public * (1 + len(keys)) + 2 * shares

    def collect(self) -> None:
        """Step 2: clients train; their masked vectors are added as they come.

        Raises:
            KeysLostError: A worker was lost, unless this attempt is the last.
        """
        for client in self.sum.sharing:
            self._queues.setdefault(self._homes[client], deque()).append(client)
        try:
            for client in self.sum.sharing:
                if client not in self._settled:
                    self._advance(client)
        finally:
            for name in self._flying:
                self._abandon(name)
        self.sum.require_survivors()

    def unmask(self) -> Tensor:
        """Step 3: the survivors release shares. After this there must be no other attempt.

        Returns:
            The sum over the survivors: int64, shape (numel,).
        """
        self._last = True
        survivors = self.sum.survivors
        answers = self._ask(survivors, "unmask", lambda _: (survivors,))
        for released in answers.values():
            self.relayed_bytes += sum(len(share) for part in released for share in part.values())
        return self.sum.unmask(answers)

    # ---- steps in which a worker answers for all of its clients at once

    def _ask(
        self, clients: Iterable[str], step: str, arguments: Callable[[list[str]], tuple[Any, ...]]
    ) -> dict[str, Any]:
        """Calls ``step`` of the trainers of clients and joins the answers: client -> answer."""
        own: dict[str, list[str]] = {}
        for client in clients:
            own.setdefault(self._homes[client], []).append(client)
        promises: dict[str, Promise] = {}
        answers: dict[str, Any] = {}
        try:
            for name, here in own.items():
                try:
                    promises[name] = call_there(self._trainers[name], step, *arguments(here))
                except WorkerLostError as error:
                    self._lose(name, error)
            while promises:
                name, promise = next(iter(promises.items()))
                del promises[name]
                answers |= self._answer(name, promise, own[name])
        finally:
            for promise in promises.values():
                abandon(promise)
        return {client: answers[client] for client in clients if client in answers}

    def _answer(self, name: str, promise: Promise, clients: list[str]) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = take(promise)
        except ClosedError:
            raise
        except WorkerLostError as error:
            self._lose(name, error)
        except FedprocError as error:
            for client in clients:
                self._fail(client, error)
        else:
            return answer
        return {}

    # ---- training

    def _advance(self, client: str) -> None:
        """Takes the masked vector of a client, or notes why there is none."""
        name = self._homes[client]
        if self._deadline.over():
            self._expire()
            return
        self._supply()
        if client in self._settled:  # its worker was lost meanwhile
            return
        try:
            self._take(name, client, self._deadline.left())
        except CommandTimeoutError:
            self._expire()

    def _supply(self) -> None:
        """Keeps every worker supplied, within the window."""
        for name, queue in self._queues.items():
            flying = self._flying.setdefault(name, {})
            try:
                while queue and len(flying) < self._window:
                    flying[queue[0]] = self._submit(name, queue[0])
                    queue.popleft()
            except WorkerLostError as error:
                self._lose(name, error)

    def _submit(self, name: str, client: str) -> Promise:
        if name not in self._sent:
            worker, shared = self._crew.worker(name), self._broadcast.shared
            self._sent[name] = (
                send_along(worker, self._broadcast.block),
                send_along(worker, dict(shared)) if shared else None,
            )
        block, shared_there = self._sent[name]
        trainer, task = self._trainers[name], self._tasks[client]
        sealed, form = self.sum.sealed_for(client), (self._vector.fixed, self._vector.uniform)
        return call_there(trainer, "train_masked", block, task, shared_there, sealed, form)

    def _take(self, name: str, client: str, timeout: float | None) -> None:
        """Takes one vector home and adds it; every failure but a loss is the client's own."""
        promise = self._flying[name].pop(client)
        try:
            update: MaskedUpdate = take(promise, timeout)
        except ClosedError:
            raise
        except WorkerLostError as error:
            self._lose(name, error)
        except FedprocError as error:
            if isinstance(error, CommandTimeoutError) and not isinstance(error, RemoteError):
                raise
            self._fail(client, error)
        else:
            self.sum.add(client, update.words)
            self._settled.add(client)
            self._taken(client, name, update)

    # ---- losses and the deadline

    def _lose(self, name: str, error: WorkerLostError) -> None:
        """Ends the attempt, or lets the clients of a lost worker drop out."""
        if not self._last:
            raise KeysLostError(error) from error
        self._abandon(name)
        self._queues.get(name, deque()).clear()
        for client, home in self._homes.items():
            if home == name:
                self._fail(client, error)

    def _fail(self, client: str, error: FedprocError) -> None:
        if client not in self._settled:
            self._settled.add(client)
            self.failures[client] = error
            self._taken(client, self._homes[client], error)

    def _abandon(self, name: str) -> None:
        """Gives up what is on its way from a worker."""
        flying = self._flying.get(name, {})
        while flying:
            abandon(flying.popitem()[1])

    def _expire(self) -> None:
        """Ends the training: who trains or waits has failed, and busy workers are replaced."""
        for name, flying in self._flying.items():
            for client, promise in list(flying.items()):
                if promise.arrived():
                    self._take(name, client, _GRACE_SECONDS)
        for name, queue in self._queues.items():
            unfinished = [c for c, home in self._homes.items() if home == name]
            unfinished = [c for c in unfinished if c not in self._settled]
            waiting = set(queue)
            self._abandon(name)
            queue.clear()
            for client in unfinished:
                task, seconds = self._tasks[client], self._deadline.seconds
                self._fail(client, missed(task, seconds, training=client not in waiting))
            if unfinished:
                self._crew.replace(name)
