"""The trainer: what lives in a worker between rounds and trains one client after the other.

Runs in worker processes, one object per worker and aggregator: one resident model, the rows of
all clients of the worker in blocks, the local training. May assume one command at a time.
"""

from __future__ import annotations

import copy
import numbers
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fedproc.client.evaluation import ChunkSums, evaluate_chunks, merged
from fedproc.client.layout import Layout
from fedproc.client.rules import LocalRule, step_norm
from fedproc.client.seeding import derive_seed, generator_for, seeded_streams, torch_threads
from fedproc.client.training import LocalTraining, TrainContext, TrainFunction, run_local_epochs
from fedproc.client.update import Task, Update
from fedproc.errors import NotPermittedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from fedproc.client.training import Loss


@dataclass(frozen=True, slots=True)
class Span:
    """Where the rows of a client lie: rows ``start`` to ``stop`` of block ``block``."""

    block: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Work:
    """What a trainer does for every client.

    Attributes:
        local: Local epochs, or a custom ``train(model, x, y, ctx)``.
        rule: The gradient correction of the strategy, or None.
        threads: Torch threads while a client trains; None keeps what the worker has.
        device: Where the resident model and the batches live.
        private_rows: The data are private: numbers leave only as means over so many rows, and
            what a custom function keeps may not leave. None: they are not.
    """

    local: LocalTraining | TrainFunction
    rule: LocalRule | None = None
    threads: int | None = 1
    device: str = "cpu"
    private_rows: int | None = None


@dataclass(frozen=True, slots=True)
class _Resident:
    """A model that is loaded for every client, with its travelling tensors looked up once."""

    model: nn.Module
    tensors: Sequence[Sequence[Tensor]]
    frozen: Sequence[Tensor]
    versions: Sequence[int]


