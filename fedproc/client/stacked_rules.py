"""FedProx's and Scaffold's corrections for a stack: the same formulas, a row per client.

Runs in workers. See :mod:`fedproc.client.rules` for one client at a time, and for the papers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fedproc.client.rules import ControlVariates, LocalRule, Proximal, plain_sgd_rate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


class StackedCorrection(Protocol):
    """Changes the gradients of all clients of a stack."""

    def apply(self, gradients: Tensor, values: Tensor) -> None:
        """Changes ``gradients`` in place: (clients, parameters), those that still train."""

    def keep(
        self, values: Tensor, steps: Sequence[int], optimizer: torch.optim.Optimizer
    ) -> list[dict[str, Any]]:
        """Returns what each client keeps; ``values``: (clients, parameters), trained."""


def stacked_correction(
    rule: LocalRule | None,
    anchor: Tensor,
    shared: Mapping[str, Tensor],
    states: Sequence[Mapping[str, Any]],
) -> StackedCorrection | None:
    """Starts the corrections of a stack, or returns None if there is nothing to correct.

    Args:
        rule: Of the strategy.
        anchor: The global parameters: (parameters,).
        shared: What the strategy sent to all clients.
        states: What each client kept.
    """
    if isinstance(rule, Proximal) and rule.mu != 0:
        return _Pulls(anchor, rule.mu)
    if isinstance(rule, ControlVariates):
        c = shared["c"]
        shifts = torch.stack([c - known["c_i"] if "c_i" in known else c for known in states])
        shifts = shifts.to(anchor.device)  # what is kept and shared is on the CPU
        return _Drifts(anchor, shifts, shifts.to(anchor))
    return None


@dataclass(frozen=True, slots=True)
class _Pulls:
    anchor: Tensor
    mu: float

    def apply(self, gradients: Tensor, values: Tensor) -> None:
        """Adds mu (y - x)."""
        gradients.add_(values - self.anchor, alpha=self.mu)

    def keep(
        self,
        values: Tensor,
        steps: Sequence[int],  # noqa: ARG002 - part of the protocol
        optimizer: torch.optim.Optimizer,  # noqa: ARG002 - part of the protocol
    ) -> list[dict[str, Any]]:
        """Keeps nothing."""
        return [{} for _ in values]


@dataclass(frozen=True, slots=True)
class _Drifts:
    anchor: Tensor
    shifts: Tensor
    rounded: Tensor

    def apply(self, gradients: Tensor, values: Tensor) -> None:  # noqa: ARG002 - part of the protocol
        """Adds c - c_i."""
        gradients.add_(self.rounded[: len(gradients)])

    def keep(
        self, values: Tensor, steps: Sequence[int], optimizer: torch.optim.Optimizer
    ) -> list[dict[str, Any]]:
        """Keeps the new c_i, in float32 unless the parameters are more precise."""
        distance = torch.tensor(steps, dtype=torch.float64, device="cpu") * plain_sgd_rate(
            optimizer
        )
        moved = (self.anchor.double() - values.double()) / distance[:, None].to(values.device)
        kept = (moved - self.shifts).to("cpu", torch.promote_types(values.dtype, torch.float32))
        return [{"c_i": row.clone()} for row in kept]
