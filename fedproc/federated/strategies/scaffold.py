"""Scaffold: control variates take out the drift of unlike clients. Runs in the parent.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", 2020, with
option II for the control variates. The clients' part is
:class:`fedproc.client.rules.ControlVariates`; the server's is

    x <- x + lr mean_i (y_i - x)
    c <- c + (1/N) sum_i (c_i_new - c_i_old)

over the accepted clients of the round, with N all clients; so c is always the mean of all c_i.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from fedproc.client.rules import ControlVariates, LocalRule, plain_sgd_rate
from fedproc.federated.strategies.contract import (
    State,
    Strategy,
    mean_of,
    require_local_epochs,
)
from fedproc.ranges import require_positive, settle

if TYPE_CHECKING:
    from torch import Tensor

    from fedproc.client.training import LocalTraining, TrainFunction
    from fedproc.federated.fold import Received


@dataclass(frozen=True, slots=True)
class Scaffold(Strategy):
    """Averages uniformly; needs LocalTraining with plain SGD of one constant rate.

    Attributes:
        lr: Server learning rate.
    """

    lr: float = 1.0
    uniform: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the rate."""
        settle(self, require_positive, "lr")

    def initial(self, x: Tensor) -> State:
        """Starts with c = 0."""
        return {"c": torch.zeros_like(x)}

    def local_rule(self) -> LocalRule:
        """Returns the clients' part."""
        return ControlVariates()

    def shared(self, state: State) -> dict[str, Tensor]:
        """Sends c to every client."""
        return dict(state)

    def keeps_master(self) -> bool:
        """Says yes for steps, no for the mean itself."""
        return self.lr != 1

    def step(self, x: Tensor, received: Received, state: State) -> tuple[Tensor, State]:
        """Moves to the uniform mean."""
        mean = mean_of(received)
        return (mean if self.lr == 1 else x + self.lr * (mean - x)), state

    def after(
        self,
        state: State,
        before: Mapping[str, dict[str, Any]],
        kept: Mapping[str, dict[str, Any]],
        population: int,
    ) -> State:
        """Moves c by the mean change of the control variates."""
        change = torch.zeros_like(state["c"])
        for client, new in kept.items():
            change += new["c_i"]
            if "c_i" in before.get(client, {}):
                change -= before[client]["c_i"]
        return {"c": state["c"] + change / population}

    def check(self, local: LocalTraining | TrainFunction, cohort: int) -> None:  # noqa: ARG002 - part of the contract
        """Raises ValueError for a train function and for any optimizer but plain SGD."""
        epochs = require_local_epochs("Scaffold", local)
        plain_sgd_rate(epochs.optimizer([nn.Parameter(torch.zeros(1, device="cpu"))]))
