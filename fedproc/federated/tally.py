"""The numbers of a round's accepted updates, without their tensors. Runs in the parent."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedproc.client.evaluation import exact_sum
from fedproc.client.update import NO_BLOCK

if TYPE_CHECKING:
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

    def accept(self, client: str, update: Update, weight: float) -> None:
        """Takes in the numbers of an update, and takes its block away from it."""
        update.block = NO_BLOCK
        if self.first is None:
            self.first = update
        self.kept[client] = update.state
        self.weights.append(weight)
        self.step_norms.append(update.step_norm)
        self.loss_sums.append(update.loss_sum)
        self.within.append(bool(update.within))
        for name, value in update.metrics.items():
            if name not in self.metrics:
                self.metrics[name] = _floats(), _floats()
            weights, values = self.metrics[name]
            weights.append(weight)
            values.append(value)
        self.examples += update.examples
        self.rows += update.rows

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
