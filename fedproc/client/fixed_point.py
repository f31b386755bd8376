"""Numbers as integers modulo 2**64, so that a sum is exact and masks cancel. Runs in both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """Fixed point with a range that no sum of so many terms can leave.

    Attributes:
        bits: Fractional bits.
        terms: How many vectors are added at most.
        towards_zero: Round so that no norm grows, instead of to the nearest.
    """

    bits: int
    terms: int
    towards_zero: bool = False

    @property
    def bound(self) -> float:
        """Where a number leaves the range: below, no sum of ``terms`` integers reaches 2**63."""
        return 2.0 ** (self._bound_bits - self.bits)

    @property
    def _bound_bits(self) -> int:
        return 63 - (self.terms - 1).bit_length()

    def encode(self, values: Tensor, words: Tensor) -> bool:
        """Writes ``rint(values * 2**bits)`` into ``words``.

        Args:
            values: float64, shape (n,); multiplied in place.
            words: int64, shape (n,); not written if a value does not fit.

        Returns:
            Whether all values are finite and below :attr:`bound`.
        """
        if not values.numel():
            return True
        values.mul_(2.0**self.bits)
        values.trunc_() if self.towards_zero else values.round_()
        # one pass that finds NaN, too: it is the extreme of whatever has one
        low, high = torch.aminmax(values)
        bound = 2.0**self._bound_bits
        if not (-bound < low.item() and high.item() < bound):
            return False
        words.copy_(values)
        return True

    def decode(self, words: Tensor) -> Tensor:
        """Returns the numbers of ``words`` (int64): float64, the same shape."""
        return words.to(torch.float64).mul_(2.0**-self.bits)
