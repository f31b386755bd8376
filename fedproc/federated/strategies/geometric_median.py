"""The geometric median, RFA. Runs in the parent.

Pillutla et al., "Robust Aggregation for Federated Learning", 2022: the point z with the least
weighted sum of distances to the updates u_i, by the smoothed Weiszfeld iteration

    z <- sum_i b_i u_i / sum_i b_i,    b_i = p_i / max(nu, |z - u_i|)

from the weighted mean on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from fedproc.federated.strategies.contract import State, Strategy, rows_of
from fedproc.ranges import require_at_least, require_positive, settle

if TYPE_CHECKING:
    from torch import Tensor

    from fedproc.federated.fold import Received


@dataclass(frozen=True, slots=True)
class GeometricMedian(Strategy):
    """The weighted geometric median of the updates.

    Attributes:
        steps: Most iterations; they end earlier when z stands still.
        nu: Smallest distance that counts, so that an update at z does not divide by zero.
        tolerance: z stands still when it moves less than this part of its median distance to the
            updates.
    """

    steps: int = 100
    nu: float = 1e-6
    tolerance: float = 1e-9
    keeps_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks every value."""
        settle(self, require_at_least, "steps", least=1)
        settle(self, require_positive, "nu", "tolerance")

    def step(self, x: Tensor, received: Received, state: State) -> tuple[Tensor, State]:  # noqa: ARG002 - part of the contract
        """Iterates from the weighted mean."""
        rows = rows_of(received)
        weights = torch.tensor(received.weights, dtype=torch.float64, device="cpu")
        z = _mean(rows, weights)
        for _ in range(self.steps):
            distances = torch.stack([(row - z).norm() for row in rows])
            moved = _mean(rows, weights / distances.clamp(min=self.nu))
            still = (moved - z).norm() <= self.tolerance * distances.median()
            z = moved
            if still:
                break
        return z, state


def _mean(rows: Tensor, weights: Tensor) -> Tensor:
    return (rows * (weights / weights.sum()).unsqueeze(1)).sum(dim=0)
