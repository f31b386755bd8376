"""What does not change from round to round. Runs in the parent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedproc.federated.strategies.contract import weighs_by_rows

if TYPE_CHECKING:
    from fedproc.federated.secure_aggregation import SecureAggregation
    from fedproc.federated.stacking import Stacking
    from fedproc.federated.strategies.contract import Strategy

Weigh = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Rules:
    """What does not change from round to round.

    Attributes:
        strategy: The server rule.
        weigh: Rows of a client -> its weight.
        seed: Seed of the run.
        min_clients: Fewest accepted updates; with ``privacy`` any number will do.
        retries: How often a client trains again that was training when its worker was lost.
        deadline: Seconds a round may take; a client that is not done then is a failure.
        secure: How rounds of :mod:`fedproc.federated.secure_round` are played; None in others.
    """

    strategy: Strategy
    weigh: Weigh
    seed: int
    min_clients: int
    retries: int
    deadline: float | None = None
    secure: SecureAggregation | None = None

    def weight(self, rows: int) -> float:
        """Returns what a client with ``rows`` rows weighs in the round."""
        return 1.0 if self.strategy.uniform else self.weigh(rows)

    def weight_ahead(self, stacking: Stacking) -> Weigh | None:
        """Returns what weighs a client before it trains, so that a stack can return its mean.

        None: no stacks are trained, or the strategy wants each update by itself.
        """
        single = self.strategy.keeps_rows or not weighs_by_rows(self.strategy)
        return None if single or stacking.on is False else self.weight
