"""The fold: updates become one model, one after the other, in cohort order.

Runs in the parent. A weighted mean is the sum of ``w_i y_i`` in float64 divided by the sum of the
``w_i``, cast once to the tensor's dtype: the same bits as the plain sequential loop's, whatever
the number of workers and the order of arrival, because the order of adding is the cohort's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from fedproc.client import compiled
from fedproc.client.weighing import add_weighted, exact_product
from fedproc.memory.copying import fresh

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fedproc.client.layout import Layout, Section

# Elements that torch folds at a time: the product (512 KiB) stays in the cache until it is added.
_CHUNK: Final = 65536


class WeightedMean:
    """A running weighted mean over float vectors that come in pieces of the same lengths."""

    def __init__(self, numel: int) -> None:
        """Starts with nothing added."""
        self._sum = fresh(numel * 8).view(torch.float64)
        self._weight = 0.0
        self._is_empty = True
        # Where each piece of a vector is added: small models spend more time on making such views
        # than on the sums.
        self._totals: tuple[Tensor, ...] = ()
        self._room = torch.empty(0, dtype=torch.float64)

    def add(self, pieces: Sequence[Tensor], weight: float) -> None:
        """Adds ``weight`` times the concatenation of ``pieces``."""
        if self._is_empty:
            self._totals = torch.split(self._sum, [piece.numel() for piece in pieces])
        for piece, total in zip(pieces, self._totals, strict=True):
            if compiled.fits(piece):
                compiled.add(total, piece, weight, first=self._is_empty)
            else:
                self._add_in_torch(total, piece, weight)
        self._weight += weight
        self._is_empty = False

    def _add_in_torch(self, total: Tensor, piece: Tensor, weight: float) -> None:
        if self._is_empty:
            total.zero_()
        exact, size = exact_product(weight, piece.dtype), min(piece.numel(), _CHUNK)
        if len(self._room) < size:
            self._room = torch.empty(size, dtype=torch.float64)
        parts = zip(torch.split(piece, _CHUNK), torch.split(total, _CHUNK), strict=True)
        for values, part in parts:
            add_weighted(part, values, weight, self._room[: len(part)], exact=exact)

    def result(self) -> Tensor:
        """Returns the mean of what was added: float64, shape (numel,). Call it once, at the end."""
        if self._is_empty:
            self._sum.zero_()
        return self._sum.div_(self._weight)


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

    def add(self, block: Tensor, weight: float, mean_weight: float) -> None:
        """Adds one accepted update; ``block`` may be reused afterwards.

        Args:
            block: uint8, shape (nbytes,), finite values only.
            weight: Weight of the client in the round, for the buffers.
            mean_weight: Weight of its trained parameters, as the strategy wants it.
        """
        pieces = [section.view(block) for section in self._trained]
        if self._mean is not None:
            self._mean.add(pieces, mean_weight)
        else:
            self._rows.append(torch.cat(pieces))
        if self._buffers:
            self._buffer_mean.add([section.view(block) for section in self._buffers], weight)
        if not self._integers:
            return
        integers = [section.view(block) for section in self._integers]
        if not self._largest:
            self._largest = [values.clone() for values in integers]
        for largest, values in zip(self._largest, integers, strict=True):
            torch.maximum(largest, values, out=largest)

    def trained(self) -> tuple[Tensor | None, Tensor | None]:
        """Returns the mean and the rows of the trained parameters; one of them is None."""
        if self._mean is not None:
            return self._mean.result(), None
        return None, torch.stack(self._rows)

    def write(self, trained: Tensor) -> Tensor:
        """Makes the block of the new model: the only place where float64 is cast back.

        Args:
            trained: The new trained parameters: float64, shape (parameters,).
        """
        block = self._layout.new_block()
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
