"""The commands of a round: what goes to a worker so that it trains clients. In the parent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedproc.client.update import pack_tasks
from fedproc.federated.passing import ALONG_BYTES, call_there, send_along

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from fedproc.client.update import Task
    from fedproc.federated.crew import Crew
    from fedproc.federated.lane import Lane
    from fedproc.federated.passing import Promise


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


class Commands:
    """Sends clients to trainers."""

    def __init__(self, crew: Crew, broadcast: Broadcast, tasks: Mapping[str, Task]) -> None:
        """Keeps what clients start from; sends nothing."""
        self._crew = crew
        self._broadcast = broadcast
        self._tasks = tasks
        self._along: set[str] = set()  # workers whose first command was sent

    def train(self, name: str, lane: Lane, clients: Sequence[str], method: str) -> Promise:
        """Lets a worker train clients; a single one is trained by ``train``.

        Args:
            name: The worker.
            lane: What it has to do; remembers what was sent there.
            clients: At least one.
            method: What trains several: ``"train_some"`` or ``"train_stack"``.

        Raises:
            WorkerLostError: The worker has ended.
            NotShippableError: The model or the local training cannot be sent.
        """
        worker, trainer = self._crew.worker(name), self._crew.trainer(name)
        block, shared = self._sent(name, lane)
        kept = {c: dict(self._broadcast.kept[c]) for c in clients if self._broadcast.kept.get(c)}
        # sent by itself: a call does not mix tensors from here with pointers
        if len(clients) == 1:
            (client,) = clients
            state = send_along(worker, kept[client]) if kept else None
            return call_there(trainer, "train", block, self._tasks[client], state, shared)
        states = send_along(worker, kept) if kept else None
        tasks = pack_tasks([self._tasks[client] for client in clients])
        return call_there(trainer, method, block, tasks, states, shared)

    def _sent(self, name: str, lane: Lane) -> tuple[Any, Any]:
        """Returns what a command says of the model, and of what the strategy sends besides."""
        block, shared = self._broadcast.block, self._broadcast.shared
        is_small = len(block) <= ALONG_BYTES and not shared
        if lane.sent is None and is_small and name not in self._along:
            self._along.add(name)
            return block.numpy().tobytes(), None
        if lane.sent is None:
            worker = self._crew.worker(name)
            there = send_along(worker, block)
            lane.sent = there, send_along(worker, dict(shared)) if shared else None
        return lane.sent
