"""FedProx. The server averages; the proximal term acts in the workers. Runs in the parent.

Li et al., "Federated Optimization in Heterogeneous Networks", 2020: client i minimises
F_i(y) + mu/2 |y - x|^2, so its gradient gains mu (y - x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedproc.client.rules import LocalRule, Proximal
from fedproc.federated.strategies.contract import (
    State,
    Strategy,
    mean_of,
    require_local_epochs,
)
from fedproc.ranges import require_not_negative, settle

if TYPE_CHECKING:
    from torch import Tensor

    from fedproc.client.training import LocalTraining, TrainFunction
    from fedproc.federated.fold import Received


@dataclass(frozen=True, slots=True)
class FedProx(Strategy):
    """FedAvg whose clients are pulled towards the global model; mu = 0 is FedAvg.

    Attributes:
        mu: Strength of the pull, >= 0.
    """

    mu: float

    def __post_init__(self) -> None:
        """Checks the strength."""
        settle(self, require_not_negative, "mu")

    def local_rule(self) -> LocalRule:
        """Returns the proximal term."""
        return Proximal(self.mu)

    def step(self, x: Tensor, received: Received, state: State) -> tuple[Tensor, State]:  # noqa: ARG002 - part of the contract
        """Moves to the mean."""
        return mean_of(received), state

    def check(self, local: LocalTraining | TrainFunction, cohort: int) -> None:  # noqa: ARG002 - part of the contract
        """Raises ValueError for a custom train function."""
        require_local_epochs("FedProx", local)
