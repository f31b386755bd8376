"""Evaluation by the workers in parallel. Runs in the parent.

Rows are cut into chunks at places that do not depend on the number of workers, and the sums of
the chunks are added exactly, so an evaluation is the same number on any cluster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from fedproc.client.evaluation import exact_sum
from fedproc.errors import WorkerLostError
from fedproc.federated.history import Evaluation
from fedproc.federated.passing import call_there, take_all
from fedproc.federated.rows import as_rows

if TYPE_CHECKING:
    from fedproc.client.evaluation import ChunkSums
    from fedproc.client.gradients import Loss
    from fedproc.federated.crew import Crew

Metric = Callable[[Tensor, Tensor], Any]

# Rows of a chunk: small enough that a test set of some hundred rows keeps two workers busy.
_CHUNK_ROWS: Final = 256


class EvaluationRows:
    """Rows to evaluate on, dealt to the workers once and kept there."""

    def __init__(self, data: object) -> None:
        """Takes a pair (x, y) or a dataset.

        Raises:
            ValueError: Not such data, or no rows.
        """
        self.x, self.y = as_rows(data)
        if not len(self.x):
            raise ValueError("there are no rows to evaluate on")
        self._pieces: list[tuple[str, Any]] = []

    def pieces(self, crew: Crew) -> list[tuple[str, Any]]:
        """Returns pairs of worker name and pointer to its rows, in the order of the rows."""
        alive = crew.alive()
        if not self._pieces or not {name for name, _ in self._pieces} <= set(alive):
            chunks = -(-len(self.x) // _CHUNK_ROWS)
            share = -(-chunks // len(alive)) * _CHUNK_ROWS
            self._pieces = [
                (name, crew.worker(name).send((x, y)))
                for name, x, y in zip(
                    alive, torch.split(self.x, share), torch.split(self.y, share), strict=False
                )
            ]
        return self._pieces

    def forget(self) -> None:
        """Forgets the copies in the workers; the next evaluation sends the rows again."""
        self._pieces = []


def evaluate(
    crew: Crew,
    block: Tensor,
    rows: EvaluationRows,
    loss: Loss | None,
    metrics: Mapping[str, Metric] | None,
) -> Evaluation:
    """Evaluates a model on rows.

    Args:
        crew: The trainers.
        block: The model in flat form.
        rows: What to evaluate on.
        loss: ``loss(outputs, targets)`` -> one number; None takes LocalTraining's.
        metrics: Name -> ``metric(outputs, targets)``, called once with all outputs.

    Raises:
        RemoteError: The model or the loss failed.
        WorkerLostError: No worker is left.
    """
    for _ in crew.data.cluster.workers:
        try:
            sums = _all_chunks(crew, block, rows, loss, outputs=bool(metrics))
            break
        except WorkerLostError:  # its trainer is made again from its data
            rows.forget()
            crew.restored()
    else:
        sums = _all_chunks(crew, block, rows, loss, outputs=bool(metrics))
    evaluation = combine(sums, len(rows.x))
    if not metrics:
        return evaluation
    outputs = torch.cat([part.outputs for part in sums if part.outputs is not None])
    values = {name: metric(outputs, rows.y) for name, metric in metrics.items()}
    return Evaluation(evaluation.loss, evaluation.accuracy, evaluation.examples, values)


def _all_chunks(
    crew: Crew, block: Tensor, rows: EvaluationRows, loss: Loss | None, *, outputs: bool
) -> list[ChunkSums]:
    pending = [
        call_there(
            crew.trainer(name),
            "evaluate",
            crew.worker(name).send(block),
            piece,
            # by itself: the tensors in it are not operands that lie in the wrong place
            None if loss is None else crew.worker(name).send(loss),
            (_CHUNK_ROWS, outputs),
        )
        for name, piece in rows.pieces(crew)
    ]
    return [part for found in take_all(pending) for part in found]


def evaluate_clients(crew: Crew, block: Tensor) -> dict[str, Evaluation]:
    """Evaluates a model on the rows of each client, where they are.

    Raises:
        RemoteError: The model or the loss failed.
        WorkerLostError: No worker is left.
    """
    for _ in crew.data.cluster.workers:
        try:
            return _per_client(crew, block)
        except WorkerLostError:
            crew.data.restore()
    return _per_client(crew, block)


def _per_client(crew: Crew, block: Tensor) -> dict[str, Evaluation]:
    data, clients = crew.data, dict[str, list[str]]()
    for client, home in crew.homes(data.clients).items():
        clients.setdefault(home, []).append(client)
    pending = [
        call_there(
            crew.trainer(name),
            "evaluate_clients",
            crew.worker(name).send(block),
            mine,
            _CHUNK_ROWS,
        )
        for name, mine in clients.items()
    ]
    found = {client: sums for part in take_all(pending) for client, sums in part.items()}
    sizes = data.sizes  # a copy at each access
    return {client: combine([found[client]], sizes[client]) for client in data.clients}


def combine(sums: Sequence[ChunkSums], rows: int) -> Evaluation:
    """Adds up chunks over ``rows`` rows; the order does not matter, because the sum is exact."""
    losses = [part.loss_sum for part in sums if part.loss_sum is not None]
    counted = exact_sum([part.counted for part in sums])
    correct = [part.correct for part in sums if part.correct is not None]
    mean = exact_sum(losses) / counted if counted else math.nan  # as torch says without a label
    return Evaluation(
        loss=mean if losses else None,
        accuracy=sum(correct) / rows if correct and rows else None,
        examples=rows,
    )
