"""From tasks to updates for clients trained at once, and what becomes of those that fail.

Runs in workers, within a trainer that has loaded the global model and preserves the streams.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedproc.client.row_loss import NotVectorizableError
from fedproc.client.training import LocalTraining, non_finite_update
from fedproc.client.update import Task, Update
from fedproc.client.vectorized import Shards, Stacks

if TYPE_CHECKING:
    from fedproc.client.layout import Layout
    from fedproc.client.resident import Resident
    from fedproc.client.work import Span, Work

# inputs and targets of a block, the client's first row in it, and the row after its last
Place = tuple[Tensor, Tensor, int, int]
Known = tuple[Mapping[str, Mapping[str, Any]], Mapping[str, Tensor]]


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
        self._stacks = Stacks(resident, work.local, work.rule)
        self._blocks = blocks
        self._spans = spans

    def train(
        self, block: Tensor, blocks: Tensor, tasks: Sequence[Task], known: Known
    ) -> tuple[list[Update | None], dict[str, BaseException]]:
        """Trains clients at once.

        Args:
            block: The global model, which the resident one holds.
            blocks: Get what the clients end with, a row each: see :meth:`Layout.new_blocks`.
            tasks: The clients, each with at least one row.
            known: Client -> what it kept, and what the strategy sent.

        Returns:
            Their updates, and client -> why it failed. A client with neither could not
            be trained at once: torch raises on its rows, which halves of the stack find out.

        Raises:
            NotVectorizableError: They cannot be trained at once.
        """
        began = time.perf_counter()
        blocks[:, : self._layout.nbytes] = block.cpu()
        stack = _Stack(self._stacks, tasks, [self._place_of(task.client) for task in tasks], known)
        results: list[Update | BaseException | None] = [None] * len(tasks)
        values = _trained(self._layout, blocks)
        for members in stack.alike():
            for places, updates, rows in stack.train(members):
                for place, update in zip(places, updates, strict=True):
                    results[place] = update
                values.index_copy_(0, torch.tensor(places), rows.cpu())
        self._reject_non_finite(tasks, blocks, results)
        _share_time(results, began)
        failures = {
            task.client: result
            for task, result in zip(tasks, results, strict=True)
            if isinstance(result, BaseException)
        }
        return [r if isinstance(r, Update) else None for r in results], failures

    def _place_of(self, client: str) -> Place:
        span = self._spans[client]
        return *self._blocks[span.block], span.start, span.stop

    def _reject_non_finite(
        self,
        tasks: Sequence[Task],
        blocks: Tensor,
        results: list[Update | BaseException | None],
    ) -> None:
        # a sum is finite only if all its terms are; the few others are looked at one by one
        sums = _trained(self._layout, blocks).sum(1)
        for place in torch.nonzero(~torch.isfinite(sums)).flatten().tolist():
            where = self._layout.non_finite(self._layout.slot(blocks[place]))
            if where is not None and isinstance(results[place], Update):
                results[place] = non_finite_update(tasks[place], where)


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
        for place, (x, y, _, _) in enumerate(self._places):
            key = x.dtype, x.shape[1:], y.dtype, y.shape[1:]
            groups.setdefault(key, []).append(place)
        return list(groups.values())

    def train(
        self, members: list[int]
    ) -> list[tuple[list[int], Sequence[Update | BaseException], Tensor]]:
        """Trains clients; if that raises, halves, until the client that raises is by itself.

        Returns:
            Groups of clients: their places, their results, and their trained parameters.
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
        results = [made.failures.get(n, update) for n, update in enumerate(made.updates)]
        return [(members, results, made.values)]


def _trained(layout: Layout, blocks: Tensor) -> Tensor:
    """Returns the trained parameters in blocks: (clients, parameters), without a copy."""
    (section,) = layout.of_kind("trained")
    return section.columns(blocks)


def _share_time(results: Sequence[Update | BaseException | None], began: float) -> None:
    """Gives every client an equal part of the time that all took."""
    each = (time.perf_counter() - began) / len(results)
    for place, result in enumerate(results):
        if isinstance(result, Update):
            result.began, result.ended = began + place * each, began + (place + 1) * each
