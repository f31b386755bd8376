"""FedAvg and server momentum. Runs in the parent.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", 2017.
Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedproc.federated.strategies.contract import (
    State,
    Strategy,
    is_still,
    mean_of,
)
from fedproc.ranges import require_fraction, require_positive, settle

if TYPE_CHECKING:
    from torch import Tensor

    from fedproc.federated.fold import Received


@dataclass(frozen=True, slots=True)
class FedAvg(Strategy):
    """The weighted mean of the updates: x <- x + lr (mean - x); lr = 1 is exactly the mean.

    Attributes:
        lr: Server learning rate.
    """

    lr: float = 1.0

    def __post_init__(self) -> None:
        """Checks the rate."""
        settle(self, require_positive, "lr")

    def keeps_master(self) -> bool:
        """Says yes for steps, no for the mean itself."""
        return self.lr != 1

    def looks_at_x(self) -> bool:
        """Says no for the mean itself, but not where somebody gave it another step."""
        return self.lr != 1 or not is_still(self.step, _FEDAVG_STEP)

    def step(self, x: Tensor, received: Received, state: State) -> tuple[Tensor, State]:
        """Moves to the mean."""
        mean = mean_of(received)
        return (mean if self.lr == 1 else x + self.lr * (mean - x)), state


_FEDAVG_STEP = FedAvg.step


@dataclass(frozen=True, slots=True)
class FedAvgM(Strategy):
    """Server momentum: v <- momentum v + (mean - x); x <- x + lr v.

    Attributes:
        lr: Server learning rate.
        momentum: Part of the last step that is kept, 0 to below 1; there is no (1 - momentum).
    """

    lr: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        """Checks both values."""
        settle(self, require_positive, "lr")
        settle(self, require_fraction, "momentum")

    def initial(self, x: Tensor) -> State:
        """Starts at rest."""
        return {"v": torch.zeros_like(x)}

    def keeps_master(self) -> bool:
        """Says yes."""
        return True

    def step(self, x: Tensor, received: Received, state: State) -> tuple[Tensor, State]:
        """Takes one step with momentum."""
        v = self.momentum * state["v"] + (mean_of(received) - x)
        return x + self.lr * v, {"v": v}
