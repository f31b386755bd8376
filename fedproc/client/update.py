"""What goes to a client and what comes back, as records.

Made in one process and read in another: the parent makes tasks, workers make updates.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import torch
from torch import Tensor

from fedproc.memory.records import travels_as_record

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NO_BLOCK: Final = torch.empty(0, dtype=torch.uint8, device="cpu")


def block_of(sent: Tensor | bytes) -> Tensor:
    """Returns a block (uint8, shape (nbytes,), read only) that may have come as its bytes."""
    if isinstance(sent, Tensor):
        return sent
    return torch.frombuffer(bytearray(sent), dtype=torch.uint8)


class Task(NamedTuple):
    """One client's work in one round.

    Attributes:
        client: Name of the client.
        round: Number of the round, from 1.
        seed: Seed of the run; every stream of the client derives from it.
        place: Its place in the cohort.
        clip_norm: Return the change of the model, clipped to this L2 norm, instead of the model;
            None: return the model.
        weight: What the client weighs in the mean of those trained at once, which is returned
            instead of their models; None: return its own.
    """

    client: str
    round: int
    seed: int
    place: int = 0
    clip_norm: float | None = None
    weight: float | None = None


def weights_of(tasks: Iterable[Task]) -> list[float]:
    """Lists the weights of tasks whose mean is wanted: all have one."""
    return [cast("float", task.weight) for task in tasks]


def pack_tasks(tasks: Sequence[Task]) -> bytes:
    """Packs tasks of one round; a plain pickle of columns costs a tenth of the records'."""
    first = tasks[0]
    weights = None if first.weight is None else [task.weight for task in tasks]
    columns = [task.client for task in tasks], [task.place for task in tasks], weights
    return pickle.dumps((first.round, first.seed, first.clip_norm, *columns), protocol=5)


def unpack_tasks(packed: bytes) -> list[Task]:
    """Unpacks what :func:`pack_tasks` packed."""
    round_, seed, clip_norm, clients, places, weights = _Columns(io.BytesIO(packed)).load()
    columns = zip(clients, places, weights or [None] * len(clients), strict=True)
    return [Task(client, round_, seed, place, clip_norm, w) for client, place, w in columns]


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
        began, ended: When it trained, in seconds of ``time.perf_counter``, which all processes of
            a machine share.
        within: Whether the change was small enough not to be clipped; None without clipping.
        block_weight: If the mean of clients trained at once was returned: the sum of their
            weights on the one that has it in ``block``, 0 on the others. None: ``block`` is the
            client's own.
        state: What the client keeps if the update is accepted.
    """

    block: Tensor
    examples: int
    steps: float | None
    step_norm: float | None
    rows: int
    loss_sum: float
    metrics: dict[str, float] = field(default_factory=dict)
    began: float = 0.0
    ended: float = 0.0
    within: bool | None = None
    block_weight: float | None = None
    state: dict[str, Any] = field(default_factory=dict)


# all but the block, which comes first, and the state, which may hold tensors
_numbers_of: Final = attrgetter(*[entry.name for entry in fields(Update)[1:-1]])


class Updates(NamedTuple):
    """What several clients return at once.

    A record of Python costs several times its content when it is pickled by itself, so the numbers
    of all clients travel as one plain pickle of columns, and this record is a tuple.

    Attributes:
        blocks: Their blocks: uint8, shape (blocks, at least nbytes), every row aligned.
        numbers: All but blocks and states, of every client that did not fail, by columns. Pickled.
        states: Place of a client -> what it keeps; only of those that keep something.
        rows: Where the block of each client is in ``blocks``; None for one without. Not given, each
            has the row of its place.
        failed: Places of the clients that failed.
    """

    blocks: Tensor
    numbers: bytes
    states: dict[int, dict[str, Any]]
    rows: list[int | None] | None = None
    failed: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls,
        blocks: Tensor,
        updates: Sequence[Update | None],
        rows: list[int | None] | None = None,
    ) -> Updates:
        """Packs updates whose blocks are the rows of ``blocks``; None is a client that failed.

        Of one that failed nothing is shown: its row becomes zeros.
        """
        failed = frozenset(place for place, update in enumerate(updates) if update is None)
        for place in failed:
            row = place if rows is None else rows[place]
            if row is not None:
                blocks[row].zero_()
        columns = list(zip(*[_numbers_of(update) for update in updates if update], strict=True))
        states = {n: update.state for n, update in enumerate(updates) if update and update.state}
        return cls(blocks, pickle.dumps(columns, protocol=5), states, rows, failed)

    def unpacked(self, nbytes: int) -> list[Update | None]:
        """Lists the updates, each with the first ``nbytes`` of its row as its block."""
        blocks: Sequence[Tensor] = self.blocks[:, :nbytes].unbind()
        if self.rows is not None:
            blocks = [NO_BLOCK if row is None else blocks[row] for row in self.rows]
        if self.failed:
            blocks = [block for place, block in enumerate(blocks) if place not in self.failed]
        updates: list[Update | None] = list(map(Update, blocks, *pickle.loads(self.numbers)))
        for place in sorted(self.failed):
            updates.insert(place, None)
        for place, state in self.states.items():
            cast("Update", updates[place]).state = state
        return updates


travels_as_record(Updates, lambda updates: not updates.states)
