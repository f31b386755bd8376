"""From tasks to updates of clients trained at once, or to their mean; what becomes of failures.

Runs in workers, within a trainer that has loaded the global model and preserves the streams.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedproc.client.row_loss import NotVectorizableError
from fedproc.client.shards import Shards
from fedproc.client.training import LocalTraining, non_finite_update
from fedproc.client.update import Task, Update, weights_of
from fedproc.client.vectorized import Stacks, Trained
from fedproc.client.weighted_mean import WeightedMean

if TYPE_CHECKING:
    from fedproc.client.resident import Resident
    from fedproc.client.work import Span, Work

# inputs and targets of a block, the client's first row in it, and the row after its last
Place = tuple[Tensor, Tensor, int, int]
Known = tuple[Mapping[str, Mapping[str, Any]], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Stacked:
    """What clients trained at once have become.

    Attributes:
        blocks: Their blocks, or first their mean: see :meth:`Layout.new_blocks`.
        rows: Place of a client -> the row of its block; None for one that needs none.
        updates: One per client, or None.
        failures: Client -> why it failed. A client with neither could not be trained at once:
            torch raises on its rows, which halves of the stack found out. Its row is to be written.
    """

    blocks: Tensor
    rows: list[int | None]
    updates: list[Update | None]
    failures: dict[str, BaseException]


@dataclass(frozen=True, slots=True)
class _Group:
    """Clients that were trained in one go: their places in the command, and their results.

    ``values``: their parameters (clients, parameters), or if it ``is_mean``, (1, parameters).
    """

    places: Sequence[int]
    results: list[Update | BaseException]
    values: Tensor
    is_mean: bool


class StackTrainer:
    """Trains clients at once and makes their updates."""

    def __init__(
        self,
        resident: Resident,
        work: Work,
        blocks: Sequence[tuple[Tensor, Tensor]],
        spans: Mapping[str, Span],
    ) -> None:
        """Keeps the parts; nothing is tried yet.

        Args:
            resident: The model, loaded by whoever calls :meth:`train`.
            work: What to do with each client: local epochs.
            blocks: Pairs of inputs and targets.
            spans: Client -> its rows in ``blocks``.
        """
        assert isinstance(work.local, LocalTraining)
        self._layout = resident.layout
        self._work = work
        self._stacks = Stacks(resident, work.local, work.rule, blocks)
        self._blocks = blocks
        self._spans = spans

    def is_affine(self) -> bool:
        """Tells whether the mean of clients that take one step each needs one backward pass."""
        return self._stacks.is_affine()

    def train(self, block: Tensor, tasks: Sequence[Task], known: Known) -> Stacked:
        """Trains clients at once.

        Args:
            block: The global model, which the resident one holds.
            tasks: The clients, each with at least one row. If they have weights, their mean is
                wanted.
            known: Client -> what it kept, and what the strategy sent.

        Raises:
            NotVectorizableError: They cannot be trained at once.
        """
        began = time.perf_counter()
        stack = _Stack(self._stacks, tasks, [self._place_of(task.client) for task in tasks], known)
        results: list[Update | BaseException | None] = [None] * len(tasks)
        layout, mean = self._layout, _Mean(self._layout.trained_numel)
        averaged = tasks[0].weight is not None
        blocks = None if averaged else self._new_blocks(block, tasks, len(tasks))
        for group in stack.train_all():
            self._reject_non_finite(block, tasks, group)
            for place, result in zip(group.places, group.results, strict=True):
                results[place] = result
            if blocks is None:  # one after the other: many of large models would fill the memory
                mean.add(tasks, group)
            else:
                places = torch.tensor(group.places, device="cpu")
                layout.trained_rows(blocks).index_copy_(0, places, group.values.cpu())
        _share_time(results, began)
        rows = list[int | None](range(len(tasks)))
        if blocks is None:
            rows = _share_mean(tasks, results)
            blocks = self._new_blocks(block, tasks, 1 + results.count(None))
            mean.write(layout.trained_rows(blocks)[0])
        failures = {
            task.client: result
            for task, result in zip(tasks, results, strict=True)
            if isinstance(result, BaseException)
        }
        updates = [result if isinstance(result, Update) else None for result in results]
        return Stacked(blocks, rows, updates, failures)

    def _place_of(self, client: str) -> Place:
        span = self._spans[client]
        return *self._blocks[span.block], span.start, span.stop

    def _reject_non_finite(self, block: Tensor, tasks: Sequence[Task], group: _Group) -> None:
        if group.is_mean:  # it is finite
            return
        # a sum is finite only if all its terms are; the few others are looked at one by one
        for place in torch.nonzero(~torch.isfinite(group.values.sum(1))).flatten().tolist():
            spoilt = block.cpu().clone()
            (section,) = self._layout.of_kind("trained")
            section.view(spoilt).copy_(group.values[place])
            where = self._layout.non_finite(self._layout.slot(spoilt))
            if where is not None and isinstance(group.results[place], Update):
                group.results[place] = non_finite_update(tasks[group.places[place]], where)

    def _new_blocks(self, block: Tensor, tasks: Sequence[Task], count: int) -> Tensor:
        """Allocates blocks with the buffers of the global model, which no client changes."""
        (section,) = self._layout.of_kind("trained")
        blocks = self._work.blocks(self._layout, tasks, count)
        rest = slice(section.stop_bytes, self._layout.nbytes)
        blocks[:, rest] = block[rest].cpu()
        return blocks


class _Mean:
    """The running mean of groups; a vector that is the only one is not added up."""

    def __init__(self, numel: int) -> None:
        self._numel = numel
        self._only: tuple[Tensor, list[float]] | None = None
        self._mean: WeightedMean | None = None

    def add(self, tasks: Sequence[Task], group: _Group) -> None:
        """Adds the clients of a group that did not fail, by the weights of their tasks."""
        done = [n for n, result in enumerate(group.results) if isinstance(result, Update)]
        if not done:
            return
        weights = weights_of(tasks[group.places[n]] for n in done)
        values = group.values.cpu()
        if group.is_mean:
            weights = [math.fsum(weights)]
        elif len(done) < len(group.results):
            values = values[done]
        if self._mean is None:
            if self._only is None and len(weights) == 1:
                self._only = values, weights
                return
            self._mean = WeightedMean(self._numel)
        if self._only is not None:
            self._mean.add([self._only[0]], self._only[1])
            self._only = None
        self._mean.add([values], weights)

    def write(self, target: Tensor) -> None:
        """Writes it into ``target``, shape (numel,): zeros if nothing was added."""
        if self._only is not None:
            target.copy_(self._only[0][0])
        elif self._mean is not None:
            target.copy_(self._mean.result())
        else:
            target.zero_()


class _Stack:
    """Clients of one command, by their places in it."""

    def __init__(
        self, stacks: Stacks, tasks: Sequence[Task], places: Sequence[Place], known: Known
    ) -> None:
        self._stacks = stacks
        self._tasks = tasks
        self._places = places
        self._states, self._shared = known

    def train_all(self) -> Iterator[_Group]:
        """Trains all clients that can be trained at once."""
        for members in self._alike():
            yield from self._train(members)

    def _alike(self) -> list[list[int]]:
        """Groups the clients whose rows have the same shapes and dtypes."""
        groups: dict[tuple[object, ...], list[int]] = {}
        keys: dict[int, tuple[object, ...]] = {}  # of blocks: most clients share few
        for place, (x, y, _, _) in enumerate(self._places):
            key = keys.get(id(x))
            if key is None:
                key = keys[id(x)] = x.dtype, x.shape[1:], y.dtype, y.shape[1:]
            groups.setdefault(key, []).append(place)
        return list(groups.values())

    def _train(self, members: list[int]) -> Iterator[_Group]:
        """Trains clients; if that raises, halves, until the client that raises is by itself."""
        try:
            shares = self._share(members)
            if not shares and len(members) > self._stacks.most:
                made = None
            else:
                made = self._made(members, shares=shares)
        except NotVectorizableError:
            raise
        except Exception:  # noqa: BLE001 - raised again when the client trains by itself
            if len(members) == 1:
                return
            made = None
        if made is None:
            half = len(members) // 2
            yield from self._train(members[:half])
            yield from self._train(members[half:])
            return
        results: list[Update | BaseException] = [
            made.failures.get(n, update) for n, update in enumerate(made.updates)
        ]
        yield _Group(members, results, made.values, made.is_mean)

    def _share(self, members: list[int]) -> bool:
        """Tells whether clients take one step together: it makes no copies of the model."""
        if self._tasks[0].weight is None:
            return False
        places = [self._places[member] for member in members]
        return self._stacks.may_share([stop - start for _, _, start, stop in places])

    def _made(self, members: list[int], *, shares: bool) -> Trained:
        tasks = [self._tasks[member] for member in members]
        shards = Shards.of([self._places[member] for member in members])
        if shares:
            return self._stacks.share_step(tasks, shards)
        states = [self._states.get(task.client, {}) for task in tasks]
        return self._stacks.train(tasks, shards, states, self._shared)


def _share_mean(
    tasks: Sequence[Task], results: Sequence[Update | BaseException | None]
) -> list[int | None]:
    """Gives the mean of all to the first client, and none to the others.

    Returns:
        Place of a client -> its row: the mean has the first, clients without a result the next.
    """
    rows: list[int | None] = [None] * len(results)
    done = [(place, found) for place, found in enumerate(results) if isinstance(found, Update)]
    for _, update in done:
        update.block_weight = 0.0
    if done:
        rows[done[0][0]] = 0
        done[0][1].block_weight = math.fsum(weights_of(tasks[place] for place, _ in done))
    others = [place for place, result in enumerate(results) if result is None]
    for row, place in enumerate(others, start=1):
        rows[place] = row
    return rows


def _share_time(results: Sequence[Update | BaseException | None], began: float) -> None:
    """Gives every client an equal part of the time that all took."""
    each = (time.perf_counter() - began) / len(results)
    for place, result in enumerate(results):
        if isinstance(result, Update):
            result.began, result.ended = began + place * each, began + (place + 1) * each
