"""What goes to a client and what comes back, as records.

Made in one process and read in another: the parent makes tasks, workers make updates.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NO_BLOCK: Final = torch.empty(0, dtype=torch.uint8)


class Task(NamedTuple):
    """One client's work in one round.

    Attributes:
        client: Name of the client.
        round: Number of the round, from 1.
        seed: Seed of the run; every stream of the client derives from it.
        place: Its place in the cohort.
        clip_norm: Return the change of the model, clipped to this L2 norm, instead of the model;
            None: return the model.
    """

    client: str
    round: int
    seed: int
    place: int = 0
    clip_norm: float | None = None


def pack_tasks(tasks: Sequence[Task]) -> bytes:
    """Packs tasks of one round; a plain pickle of columns costs a tenth of the records'."""
    first = tasks[0]
    columns = [task.client for task in tasks], [task.place for task in tasks]
    return pickle.dumps((first.round, first.seed, first.clip_norm, *columns), protocol=5)


def unpack_tasks(packed: bytes) -> list[Task]:
    """Unpacks what :func:`pack_tasks` packed."""
    round_, seed, clip_norm, clients, places = _Columns(io.BytesIO(packed)).load()
    pairs = zip(clients, places, strict=True)
    return [Task(client, round_, seed, place, clip_norm) for client, place in pairs]


class _Columns(pickle.Unpickler):
    """Reads lists, texts and numbers: tasks hold nothing else, so nothing else is found."""

    def find_class(self, module: str, name: str) -> Any:
        """Raises UnpicklingError."""
        raise pickle.UnpicklingError(f"packed tasks name {module}.{name}; they hold no code")


@dataclass(slots=True)
class Update:
    """What a client returns; the trainer fills in ``block`` and the times last.

    Attributes:
        block: The trained model in the flat form of its layout, or its clipped change, see
            :func:`fedproc.client.clipping.clip_update`: uint8, shape (nbytes,).
        examples: Rows the client holds.
        steps: Optimizer steps, or ``metrics["steps"]`` of a custom function, or None.
        step_norm: Sum of the coefficients by which the steps applied the gradients, in units of
            the learning rate (FedNova's ``|a|_1``), or None where ``steps`` is None.
        rows: Rows processed; 0 for a custom function.
        loss_sum: Sum of the loss over the rows processed.
        metrics: Numbers to report.
        state: What the client keeps if the update is accepted.
        began, ended: When it trained, in seconds of ``time.perf_counter``, which all processes of
            a machine share.
        within: Whether the change was small enough not to be clipped; None without clipping.
    """

    block: Tensor
    examples: int
    steps: float | None
    step_norm: float | None
    rows: int
    loss_sum: float
    metrics: dict[str, float] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    began: float = 0.0
    ended: float = 0.0
    within: bool | None = None


@dataclass(frozen=True, slots=True)
class Updates:
    """What several clients return at once.

    A record of Python costs several times its content when it is pickled by itself, so the numbers
    of all clients travel as one plain pickle.

    Attributes:
        blocks: Their blocks: uint8, shape (clients, at least nbytes), every row aligned.
        numbers: All but blocks and states, of every client; None for one that failed. Pickled.
        states: Place in ``blocks`` -> what that client keeps; only of those that keep something.
    """

    blocks: Tensor
    numbers: bytes
    states: dict[int, dict[str, Any]]

    @classmethod
    def of(cls, blocks: Tensor, updates: Sequence[Update | None]) -> Updates:
        """Packs updates whose blocks are the rows of ``blocks``; None is a client that failed.

        Of one that failed nothing is shown: its row becomes zeros.
        """
        for place, update in enumerate(updates):
            if update is None:
                blocks[place].zero_()
        numbers = pickle.dumps([update and _numbers(update) for update in updates], protocol=5)
        states = {n: update.state for n, update in enumerate(updates) if update and update.state}
        return cls(blocks, numbers, states)

    def unpacked(self, nbytes: int) -> Iterator[Update | None]:
        """Yields the updates, each with the first ``nbytes`` of its row as its block."""
        rows = self.blocks[:, :nbytes].unbind()
        for place, (numbers, row) in enumerate(zip(pickle.loads(self.numbers), rows, strict=True)):
            if numbers is None:
                yield None
            else:
                update = Update(row, *numbers)
                update.state = self.states.get(place, {})
                yield update


def _numbers(update: Update) -> tuple[Any, ...]:
    return (
        update.examples,
        update.steps,
        update.step_norm,
        update.rows,
        update.loss_sum,
        update.metrics,
        {},  # the state travels by itself: it may hold tensors
        update.began,
        update.ended,
        update.within,
    )
