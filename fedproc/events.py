"""What happened, as frozen records, and the protocol of those who listen.

Used in the parent. Imports nothing of fedproc but errors, so every layer may tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RoundStarted:
    """A round begins.

    Attributes:
        round: Its number, from 1.
        last_round: Number of the last round of this run.
        clients: Clients that were drawn.
    """

    round: int
    last_round: int
    clients: int


@dataclass(frozen=True, slots=True)
class ClientFinished:
    """A client's update was taken or refused.

    Attributes:
        round: Number of the round.
        client: Name of the client.
        failed: Whether it counts as a failure.
    """

    round: int
    client: str
    failed: bool


@dataclass(frozen=True, slots=True)
class RoundFinished:
    """The model was updated.

    Attributes:
        round: Number of the round.
        loss: Mean training loss, None if unknown.
        accuracy: Accuracy of the evaluation, None if there was none.
    """

    round: int
    loss: float | None
    accuracy: float | None


Event = RoundStarted | ClientFinished | RoundFinished


class Sink(Protocol):
    """Listens to events; must not raise."""

    def __call__(self, event: Event, /) -> None:
        """Takes one event, in the thread where it happened."""


def ignore(event: Event) -> None:
    """A sink that does nothing."""
