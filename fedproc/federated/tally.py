"""The numbers of a round's accepted updates, without their tensors. Runs in the parent."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedproc.client.evaluation import exact_sum
from fedproc.client.update import NO_BLOCK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedproc.client.update import Update


def _floats() -> array[float]:
    return array("d")


@dataclass(slots=True)
class Tally:
    """Numbers of the accepted updates in cohort order; an update itself does not outlive its turn.

    Attributes:
        first: The update that was accepted first, without its block.
        kept: Accepted client -> what it keeps.
        weights, step_norms, loss_sums: One of every accepted client.
        metrics: Name -> weights and values of those that returned it.
        within: Whether the changes were not clipped, one of every accepted client.
        examples, rows: Sums over the accepted clients.
        failures: Client -> why its update does not count.
    """

    first: Update | None = None
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights: array[float] = field(default_factory=_floats)
    step_norms: list[float | None] = field(default_factory=list)
    loss_sums: array[float] = field(default_factory=_floats)
    metrics: dict[str, tuple[array[float], array[float]]] = field(default_factory=dict)
    within: list[bool] = field(default_factory=list)
    examples: int = 0
    rows: int = 0
    failures: dict[str, BaseException] = field(default_factory=dict)

    def accept(
        self, clients: Sequence[str], updates: Sequence[Update], weights: Sequence[float]
    ) -> None:
        """Takes in the numbers of updates in cohort order, and takes their blocks away."""
        if not updates:
            return
        if self.first is None:
            self.first = updates[0]
        for update in updates:
            update.block = NO_BLOCK
        self.kept.update(zip(clients, [update.state for update in updates], strict=True))
        self.weights.extend(weights)
        self.step_norms += [update.step_norm for update in updates]
        self.loss_sums.extend([update.loss_sum for update in updates])
        self.within += [bool(update.within) for update in updates]
        self.examples += sum([update.examples for update in updates])
        self.rows += sum([update.rows for update in updates])
        self._add_metrics(updates, weights)

    def _add_metrics(self, updates: Sequence[Update], weights: Sequence[float]) -> None:
        if len({tuple(update.metrics) for update in updates}) > 1:  # a user's, by chance
            for update, weight in zip(updates, weights, strict=True):
                self._add_columns([update], [weight])
        else:
            self._add_columns(updates, weights)

    def _add_columns(self, updates: Sequence[Update], weights: Sequence[float]) -> None:
        """Adds the metrics of updates that have the same ones."""
        for name in updates[0].metrics:
            if name not in self.metrics:
                self.metrics[name] = _floats(), _floats()
            its_weights, values = self.metrics[name]
            its_weights.extend(weights)
            values.extend([update.metrics[name] for update in updates])

    def loss(self) -> float | None:
        """Mean loss over all rows processed; a custom function's own numbers otherwise."""
        if self.rows:
            return exact_sum(self.loss_sums) / self.rows
        return self.means().get("loss")

    def means(self) -> dict[str, float]:
        """Weighted means; a number that only some clients returned is averaged over those."""
        return {
            name: exact_sum([weight * value for weight, value in zip(*column, strict=True)])
            / exact_sum(column[0])
            for name, column in self.metrics.items()
        }
