"""FedNova: clients that took more steps do not pull harder. Runs in the parent.

Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
Optimization", 2020:

    x <- x + tau_eff sum_i p_i (y_i - x) / a_i,    tau_eff = sum_i p_i a_i

with p_i the weight of client i and a_i = |a_i|_1 its accumulated step coefficients: its number of
steps for SGD, more with momentum (:func:`fedproc.client.rules.step_norm`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedproc.federated.strategies.contract import State, Strategy, mean_of

if TYPE_CHECKING:
    from torch import Tensor

    from fedproc.client.update import Update
    from fedproc.federated.fold import Received


@dataclass(frozen=True, slots=True)
class FedNova(Strategy):
    """Normalised averaging; equal step counts give FedAvg, to the bit."""

    def mean_weight(self, weight: float, update: Update, first: Update) -> float:
        """Returns w_i / r_i with r_i = a_i / a_first, which is exactly 1 for equal steps."""
        return weight / (_norm(update) / _norm(first))

    def step(self, x: Tensor, received: Received, state: State) -> tuple[Tensor, State]:
        """Stretches the step to the mean z, weighted by w_i / r_i.

        With W = sum w_i the rule reads x + s (z - x), s = (sum w_i r_i / W) (sum w_i / r_i / W).
        """
        norms = [norm for norm in received.step_norms if norm is not None]
        ratios = [norm / norms[0] for norm in norms]
        up = math.fsum(w * r for w, r in zip(received.weights, ratios, strict=True))
        down = math.fsum(w / r for w, r in zip(received.weights, ratios, strict=True))
        mean = mean_of(received)
        if all(ratio == 1 for ratio in ratios):
            return mean, state
        stretch = up * down / math.fsum(received.weights) ** 2
        return x + stretch * (mean - x), state


def _norm(update: Update) -> float:
    if update.step_norm is None or not 0 < update.step_norm < math.inf:
        raise ValueError(
            "FedNova needs the number of steps of every client: return it as metrics['steps'], "
            f"above 0, from the train function; got {update.step_norm!r}"
        )
    return update.step_norm
