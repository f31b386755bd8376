"""Median and trimmed mean per coordinate. Runs in the parent.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", 2018. Both
ignore the weights: a client that lies about its rows gains nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import torch

from fedproc.federated.strategies.contract import State, Strategy
from fedproc.ranges import require_fraction, settle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from fedproc.federated.fold import Received

# Coordinates sorted at once: bounds the memory of the sort, does not change its result.
_COLUMNS: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Median(Strategy):
    """The median of every coordinate; of an even number, the mean of the middle two."""

    keeps_rows: ClassVar[bool] = True

    def step(self, x: Tensor, received: Received, state: State) -> tuple[Tensor, State]:  # noqa: ARG002 - part of the contract
        """Takes the medians."""
        assert received.rows is not None
        low, high = (len(received.rows) - 1) // 2, len(received.rows) // 2
        return _mean_of_sorted(received.rows, low, high + 1), state


@dataclass(frozen=True, slots=True)
class TrimmedMean(Strategy):
    """The mean of every coordinate without its extremes.

    Attributes:
        fraction: Of K updates, floor(fraction K) are dropped at each end; 0 to below 0.5.
    """

    fraction: float
    keeps_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the fraction."""
        settle(self, require_fraction, "fraction", below=0.5)

    def step(self, x: Tensor, received: Received, state: State) -> tuple[Tensor, State]:  # noqa: ARG002 - part of the contract
        """Takes the trimmed means."""
        assert received.rows is not None
        count = len(received.rows)
        # 0.29 * 100 is 28.999999999999996 in floating point, but 29 rows are meant
        dropped = math.floor(round(self.fraction * count, 9))
        return _mean_of_sorted(received.rows, dropped, count - dropped), state


def _mean_of_sorted(rows: Tensor, start: int, stop: int) -> Tensor:
    """Sorts every column of (clients, parameters) and averages places ``start`` to ``stop``."""
    return torch.cat([part[start:stop].mean(dim=0) for part in _sorted_columns(rows)])


def _sorted_columns(rows: Tensor) -> Iterator[Tensor]:
    for columns in torch.split(rows, _COLUMNS, dim=1):
        yield columns.to(torch.float64).sort(dim=0).values
