"""Differential privacy by clients: what a user asks for, and what it can be combined with.

Runs in the parent. McMahan et al., "Learning Differentially Private Recurrent Language Models",
2018 (DP-FedAvg); Andrew et al., "Differentially Private Learning with Adaptive Clipping", 2021.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn.modules.batchnorm import _NormBase

from fedproc.federated.accountant import require_library
from fedproc.federated.mechanism import Ledger, Mechanism
from fedproc.federated.strategies import Strategy
from fedproc.ranges import (
    as_whole,
    require_fraction,
    require_not_negative,
    require_positive,
    require_switch,
    settle,
)

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class DifferentialPrivacy:
    """The model tells little about any one client: (epsilon, delta)-differential privacy.

    Each round every client takes part with probability q = ``clients_per_round``, by itself
    (Poisson sampling). Its change of the model, over all trained parameters at once, is clipped in
    its worker to the L2 norm C = ``clip_norm``. The mean is

        (sum of the clipped changes + N(0, (noise_multiplier C)^2 I)) / (q N)

    with N all clients: the denominator is fixed, whoever took part. A client that fails counts as
    zero. ``history[-1].epsilon`` is what all rounds so far have cost together.

    Attributes:
        clip_norm: C; the first one if ``adaptive``.
        noise_multiplier: Standard deviation of the noise, in units of C; 0 adds none, and then
            epsilon is infinite.
        delta: Probability with which epsilon may not hold; well below 1 / N.
        adaptive: Let C follow the ``target_quantile`` of the norms: C <- C exp(-
            ``clip_learning_rate`` (b - ``target_quantile``)), b being the part of the clients whose
            change was within C. Its count gets noise of its own, and the changes a little more, so
            that both together cost what ``noise_multiplier`` says.
        target_quantile: Part of the clients that should not be clipped, for ``adaptive``.
        clip_learning_rate: How fast C follows, for ``adaptive``.
        max_epsilon: The budget: ``run`` ends before the round that would exceed it.

    Raises:
        ValueError: A value is outside of its range.
        ImportError: dp-accounting is not installed.
    """

    clip_norm: float
    noise_multiplier: float
    delta: float
    adaptive: bool = False
    target_quantile: float = 0.5
    clip_learning_rate: float = 0.2
    max_epsilon: float | None = None

    def __post_init__(self) -> None:
        """Checks every value."""
        settle(self, require_not_negative, "noise_multiplier")
        settle(self, require_positive, "clip_norm", "delta", "target_quantile")
        settle(self, require_positive, "clip_learning_rate")
        settle(self, require_fraction, "delta", "target_quantile")
        require_switch("adaptive", self.adaptive)
        if self.max_epsilon is not None:
            settle(self, require_positive, "max_epsilon")
            if self.noise_multiplier == 0:
                raise ValueError("max_epsilon needs noise: without it epsilon is infinite")
        require_library()


def open_ledger(
    privacy: DifferentialPrivacy | None,
    clients: int,
    clients_per_round: float,
    weighting: str,
    strategy: Strategy,
) -> Ledger | None:
    """Begins a private run; None without ``privacy``.

    Args:
        privacy: What the user asked for.
        clients: The number of all clients.
        clients_per_round: The probability of each to take part.
        weighting: Must be "uniform".
        strategy: Must use nothing but the mean.

    Raises:
        ValueError: The others do not leave the guarantee whole, or the budget pays for no round.
    """
    if privacy is None:
        return None
    _require_whole(privacy, clients_per_round, weighting, strategy)
    mechanism = Mechanism(privacy, float(clients_per_round), clients)
    once, budget = mechanism.accountant.epsilon(1), privacy.max_epsilon
    if budget is not None and once > budget:
        raise ValueError(
            f"max_epsilon={budget:g} pays for no round: one costs {once:.4g}; use more noise or a "
            "lower clients_per_round"
        )
    return Ledger(mechanism, 0, float(privacy.clip_norm))


def _require_whole(
    privacy: object, clients_per_round: object, weighting: str, strategy: Strategy
) -> None:
    if not isinstance(privacy, DifferentialPrivacy):
        message = f"privacy must be a DifferentialPrivacy(…), got {privacy!r}"
    elif as_whole(clients_per_round) is not None:
        message = (
            "privacy draws each client by itself with probability clients_per_round, and its "
            "epsilon holds for that alone: give a float such as 0.1, not the number "
            f"{clients_per_round!r}"
        )
    elif weighting != "uniform":
        message = (
            f"privacy needs weighting='uniform', got {weighting!r}: weighted by rows, one client "
            "could change the mean without a bound"
        )
    elif strategy.keeps_rows:
        message = (
            f"privacy bounds what one client changes in a mean; {type(strategy).__name__} "
            "looks at every update by itself, and no such bound is known: use a strategy that "
            "averages, such as FedAvg or FedAdam"
        )
    elif not _uses_the_mean_alone(strategy):
        message = (
            f"privacy covers the mean of the updates; {type(strategy).__name__} takes more from "
            "the clients (weights of its own, or what they keep), which would leave without "
            "noise: use FedAvg, FedAvgM, FedProx, FedAdagrad, FedAdam or FedYogi"
        )
    else:
        return
    raise ValueError(message)


def _uses_the_mean_alone(strategy: Strategy) -> bool:
    """Whether no hook of the strategy is given what a client returned."""
    kind = type(strategy)
    return kind.mean_weight is Strategy.mean_weight and kind.after is Strategy.after


def warn_of_weakness(privacy: DifferentialPrivacy | None, model: nn.Module, clients: int) -> None:
    """Warns of what is allowed and hardly ever meant."""
    if privacy is None:
        return
    if privacy.delta >= 1 / clients:
        warnings.warn(
            f"delta={privacy.delta:g} is not below 1/{clients}, one over the number of clients: "
            "publishing all of one client in every such many would satisfy it; choose it smaller",
            UserWarning,
            stacklevel=3,
        )
    names = [name for name, module in model.named_modules() if _has_statistics(module)]
    if names:
        warnings.warn(
            f"{', '.join(names)}: running statistics do not leave the clients under differential "
            "privacy, so they stay as they are; use GroupNorm or LayerNorm instead",
            UserWarning,
            stacklevel=3,
        )


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.running_mean is not None
