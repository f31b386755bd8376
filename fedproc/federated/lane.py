"""What one worker has to do in a round: clients to submit, batches on their way. In the parent."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from fedproc.errors import CommandTimeoutError
from fedproc.federated.passing import abandon, give_back

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedproc.client.update import Task
    from fedproc.federated.passing import Promise

# Clients of one command: as many as train in this time, so that the cost of a command is spread
# over quick clients, and slow ones still go one by one.
_BATCH_SECONDS: Final = 0.030
_BATCH_MOST: Final = 32
# Clients that train for less time together are not split between workers.
_SHARED_SECONDS: Final = 0.015
_BATCH_BYTES: Final = 8 << 20


@dataclass(slots=True, eq=False)
class Batch:
    """Clients that one command trains.

    Attributes:
        clients: Their names, in cohort order.
        promise: What comes back: an update, or the updates of all.
        stacked: They train at once, so a loss hits all of them.
        averaged: Their mean comes back, instead of a block of each.
        spent: A wait for it ran out, so it cannot be taken any more.
        unread: How many of its updates are still to be folded; the last one gives its memory back.
    """

    clients: Sequence[str]
    promise: Promise
    stacked: bool = False
    averaged: bool = False
    spent: bool = False
    unread: int = 0

    @property
    def blocks(self) -> int:
        """How many come back."""
        return 1 if self.averaged else len(self.clients)

    def finished(self) -> bool:
        """Whether it can be taken without waiting."""
        return not self.spent and self.promise.arrived()

    def read(self) -> None:
        """One of its updates was folded, or is not needed."""
        self.unread -= 1
        if self.unread == 0:
            give_back(self.promise)

    def abandon(self) -> None:
        """Gives it up."""
        if not self.spent:
            abandon(self.promise)


@dataclass(slots=True, eq=False)
class Lane:
    """The clients of one worker.

    Attributes:
        queue: Not submitted yet, in cohort order.
        batches: Submitted, in the order of their commands.
        on_the_way, blocks: Clients that were submitted and not taken, and blocks they come back in.
        sent: Pointers to the broadcast in that worker; None before it was sent.
    """

    queue: deque[str] = field(default_factory=deque)
    batches: deque[Batch] = field(default_factory=deque)
    on_the_way: int = 0
    blocks: int = 0
    sent: tuple[Any, Any] | None = None

    def unfinished(self) -> list[Batch]:
        """Lists the batches that the worker is not known to be done with."""
        return [batch for batch in self.batches if not batch.promise.is_done()]

    def is_ahead(self, least: int) -> bool:
        """Whether the worker has so many batches, and half of the clients that are left."""
        unfinished = self.unfinished()
        clients = sum(len(batch.clients) for batch in unfinished)
        return len(unfinished) >= least and clients >= len(self.queue)

    def submit(self, batch: Batch) -> None:
        """Notes a batch that was submitted, of clients at the head of the queue or before it."""
        self.batches.append(batch)
        self.on_the_way += len(batch.clients)
        self.blocks += batch.blocks

    def taken(self) -> None:
        """Forgets the first batch."""
        batch = self.batches.popleft()
        self.on_the_way -= len(batch.clients)
        self.blocks -= batch.blocks

    def abandon(self) -> None:
        """Gives up all batches."""
        for batch in self.batches:
            batch.abandon()
        self.batches.clear()
        self.on_the_way = self.blocks = 0


def missed(task: Task, seconds: float | None, *, training: bool) -> CommandTimeoutError:
    """Makes the failure of a client that was not done at the deadline."""
    what = "was still training; its worker was replaced" if training else "was still queued"
    return CommandTimeoutError(
        f"client {task.client!r} missed the deadline of {seconds:g} s in round {task.round}: it "
        f"{what}"
    )


class Pace:
    """How long clients train, learned from round to round."""

    def __init__(self) -> None:
        """Knows nothing yet: clients go one by one."""
        self._seconds: float | None = None

    def learn(self, seconds: float) -> None:
        """Takes in how long a client trained; a geometric mean, so a hiccup changes little."""
        known, new = self._seconds, max(seconds, 1e-6)
        self._seconds = new if known is None else known**0.9 * new**0.1

    def batch_size(self, nbytes: int) -> int:
        """Returns how many clients one command should train; their blocks have ``nbytes``."""
        if self._seconds is None:
            return 1
        fitting = _BATCH_BYTES // max(1, nbytes)
        in_time = int(_BATCH_SECONDS / self._seconds)
        return max(1, min(_BATCH_MOST, fitting, in_time))

    def are_many(self, clients: int) -> bool:
        """Whether so many clients train for longer than one command is worth."""
        return self._seconds is not None and clients * self._seconds > _SHARED_SECONDS


class Deadline:
    """The end of a round's patience."""

    def __init__(self, seconds: float | None) -> None:
        """Starts now; None never ends."""
        self.seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        """Returns the seconds left, at least 0; None if there is no end."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def over(self) -> bool:
        """Tells whether it has passed."""
        return self._end is not None and time.monotonic() >= self._end
