"""Gradient corrections that a strategy asks of the clients: FedProx's and Scaffold's.

Runs in worker processes, around the local epochs of one client; the parent makes the rule and
sends it once. A rule starts one correction per client and round.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from fedproc.client.training import Progress


class Correction(Protocol):
    """Changes the gradients of one client while it trains."""

    def apply(self) -> None:
        """Changes the gradients in place; called after each backward pass."""

    def keep(self, progress: Progress) -> dict[str, Any]:
        """Returns what the client keeps; called after the last step."""


class LocalRule(Protocol):
    """Starts the correction of one client."""

    def start(
        self,
        parameters: Sequence[Tensor],
        shared: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> Correction | None:
        """Returns the correction, or None if the gradients stay as they are.

        Args:
            parameters: The trained parameters, at their global values.
            shared: What the strategy sent to all clients of the round.
            state: What this client kept from its last accepted update.
        """


@dataclass(frozen=True, slots=True)
class Proximal:
    """FedProx (Li et al. 2020): adds mu (y - x) to the gradient; x global, y local parameters."""

    mu: float

    def start(
        self,
        parameters: Sequence[Tensor],
        shared: Mapping[str, Tensor],  # noqa: ARG002 - part of the protocol
        state: Mapping[str, Any],  # noqa: ARG002 - part of the protocol
    ) -> Correction | None:
        """Remembers x; mu = 0 changes nothing, to the bit."""
        if self.mu == 0:
            return None
        return _Pull(parameters, [p.detach().clone() for p in parameters], self.mu)


@dataclass(frozen=True, slots=True)
class _Pull:
    """The pull of one client towards the global parameters."""

    parameters: Sequence[Tensor]
    anchors: Sequence[Tensor]
    mu: float

    def apply(self) -> None:
        """Adds mu (y - x)."""
        for parameter, anchor in zip(self.parameters, self.anchors, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=self.mu)

    def keep(self, progress: Progress) -> dict[str, Any]:  # noqa: ARG002 - part of the protocol
        """Keeps nothing."""
        return {}


@dataclass(frozen=True, slots=True)
class ControlVariates:
    """Scaffold, option II (Karimireddy et al. 2020).

    The gradient becomes g - c_i + c. Afterwards c_i <- c_i - c + (x - y) / (steps * rate), which
    is the mean gradient of the client's steps. ``shared["c"]`` and ``state["c_i"]`` are vectors
    over all trained parameters; a client that kept nothing starts with zeros.
    """

    def start(
        self,
        parameters: Sequence[Tensor],
        shared: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> Correction | None:
        """Remembers x and c - c_i."""
        shift = shared["c"] - state["c_i"] if "c_i" in state else shared["c"]
        shift = shift.to(parameters[0].device)  # what is kept and shared is on the CPU
        pieces = torch.split(shift, [parameter.numel() for parameter in parameters])
        shifts = [
            piece.view(parameter.shape).to(parameter)
            for piece, parameter in zip(pieces, parameters, strict=True)
        ]
        return _Drift(parameters, _flat(parameters), shift, shifts)


@dataclass(frozen=True, slots=True)
class _Drift:
    """The drift of one client that Scaffold takes out: shift = c - c_i."""

    parameters: Sequence[Tensor]
    anchor: Tensor
    shift: Tensor
    shifts: Sequence[Tensor]

    def apply(self) -> None:
        """Adds c - c_i."""
        for parameter, shift in zip(self.parameters, self.shifts, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(shift)

    def keep(self, progress: Progress) -> dict[str, Any]:
        """Keeps the new c_i, in float32 unless a parameter is more precise.

        Raises:
            ValueError: The optimizer is not plain SGD of one constant rate.
        """
        assert progress.optimizer is not None
        distance = progress.steps * plain_sgd_rate(progress.optimizer)
        moved = (self.anchor - _flat(self.parameters)) / distance
        return {"c_i": (moved - self.shift).to("cpu", _state_dtype(self.parameters))}


RULES: Final = (Proximal, ControlVariates)
"""The rules that are written here; a strategy of a user's may bring its own."""


def plain_sgd_rate(optimizer: torch.optim.Optimizer) -> float:
    """Returns the rate of a plain SGD optimizer.

    Raises:
        ValueError: It is another optimizer, its steps are more than the rate times the gradient, or
            it has more than one rate.
    """
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    more = ("momentum", "dampening", "weight_decay", "maximize")
    plain = type(optimizer) is torch.optim.SGD and not any(
        group[name] for group in optimizer.param_groups for name in more
    )
    if not plain or len(rates) != 1:
        raise ValueError(
            "Scaffold needs torch.optim.SGD without momentum or weight decay, and with one "
            f"constant rate above 0, got {optimizer!r}"
        )
    return rates.pop()


def _flat(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1).double() for parameter in parameters])


def _state_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    dtypes = [parameter.dtype for parameter in parameters]
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def step_norm(optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Computes FedNova's ``|a|_1`` of a number of steps (Wang et al. 2020).

    The sum of the coefficients with which the steps applied the gradients, in units of the rate.
    SGD is a linear recurrence, so it is what SGD makes of gradients that are all 1; with momentum
    rho it equals (steps - rho (1 - rho^steps) / (1 - rho)) / (1 - rho). Other optimizers
    count their steps.
    """
    group = optimizer.param_groups[0]
    if not isinstance(optimizer, torch.optim.SGD) or not group["momentum"]:
        return float(steps)
    momentum, buffer, total = float(group["momentum"]), 0.0, 0.0
    for step in range(steps):
        # torch fills the buffer with the first gradient, without dampening
        buffer = 1.0 if step == 0 else momentum * buffer + 1.0 - group["dampening"]
        total += 1.0 + momentum * buffer if group["nesterov"] else buffer
    return total
