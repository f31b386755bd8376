"""Evaluation of a model on rows, as sums that can be added up.

Runs in worker processes. Rows are taken in chunks whose borders do not depend on the number of
workers, so that the sums are the same bits wherever a chunk was computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedproc.client.denominators import terms_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from fedproc.client.gradients import Loss


@dataclass(frozen=True, slots=True)
class ChunkSums:
    """What a chunk of rows adds to an evaluation.

    Attributes:
        rows: Rows of the chunk.
        loss_sum: Sum of the loss over what it counts; None without a loss.
        counted: That is rows, or labels, see :func:`terms_of`.
        correct: Rows whose largest output is the target; None where that has no meaning.
        outputs: The outputs of the model, shape (rows, ...), if they were asked for.
    """

    rows: int
    loss_sum: float | None
    counted: float
    correct: int | None
    outputs: Tensor | None = None


def evaluate_chunks(
    model: nn.Module,
    rows: tuple[Tensor, Tensor],
    loss: Loss | None,
    chunk_rows: int,
    *,
    outputs: bool = False,
) -> list[ChunkSums]:
    """Runs ``model`` in eval mode without gradients over chunks of ``chunk_rows`` rows.

    Args:
        model: The model; its mode is restored afterwards.
        rows: Inputs (rows, ...) and targets (rows, ...).
        loss: ``loss(outputs, targets)`` -> one number, see :func:`terms_of`; or None.
        chunk_rows: Rows per chunk; the last may have fewer.
        outputs: Whether to keep the outputs.

    Returns:
        One record per chunk, in the order of the rows.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    (x, y), terms = rows, None if loss is None else terms_of(loss)
    sums = []
    with torch.no_grad():
        for start in range(0, len(x), chunk_rows):
            # a copy, so that the place of the rows in a block cannot reach a kernel
            chunk = x[start : start + chunk_rows].clone()
            targets = y[start : start + chunk_rows].clone()
            result = model(chunk)
            total, counted = (None, 0.0) if terms is None else terms(result, targets)
            kept = result.cpu() if outputs else None
            sums.append(ChunkSums(len(chunk), total, counted, _correct(result, targets), kept))
    for module, training in modes:
        module.training = training
    return sums


def _correct(outputs: object, targets: Tensor) -> int | None:
    classes = isinstance(outputs, torch.Tensor) and outputs.ndim == 2
    if not classes or targets.ndim != 1 or targets.is_floating_point() or targets.is_complex():
        return None
    assert isinstance(outputs, torch.Tensor)
    return int((outputs.argmax(dim=1) == targets).sum())


def merged(sums: Sequence[ChunkSums], least_rows: int, labelled: int | None = None) -> ChunkSums:
    """Adds up the chunks of one client.

    Args:
        sums: The chunks.
        least_rows: Fewer rows than this give no numbers: a mean over few rows tells of each.
        labelled: Rows that the loss says something of; None: all.
    """
    rows = sum(part.rows for part in sums)
    losses = [part.loss_sum for part in sums if part.loss_sum is not None]
    correct = [part.correct for part in sums if part.correct is not None]
    if (rows if labelled is None else labelled) < least_rows:
        return ChunkSums(rows, None, 0.0, None)
    return ChunkSums(
        rows,
        exact_sum(losses) if losses else None,
        exact_sum([part.counted for part in sums]),
        sum(correct) if correct else None,
    )


def exact_sum(values: Sequence[float]) -> float:
    """Adds numbers without rounding in between; NaN and infinities win instead of raising."""
    if all(map(math.isfinite, values)):
        return math.fsum(values)
    return sum(values)
