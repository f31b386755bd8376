"""The fold: updates become one model, one after the other, in cohort order.

Runs in the parent. A weighted mean is the sum of ``w_i y_i`` in float64 divided by the sum of the
``w_i``, cast once to the tensor's dtype: the same bits as the plain sequential loop's, whatever
the number of workers and the order of arrival, because the order of adding is the cohort's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fedproc.client.weighted_mean import WeightedMean

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fedproc.client.layout import Layout, Section


class Weighted(NamedTuple):
    """An accepted update, or the mean of several, and what it weighs.

    Attributes:
        block: uint8, shape (nbytes,), finite values only.
        weight: Weight of the client or clients in the round, for the buffers.
        mean_weight: Weight of its trained parameters, as the strategy wants it.
    """

    block: Tensor
    weight: float
    mean_weight: float


@dataclass(frozen=True, slots=True)
class Received:
    """The accepted updates of a round, as a strategy sees them: trained parameters only.

    Attributes:
        mean: Their weighted mean: float64, shape (parameters,); None if the strategy keeps rows.
        rows: Every update, shape (accepted, parameters), in cohort order; None if it does not.
        weights: One weight per accepted client, in cohort order.
        step_norms: FedNova's ``|a|_1`` of the accepted clients, None where unknown.
        non_finite: Updates of the cohort that were removed because they were not finite.
    """

    mean: Tensor | None
    rows: Tensor | None
    weights: tuple[float, ...]
    step_norms: tuple[float | None, ...]
    non_finite: int


class Fold:
    """Takes the blocks of a round; see :class:`fedproc.client.layout.Layout` for their form."""

    def __init__(self, layout: Layout, *, keep_rows: bool) -> None:
        """Starts a round.

        Args:
            layout: The form of the blocks.
            keep_rows: Keep every update, for rules that need all of them at once, instead of
                adding them up.
        """
        self._layout = layout
        self._trained = layout.of_kind("trained")
        self._buffers = layout.of_kind("mean")
        self._integers = layout.of_kind("largest")
        self._mean = None if keep_rows else WeightedMean(layout.trained_numel)
        self._rows: list[Tensor] = []
        self._buffer_mean = WeightedMean(sum(section.numel for section in self._buffers))
        self._largest: list[Tensor] = []

    def add(self, updates: Sequence[Weighted]) -> None:
        """Adds accepted updates, one after the other; their blocks may be reused afterwards."""
        if not updates:
            return
        blocks, weights, mean_weights = zip(*updates, strict=True)
        trained = [list(map(section.view, blocks)) for section in self._trained]
        if self._mean is not None:
            self._mean.add(trained, mean_weights)
        else:
            self._rows += map(torch.cat, zip(*trained, strict=True))
        if self._buffers:
            buffers = [list(map(section.view, blocks)) for section in self._buffers]
            self._buffer_mean.add(buffers, weights)
        if not self._largest:
            self._largest = [section.view(blocks[0]).clone() for section in self._integers]
        for section, largest in zip(self._integers, self._largest, strict=True):
            for block in blocks:
                torch.maximum(largest, section.view(block), out=largest)

    def trained(self) -> tuple[Tensor | None, Tensor | None]:
        """Returns the mean and the rows of the trained parameters; one of them is None."""
        if self._mean is not None:
            return self._mean.result(), None
        return None, torch.stack(self._rows)

    def write(self, trained: Tensor, allocate: Callable[[int], Tensor] | None = None) -> Tensor:
        """Makes the block of the new model: the only place where float64 is cast back.

        Args:
            trained: The new trained parameters: float64, shape (parameters,).
            allocate: See :meth:`fedproc.client.layout.Layout.room`.
        """
        block = self._layout.room(allocate)
        cast_into(block, self._trained, trained)
        cast_into(block, self._buffers, self._buffer_mean.result())
        for section, values in zip(self._integers, self._largest, strict=True):
            section.view(block).copy_(values)
        return block


def cast_into(block: Tensor, sections: Sequence[Section], vector: Tensor) -> None:
    """Writes a vector over all elements of ``sections`` into ``block``, cast to their dtypes."""
    pieces = torch.split(vector, [section.numel for section in sections])
    for section, piece in zip(sections, pieces, strict=True):
        section.view(block).copy_(piece)
