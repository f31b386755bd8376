"""Adaptive server optimizers. Runs in the parent.

Reddi et al., "Adaptive Federated Optimization", 2021, algorithm 2. The mean change of the clients,
d = mean - x, is a pseudo-gradient:

    m <- beta1 m + (1 - beta1) d
    v <- v + d^2                                (Adagrad)
    v <- beta2 v + (1 - beta2) d^2              (Adam)
    v <- v - (1 - beta2) d^2 sign(v - d^2)      (Yogi)
    x <- x + lr m / (sqrt(v) + tau)

v starts at tau^2, m at 0, and no bias is corrected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedproc.federated.strategies.contract import (
    State,
    Strategy,
    mean_of,
)
from fedproc.ranges import require_fraction, require_positive, settle

if TYPE_CHECKING:
    from torch import Tensor

    from fedproc.federated.fold import Received


@dataclass(frozen=True, slots=True)
class FedAdagrad(Strategy):
    """Adagrad on the server.

    Attributes:
        lr: Server learning rate.
        beta1: Decay of the first moment.
        tau: Adaptivity: the smaller, the more the step sizes differ.
    """

    lr: float = 0.01
    beta1: float = 0.9
    tau: float = 1e-3

    def __post_init__(self) -> None:
        """Checks every value."""
        _check(self, "beta1")

    def initial(self, x: Tensor) -> State:
        """Starts with m = 0 and v = tau^2."""
        return _moments(x, self.tau)

    def keeps_master(self) -> bool:
        """Says yes."""
        return True

    def step(self, x: Tensor, received: Received, state: State) -> tuple[Tensor, State]:
        """Takes one step."""
        d = mean_of(received) - x
        m = self.beta1 * state["m"] + (1 - self.beta1) * d
        v = state["v"] + d * d
        return x + self.lr * m / (v.sqrt() + self.tau), {"m": m, "v": v}


@dataclass(frozen=True, slots=True)
class FedAdam(Strategy):
    """Adam on the server.

    Attributes:
        lr: Server learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        tau: Adaptivity: the smaller, the more the step sizes differ.
    """

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        """Checks every value."""
        _check(self, "beta1", "beta2")

    def initial(self, x: Tensor) -> State:
        """Starts with m = 0 and v = tau^2."""
        return _moments(x, self.tau)

    def keeps_master(self) -> bool:
        """Says yes."""
        return True

    def step(self, x: Tensor, received: Received, state: State) -> tuple[Tensor, State]:
        """Takes one step."""
        d = mean_of(received) - x
        m = self.beta1 * state["m"] + (1 - self.beta1) * d
        v = self.beta2 * state["v"] + (1 - self.beta2) * d * d
        return x + self.lr * m / (v.sqrt() + self.tau), {"m": m, "v": v}


@dataclass(frozen=True, slots=True)
class FedYogi(Strategy):
    """Yogi on the server: v grows and shrinks by no more than the squared change.

    Attributes:
        lr: Server learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        tau: Adaptivity: the smaller, the more the step sizes differ.
    """

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        """Checks every value."""
        _check(self, "beta1", "beta2")

    def initial(self, x: Tensor) -> State:
        """Starts with m = 0 and v = tau^2."""
        return _moments(x, self.tau)

    def keeps_master(self) -> bool:
        """Says yes."""
        return True

    def step(self, x: Tensor, received: Received, state: State) -> tuple[Tensor, State]:
        """Takes one step."""
        d = mean_of(received) - x
        m = self.beta1 * state["m"] + (1 - self.beta1) * d
        squared = d * d
        v = state["v"] - (1 - self.beta2) * squared * torch.sign(state["v"] - squared)
        return x + self.lr * m / (v.sqrt() + self.tau), {"m": m, "v": v}


def _moments(x: Tensor, tau: float) -> State:
    return {"m": torch.zeros_like(x), "v": torch.full_like(x, tau**2)}


def _check(strategy: Strategy, *betas: str) -> None:
    settle(strategy, require_positive, "lr", "tau")
    settle(strategy, require_fraction, *betas)