class Trainer:
    """Trains and evaluates clients on the data of one worker."""

    def __init__(
        self,
        model: nn.Module,
        work: Work,
        blocks: Sequence[tuple[Tensor, Tensor]] = (),
        spans: Mapping[str, Span] | None = None,
    ) -> None:
        """Keeps the model and the data.

        Args:
            model: Architecture and frozen values; every client loads the rest anew.
            work: What to do with each client.
            blocks: Pairs of inputs (rows, ...) and targets (rows, ...).
            spans: Client name -> its rows in ``blocks``.
        """
        self._work = work
        self._device = torch.device(work.device)
        self._blocks = [(x.to(self._device), y.to(self._device)) for x, y in blocks]
        self._spans = dict(spans or {})
        self._layout = Layout.of(model)
        self._pristine = model.to(self._device)
        self._resident = self._make_resident()

    def train(
        self,
        block: Tensor,
        task: Task,
        state: dict[str, Any] | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> Update:
        """Trains one client from the global model.

        Args:
            block: The global model: uint8, shape (nbytes,), read only.
            task: Which client, which round.
            state: What the client kept from its last accepted update; may be written to.
            shared: What the strategy sent to all clients of the round.

        Raises:
            FloatingPointError: The loss or the update is not finite.
        """
        seed = derive_seed(task.seed, task.round, task.client, "streams")
        with self._loaded(block, seed) as model:
            model.train()
            if isinstance(self._work.local, LocalTraining):
                update = self._run_epochs(
                    model, self._work.local, task, (state or {}, shared or {})
                )
            else:
                update = self._run_function(model, self._work.local, task, state or {})
        where = self._layout.non_finite(update.block)
        if where is not None:
            raise FloatingPointError(
                f"round {task.round}: the update of client {task.client!r} is rejected: {where}"
            )
        return self._may_leave(update)

    def _may_leave(self, update: Update) -> Update:
        """Takes out what may not leave a worker with private data."""
        least = self._work.private_rows
        if least is None:
            return update
        if update.state and not isinstance(self._work.local, LocalTraining):
            raise NotPermittedError(
                "ctx.state of a client with private data would leave its worker; keep nothing"
            )
        if update.examples >= least:
            return update
        return replace(update, rows=0, loss_sum=0.0, metrics={})

    def evaluate(
        self,
        block: Tensor,
        rows: tuple[Tensor, Tensor],
        loss: Loss | None,
        chunks: tuple[int, bool],
    ) -> list[ChunkSums]:
        """Evaluates the global model on rows sent for it, see :func:`evaluate_chunks`.

        ``loss``: None takes LocalTraining's; ``chunks``: rows of one, and whether to keep outputs.
        """
        x, y = (part.to(self._device) for part in rows)
        size, outputs = chunks
        with self._loaded(block, derive_seed("evaluation")) as model:
            return evaluate_chunks(model, (x, y), loss or self._loss(), size, outputs=outputs)

    def evaluate_clients(
        self, block: Tensor, clients: Sequence[str], chunk_rows: int
    ) -> dict[str, ChunkSums]:
        """Evaluates the global model on the rows of clients of this worker."""
        least = self._work.private_rows or 0
        with self._loaded(block, derive_seed("evaluation")) as model:
            return {
                client: merged(
                    evaluate_chunks(model, self._rows(client), self._loss(), chunk_rows), least
                )
                for client in clients
            }

    def _loss(self) -> Loss | None:
        return self._work.local.loss if isinstance(self._work.local, LocalTraining) else None

    def _rows(self, client: str) -> tuple[Tensor, Tensor]:
        span = self._spans[client]
        x, y = self._blocks[span.block]
        return x[span.start : span.stop], y[span.start : span.stop]

    def _run_epochs(
        self,
        model: nn.Module,
        local: LocalTraining,
        task: Task,
        known: tuple[Mapping[str, Any], Mapping[str, Tensor]],
    ) -> Update:
        state, shared = known
        rows = self._rows(task.client)
        order = generator_for(task.seed, task.round, task.client, "shuffle")
        correction = None
        if self._work.rule is not None:
            parameters = self._layout.trained(model)
            correction = self._work.rule.start(parameters, shared, state)
        correct = None if correction is None else correction.apply
        progress = run_local_epochs(model, rows, local, order, correct)
        assert progress.optimizer is not None
        return Update(
            block=self._packed(),
            examples=len(rows[0]),
            steps=progress.steps,
            step_norm=step_norm(progress.optimizer, progress.steps),
            rows=progress.rows,
            loss_sum=progress.loss_sum,
            metrics={"loss": progress.loss_sum / progress.rows, "steps": float(progress.steps)},
            state={} if correction is None else correction.keep(progress),
        )

    def _run_function(
        self, model: nn.Module, train: TrainFunction, task: Task, state: dict[str, Any]
    ) -> Update:
        x, y = self._rows(task.client)
        generator = generator_for(task.seed, task.round, task.client, "generator")
        context = TrainContext(task.client, task.round, generator, state)
        # The function may write into its rows; the block keeps them as they are.
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            metrics = _checked_metrics(train(model, x.clone(), y.clone(), context))
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            self._require_whole(model)
        except BaseException:
            # nobody knows what the function left; the next client gets a model made anew
            self._resident = self._make_resident()
            raise
        steps = metrics.get("steps")
        return Update(
            block=self._packed(),
            examples=len(x),
            steps=steps,
            step_norm=steps,
            rows=0,
            loss_sum=0.0,
            metrics=metrics,
            state=context.state,
        )

    @contextmanager
    def _loaded(self, block: Tensor, seed: int) -> Iterator[nn.Module]:
        """Loads the global model into the resident one and seeds every stream.

        Leaves no gradients behind, and the streams of the process as they were.
        """
        resident = self._resident
        self._layout.unpack(block, resident.tensors)
        with torch_threads(self._work.threads), seeded_streams(seed, self._device):
            try:
                yield resident.model
            finally:
                for parameter in resident.model.parameters():
                    parameter.grad = None

    def _packed(self) -> Tensor:
        return self._layout.pack(self._resident.tensors, self._layout.new_block())

    def _make_resident(self) -> _Resident:
        # Local epochs change parameters and buffers only, so the model itself can be resident. A
        # custom function may do anything to its model: it works on a copy that can be made again.
        custom = not isinstance(self._work.local, LocalTraining)
        model = copy.deepcopy(self._pristine) if custom else self._pristine
        frozen = [p for p in model.parameters() if not p.requires_grad]
        return _Resident(model, self._layout.tensors(model), frozen, [p._version for p in frozen])

    def _require_whole(self, model: nn.Module) -> None:
        """Makes sure that a custom function left the model as it can be loaded again."""
        resident = self._resident
        try:
            same = Layout.of(model) == self._layout and all(
                a is b
                for ours, theirs in zip(resident.tensors, self._layout.tensors(model), strict=True)
                for a, b in zip(ours, theirs, strict=True)
            )
        except ValueError:
            same = False
        if same and [p._version for p in resident.frozen] == resident.versions:
            return
        raise ValueError(
            "the train function replaced parameters or buffers of the model, or changed frozen "
            "ones; change trained values in place, and use copy.deepcopy(model) for anything else"
        )


def _checked_metrics(returned: object) -> dict[str, float]:
    if returned is None:
        return {}
    if not isinstance(returned, Mapping):
        raise TypeError(
            f"the train function must return a dict of numbers, got {type(returned).__name__}"
        )
    metrics = {}
    for name, value in returned.items():
        number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if not isinstance(name, str) or not isinstance(number, numbers.Real):
            raise TypeError(
                f"the train function must return a dict of numbers, got {name!r}: {value!r}"
            )
        metrics[name] = float(number)
    return metrics
