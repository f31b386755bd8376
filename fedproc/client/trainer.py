"""The trainer: what lives in a worker between rounds and trains one client after the other.

Runs in worker processes, one object per worker and aggregator. May assume one command at a time.
"""

from __future__ import annotations

import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from fedproc.client.clipping import clip_update
from fedproc.client.custom import run_function
from fedproc.client.descent import Descent
from fedproc.client.evaluator import Evaluator
from fedproc.client.leaving import may_leave
from fedproc.client.rules import step_norm
from fedproc.client.seeding import derive_seed, generator_for, preserved_streams
from fedproc.client.stack_trainer import StackTrainer
from fedproc.client.trail import IDLE, Footprint
from fedproc.client.training import (
    LocalTraining,
    TrainContext,
    non_finite_update,
    run_local_epochs,
)
from fedproc.client.update import NO_BLOCK, Task, Update, Updates, block_of, unpack_tasks
from fedproc.client.work import Span, Work

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from fedproc.client.elsewhere import Rows
    from fedproc.client.layout import Slot

    _Known = tuple[dict[str, Any], Mapping[str, Tensor]]


class Trainer(Evaluator):
    """Trains clients on the data of one worker, and evaluates the global model there."""

    def __init__(
        self,
        model: nn.Module,
        work: Work,
        blocks: Sequence[tuple[Rows, Rows]] = (),
        spans: Mapping[str, Span] | None = None,
        trail: str = "",
    ) -> None:
        """Keeps the model and the data.

        Args:
            model: Architecture and frozen values; every client loads the rest anew.
            work: What to do with each client.
            blocks: Pairs of inputs (rows, ...) and targets (rows, ...), here or in other workers.
            spans: Client name -> its rows in ``blocks``.
            trail: Where to note who trains, see :class:`fedproc.client.trail.Trail`.
        """
        super().__init__(model, work, blocks, spans)
        local = work.local if isinstance(work.local, LocalTraining) else None
        self._descent = None if local is None else Descent(self._resident.model, local, work.rule)
        self._footprint = Footprint(trail)
        self._failed: dict[str, BaseException] = {}
        self._round = 0
        self._order = torch.Generator()  # of rows; seeded anew for every client

    def train(
        self,
        block: Tensor | bytes,
        task: Task,
        state: dict[str, Any] | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> Update:
        """Trains one client from the global model.

        Args:
            block: The global model: uint8, shape (nbytes,), read only; or its bytes.
            task: Which client, which round.
            state: What the client kept from its last accepted update; may be written to.
            shared: What the strategy sent to all clients of the round.

        Raises:
            FloatingPointError: The loss or the update is not finite.
        """
        try:
            self._footprint.step(task.place)
            layout = self._resident.layout
            pieces, space = layout.pieces(block_of(block)), self._work.blocks(layout, [task])[0]
            with self._training():
                update = self._train(pieces, task, (state or {}, shared or {}), layout.slot(space))
            update.block = space[: layout.nbytes]
            return update
        finally:
            self._footprint.step(IDLE)

    def train_some(
        self,
        block: Tensor | bytes,
        packed: bytes,
        states: Mapping[str, dict[str, Any]] | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> Updates:
        """Trains several clients of a round, see :meth:`train`; a failure is told when asked for.

        ``packed``: their tasks, see ``pack_tasks``; ``states``: client -> what it kept.
        """
        tasks, layout = self._entered(packed), self._resident.layout
        pieces, blocks = layout.pieces(block_of(block)), self._work.blocks(layout, tasks)
        updates: list[Update | None] = []
        with self._training():
            for task, slot in zip(tasks, layout.slots(blocks), strict=True):
                known = (states or {}).get(task.client, {}), shared or {}
                updates.append(self._attempt(pieces, task, known, slot))
        self._footprint.step(IDLE)
        return Updates.of(blocks, updates)

    def train_stack(
        self,
        block: Tensor | bytes,
        packed: bytes,
        states: Mapping[str, dict[str, Any]] | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> Updates:
        """Trains several clients at once; arguments and failures as of :meth:`train_some`.

        Clients draw only the order of their rows. One for which torch raises trains again, alone.

        Raises:
            NotVectorizableError: They cannot be trained at once.
        """
        tasks = self._entered(packed)
        self._footprint.step(tasks[0].place)
        known, block = (states or {}, shared or {}), block_of(block)
        pieces = self._resident.layout.pieces(block)
        with self._training():
            with self._loaded(pieces, derive_seed("stack"), closed=self._is_closed):
                self._resident.train()
                stack = self._stacks.train(block, tasks, known)
            self._failed.update(stack.failures)
            updates, slots = stack.updates, self._resident.layout.slots(stack.blocks)
            for place, (task, update, row) in enumerate(
                zip(tasks, updates, stack.rows, strict=True)
            ):
                if update is not None:
                    updates[place] = self._may_leave(update, task.client)
                elif task.client not in stack.failures and row is not None:
                    alone = known[0].get(task.client, {}), known[1]
                    updates[place] = self._attempt(pieces, task, alone, slots[row])
        self._footprint.step(IDLE)
        return Updates.of(stack.blocks, updates, stack.rows)

    def takes_affine_steps(self) -> bool:
        """Tells whether the mean of clients that take one step each needs one backward pass."""
        self._resident.train()
        try:
            return self._stacks.is_affine()
        finally:
            self._resident.forget_gradients()  # and the hooks of the factory

    def failure(self, client: str) -> None:
        """Raises what made a client of :meth:`train_some` or :meth:`train_stack` fail."""
        raise self._failed.pop(client)

    @cached_property
    def _stacks(self) -> StackTrainer:
        return StackTrainer(self._resident, self._work, self._blocks, self._spans)

    def _entered(self, packed: bytes) -> list[Task]:
        """Unpacks the tasks of a command; with a new round, failures of earlier ones are gone."""
        tasks = unpack_tasks(packed)
        if self._round != tasks[0].round:
            self._round, self._failed = tasks[0].round, {}
        return tasks

    def _attempt(
        self, pieces: Sequence[Tensor], task: Task, known: _Known, slot: Slot
    ) -> Update | None:
        """Trains one client of several; what makes it fail is told by :meth:`failure`."""
        self._footprint.step(task.place)
        try:
            return self._train(pieces, task, known, slot)
        except BaseException as error:  # noqa: BLE001
            self._failed[task.client] = error
            return None

    def _train(self, pieces: Sequence[Tensor], task: Task, known: _Known, slot: Slot) -> Update:
        """Trains one client from the model in ``pieces`` and leaves its own in ``slot``."""
        began = time.perf_counter()
        seed = derive_seed(task.seed, task.round, task.client, "streams")
        with self._loaded(pieces, seed, closed=self._is_closed) as model:
            self._resident.train()
            if isinstance(self._work.local, LocalTraining):
                update = self._run_epochs(model, self._work.local, task, known)
            else:
                generator = generator_for(task.seed, task.round, task.client, "generator")
                context = TrainContext(task.client, task.round, generator, known[0])
                rows = self._rows(task.client)
                update = run_function(self._resident, self._work.local, rows, context)
            self._resident.write(slot)
        where = self._resident.layout.non_finite(slot, pieces)
        if where is not None:
            raise non_finite_update(task, where)
        if task.clip_norm is not None:
            update.within = clip_update(self._resident.layout, pieces, slot, task.clip_norm)
        update.began, update.ended = began, time.perf_counter()
        return self._may_leave(update, task.client)

    def _may_leave(self, update: Update, client: str) -> Update:
        if self._work.private_rows is None:
            return update
        return may_leave(update, self._work, self._rows(client)[1])

    def _run_epochs(
        self, model: nn.Module, local: LocalTraining, task: Task, known: _Known
    ) -> Update:
        state, shared = known
        rows = self._rows(task.client)
        if local.shuffle:  # nothing else draws from it
            self._order.manual_seed(derive_seed(task.seed, task.round, task.client, "shuffle"))
        correction = None
        if self._work.rule is not None:
            parameters = self._resident.layout.trained(model)
            correction = self._work.rule.start(parameters, shared, state)
        correct = None if correction is None else correction.apply
        progress = run_local_epochs(model, rows, local, self._order, correct, self._descent)
        assert progress.optimizer is not None
        return Update(
            block=NO_BLOCK,
            examples=len(rows[0]),
            steps=progress.steps,
            step_norm=step_norm(progress.optimizer, progress.steps),
            rows=progress.rows,
            loss_sum=progress.loss_sum,
            metrics={"loss": progress.loss_sum / progress.rows, "steps": float(progress.steps)},
            state={} if correction is None else correction.keep(progress),
        )

    @property
    def _is_closed(self) -> bool:
        return self._descent is not None and self._descent.is_closed

    def _training(self) -> AbstractContextManager[None]:
        """Preserves the streams of the process, around all clients of a command."""
        if self._descent is None:
            return preserved_streams(self._device)
        return self._descent.within(self._device)
