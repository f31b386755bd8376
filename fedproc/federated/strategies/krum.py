"""Krum and Multi-Krum: keep the updates that have the closest neighbours. Runs in the parent.

Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", 2017.
Of K updates with at most f byzantine ones, the score of an update is the sum of its squared
distances to its K - f - 2 nearest neighbours; the ``keep`` lowest are averaged uniformly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from fedproc.errors import QuorumError
from fedproc.federated.strategies.contract import State, Strategy, rows_of
from fedproc.ranges import require_at_least, settle

if TYPE_CHECKING:
    from torch import Tensor

    from fedproc.client.training import LocalTraining, TrainFunction
    from fedproc.federated.fold import Received


@dataclass(frozen=True, slots=True)
class Krum(Strategy):
    """Averages the ``keep`` updates of lowest score; ties go to the earlier client.

    Attributes:
        byzantine: f, the most updates of a round that may be arbitrary; K >= 2f + 3.
        keep: Updates to average, 1 to K - f - 2.
    """

    byzantine: int
    keep: int = 1
    keeps_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks both numbers."""
        settle(self, require_at_least, "byzantine", least=0)
        settle(self, require_at_least, "keep", least=1)

    def step(self, x: Tensor, received: Received, state: State) -> tuple[Tensor, State]:  # noqa: ARG002 - part of the contract
        """Averages the chosen updates.

        Raises:
            QuorumError: Too few updates are left for the number of byzantine ones.
        """
        rows = rows_of(received)
        # a removed non-finite update was one of the byzantine ones
        byzantine = max(0, self.byzantine - received.non_finite)
        problem = _problem(len(rows), byzantine, self.keep)
        if problem is not None:
            raise QuorumError(f"Krum cannot choose: {problem}")
        chosen = krum_scores(rows, byzantine).argsort(stable=True)[: self.keep]
        # in cohort order, so that the sum does not depend on the order of the scores
        return rows[chosen.sort().values].mean(dim=0), state

    def check(self, local: LocalTraining | TrainFunction, cohort: int) -> None:  # noqa: ARG002 - part of the contract
        """Raises ValueError for a cohort that is too small."""
        problem = _problem(cohort, self.byzantine, self.keep)
        if problem is not None:
            raise ValueError(f"Krum cannot work: {problem}")


def krum_scores(rows: Tensor, byzantine: int) -> Tensor:
    """Computes the scores of updates.

    Args:
        rows: float64, shape (clients, parameters).
        byzantine: f; the clients - f - 2 nearest neighbours count.

    Returns:
        float64, shape (clients,).
    """
    squared = torch.stack([(rows - row).square().sum(dim=1) for row in rows])
    # the distance to itself is exactly 0 and sorts first (a copy's 0 in its place is the same)
    neighbours = squared.sort(dim=1).values[:, 1 : len(rows) - byzantine - 1]
    return neighbours.sum(dim=1)


def _problem(updates: int, byzantine: int, keep: int) -> str | None:
    if updates < 2 * byzantine + 3:
        return (
            f"{byzantine} byzantine clients need {2 * byzantine + 3} updates, there are {updates}"
        )
    if keep > updates - byzantine - 2:
        return f"keep={keep}, at most {updates - byzantine - 2} of {updates} updates can be kept"
    return None
