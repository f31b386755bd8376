"""From tasks to updates of clients trained at once, or to their mean; what becomes of failures.

Runs in workers, within a trainer that has loaded the global model and preserves the streams.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedproc.client.row_loss import NotVectorizableError
from fedproc.client.shards import Shards
from fedproc.client.training import LocalTraining, non_finite_update
from fedproc.client.update import Task, Update
from fedproc.client.vectorized import Stacks
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
        self._stacks = Stacks(resident, work.local, work.rule)
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
        groups = [group for members in stack.alike() for group in stack.train(members)]
        results: list[Update | BaseException | None] = [None] * len(tasks)
        for group in groups:
            self._reject_non_finite(block, tasks, group)
            for place, result in zip(group.places, group.results, strict=True):
                results[place] = result
        _share_time(results, began)
        rows = list[int | None](range(len(tasks)))
        if tasks[0].weight is None:
            blocks = self._rows(block, tasks, groups)
        else:
            rows = _share_mean(tasks, results)
            blocks = self._mean(block, tasks, groups, results.count(None))
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

    def _rows(self, block: Tensor, tasks: Sequence[Task], groups: Sequence[_Group]) -> Tensor:
        """Lays the models out, each client's in the row of its place."""
        blocks = self._new_blocks(block, tasks, len(tasks))
        for group in groups:
            self._trained(blocks).index_copy_(0, torch.tensor(group.places), group.values.cpu())
        return blocks

    def _mean(
        self, block: Tensor, tasks: Sequence[Task], groups: Sequence[_Group], others: int
    ) -> Tensor:
        """Lays their mean out in the first row; ``others`` more are left to be written."""
        blocks = self._new_blocks(block, tasks, 1 + others)
        mean = WeightedMean(self._layout.trained_numel)
        parts = []
        for group in groups:
            done = [n for n, result in enumerate(group.results) if isinstance(result, Update)]
            weights = [tasks[group.places[n]].weight or 0.0 for n in done]
            if not done:
                continue
            if group.is_mean:
                parts.append((group.values, [math.fsum(weights)]))
            else:
                whole = len(done) == len(group.results)
                parts.append((group.values if whole else group.values[done], weights))
        if len(parts) == 1 and len(parts[0][1]) == 1:
            self._trained(blocks)[0] = parts[0][0][0]
            return blocks
        for values, weights in parts:
            mean.add([values.cpu()], weights)
        self._trained(blocks)[0] = mean.result()
        return blocks

    def _new_blocks(self, block: Tensor, tasks: Sequence[Task], count: int) -> Tensor:
        """Allocates blocks with the buffers of the global model, which no client changes."""
        (section,) = self._layout.of_kind("trained")
        blocks = self._work.blocks(self._layout, tasks, count)
        rest = slice(section.stop_bytes, self._layout.nbytes)
        blocks[:, rest] = block[rest].cpu()
        return blocks

    def _trained(self, blocks: Tensor) -> Tensor:
        """Returns the trained parameters in blocks: (blocks, parameters), without a copy."""
        (section,) = self._layout.of_kind("trained")
        return section.columns(blocks)


class _Stack:
    """Clients of one command, by their places in it."""

    def __init__(
        self, stacks: Stacks, tasks: Sequence[Task], places: Sequence[Place], known: Known
    ) -> None:
        self._stacks = stacks
        self._tasks = tasks
        self._places = places
        self._states, self._shared = known

    def alike(self) -> list[list[int]]:
        """Groups the clients whose rows have the same shapes and dtypes."""
        groups: dict[tuple[object, ...], list[int]] = {}
        keys: dict[int, tuple[object, ...]] = {}  # of blocks: most clients share few
        for place, (x, y, _, _) in enumerate(self._places):
            key = keys.get(id(x))
            if key is None:
                key = keys[id(x)] = x.dtype, x.shape[1:], y.dtype, y.shape[1:]
            groups.setdefault(key, []).append(place)
        return list(groups.values())

    def train(self, members: list[int]) -> list[_Group]:
        """Trains clients; if that raises, halves, until the client that raises is by itself.

        Returns:
            Groups of clients, without those that raise.
        """
        tasks = [self._tasks[member] for member in members]
        states = [self._states.get(task.client, {}) for task in tasks]
        shards = Shards.of([self._places[member] for member in members])
        try:
            made = self._stacks.train(tasks, shards, states, self._shared)
        except NotVectorizableError:
            raise
        except Exception:  # noqa: BLE001 - raised again when the client trains by itself
            if len(members) == 1:
                return []
            half = len(members) // 2
            return [*self.train(members[:half]), *self.train(members[half:])]
        results: list[Update | BaseException] = [
            made.failures.get(n, update) for n, update in enumerate(made.updates)
        ]
        return [_Group(members, results, made.values, made.is_mean)]


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
        done[0][1].block_weight = math.fsum(tasks[place].weight or 0.0 for place, _ in done)
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
