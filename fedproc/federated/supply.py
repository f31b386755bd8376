"""How many clients a worker is given at a time, and whether they train at once. In the parent."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from fedproc.client.training import LocalTraining
from fedproc.federated.lane import Batch
from fedproc.federated.passing import call_there, take

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from fedproc.client.update import Task
    from fedproc.federated.commanding import Commands
    from fedproc.federated.crew import Crew
    from fedproc.federated.lane import Deadline, Lane
    from fedproc.federated.passing import Promise

# Updates that a worker may have finished or queued beyond the one that is taken next: enough that
# it never waits for the parent, few enough that memory does not grow with the cohort.
_WINDOW_BYTES: Final = 64 << 20
_WINDOW_LEAST: Final = 4
_WINDOW_MOST: Final = 256
# Batches that a worker has at a time where others may take its clients over: one that it trains,
# one that lies ready.
_BATCHES_AHEAD: Final = 2


class Supply:
    """Takes the next clients of a worker from its lane.

    Attributes:
        together: Whether clients take one step each, of which only the mean is wanted.
    """

    def __init__(
        self, crew: Crew, tasks: Mapping[str, Task], losses: Mapping[str, int], nbytes: int
    ) -> None:
        """Starts a round.

        Args:
            crew: The trainers.
            tasks: Client -> its task.
            losses: Client -> how often its worker was lost while it trained.
            nbytes: Bytes of a block.
        """
        self._crew = crew
        self._tasks = tasks
        self._losses = losses
        self._nbytes = nbytes
        self._blocks = max(_WINDOW_LEAST, _WINDOW_BYTES // max(1, nbytes))
        self.together = False

    def ask(self, name: str, deadline: Deadline) -> None:
        """Finds out whether one step can be taken for many clients; a worker is asked once."""
        local, first = self._crew.local, next(iter(self._tasks.values()))
        if first.weight is None or not isinstance(local, LocalTraining):
            return  # each update is wanted by itself, or no stacks are trained
        sizes = self._crew.data.sizes
        if local.steps(max(sizes[client] for client in self._tasks)) == 1:
            self.together = self._crew.stacking.is_affine(
                lambda: take(
                    call_there(self._crew.trainer(name), "takes_affine_steps"), deadline.left()
                )
            )

    def has_room(self, lane: Lane) -> bool:
        """Whether a worker may have more; one with nothing to do always may."""
        if not lane.batches:
            return True
        if self._crew.shares and lane.is_ahead(_BATCHES_AHEAD):
            return False
        return lane.on_the_way < _WINDOW_MOST and lane.blocks < self._blocks

    def spared(self, lane: Lane, lanes: Collection[Lane]) -> list[str]:
        """Takes every second client of the longest queue, for a worker that has nothing to do."""
        if not self._crew.shares or lane.unfinished():
            return []
        longest = max(lanes, key=lambda other: len(other.queue))
        clients = list(longest.queue)
        longest.queue = deque(clients[1::2])
        return clients[::2]

    def awaited(self, lanes: Collection[Lane]) -> list[Promise]:
        """Lists what to wait for, since its worker is to be given more when it comes.

        That is the last but one of each: while the last is trained there is time for it.
        """
        if not self._crew.shares or not any(lane.queue for lane in lanes):
            return []
        return [batch.promise for lane in lanes for batch in lane.unfinished()[-2:][:1]]

    def sample(self, lane: Lane) -> list[str]:
        """Returns the clients that show which way is faster."""
        size = self._crew.stacking.size(self._nbytes)
        return list(lane.queue)[: max(2, size) if self.together else size]

    def submit(self, name: str, lane: Lane, commands: Commands, deadline: Deadline) -> None:
        """Gives a worker its next clients."""
        clients = self._next(lane, deadline)
        stacked = bool(self._crew.stacking.on) and len(clients) > 1
        averaged = stacked and self._tasks[clients[0]].weight is not None
        promise = commands.train(name, lane, clients, "train_stack" if stacked else "train_some")
        lane.submit(Batch(clients, promise, stacked, averaged))
        for _ in clients:
            lane.queue.popleft()

    def _next(self, lane: Lane, deadline: Deadline) -> list[str]:
        stacking = self._crew.stacking
        if stacking.on:
            size = stacking.size(self._nbytes, together=self.together)
        elif deadline.seconds:
            size = 1  # so that as many as possible are done in time
        else:
            size = self._crew.pace.batch_size(self._nbytes)
            if self._crew.shares and self._crew.pace.are_many(len(lane.queue)):
                size = min(size, -(-len(lane.queue) // 2))  # the rest is for whoever is quick
        clients = [lane.queue[place] for place in range(min(size, len(lane.queue)))]
        if stacking.on:
            # who may have ended a worker trains alone: it takes nobody along if it does it again
            lost = [place for place, client in enumerate(clients) if self._losses[client]]
            return clients[: max(1, lost[0])] if lost else clients
        return clients
