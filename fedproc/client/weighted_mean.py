"""The running weighted mean: sums in float64 of vectors that come one after the other.

Runs in the parent, which folds updates, and in workers, which form the mean of a stack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from fedproc.client import compiled
from fedproc.client.weighing import add_weighted, exact_product
from fedproc.memory.copying import fresh

if TYPE_CHECKING:
    from collections.abc import Sequence

# Elements that torch folds at a time: the product (512 KiB) stays in the cache until it is added.
_CHUNK: Final = 65536


class WeightedMean:
    """A running weighted mean over float vectors that come in pieces of the same lengths."""

    def __init__(self, numel: int) -> None:
        """Starts with nothing added."""
        self._sum = fresh(numel * 8).view(torch.float64)
        self._weight = 0.0
        self._is_empty = True
        self._totals: tuple[Tensor, ...] = ()  # where each piece of a vector is added
        self._room = torch.empty(0, dtype=torch.float64, device="cpu")

    def add(self, pieces: Sequence[Sequence[Tensor] | Tensor], weights: Sequence[float]) -> None:
        """Adds vectors, one after the other, each times its weight.

        Args:
            pieces: The first pieces of all vectors, then the second, and so on; at least one each.
                A matrix is its rows.
            weights: One per vector.
        """
        if self._is_empty:
            self._totals = torch.split(self._sum, [values[0].numel() for values in pieces])
        for values, total in zip(pieces, self._totals, strict=True):
            if _fit(values):
                compiled.add(total, values, weights, first=self._is_empty)
            else:
                self._add_in_torch(total, values, weights)
        for weight in weights:
            self._weight += weight
        self._is_empty = False

    def _add_in_torch(
        self, total: Tensor, values: Sequence[Tensor] | Tensor, weights: Sequence[float]
    ) -> None:
        if self._is_empty:
            total.zero_()
        size = min(total.numel(), _CHUNK)
        if len(self._room) < size:
            self._room = torch.empty(size, dtype=torch.float64, device="cpu")
        for piece, weight in zip(values, weights, strict=True):
            exact = exact_product(weight, piece.dtype)
            parts = zip(torch.split(piece, _CHUNK), torch.split(total, _CHUNK), strict=True)
            for some, part in parts:
                add_weighted(part, some, weight, self._room[: len(part)], exact=exact)

    def result(self) -> Tensor:
        """Returns the mean of what was added: float64, shape (numel,). Call it once, at the end."""
        if self._is_empty:
            self._sum.zero_()
        return self._sum.div_(self._weight)


def _fit(values: Sequence[Tensor] | Tensor) -> bool:
    if isinstance(values, Tensor):
        return compiled.fits(values)
    return all(map(compiled.fits, values))
