"""What users say about secure aggregation, checked when an aggregator is made. In the parent."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fedproc.client.fixed_point import FixedPoint
from fedproc.client.trainer import Trainer
from fedproc.federated import round as plain_round
from fedproc.federated.strategies import Strategy
from fedproc.ranges import require_at_least, require_positive, settle

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedproc.client.layout import Layout
    from fedproc.federated.round import Outcome
    from fedproc.federated.rules import Rules

    Play = Callable[..., Outcome]
    """Plays one round, such as :func:`fedproc.federated.round.play`."""

_MOST_BITS: Final = 52
_MOST_COUNTERS: Final = 64


@dataclass(frozen=True, slots=True)
class SecureAggregation:
    """The parent learns the sum of the updates and no update (Bonawitz et al. 2017).

    It protects against a parent that follows the protocol and looks at all it gets. Workers and
    parent are processes of one user on one machine: see "Secure aggregation" in docs/privacy.md.

    Attributes:
        threshold: Part of the clients of a round that must finish, above 0 to 1. Rounded up, it
            must be at least 2 clients.
        bits: Fractional bits of the fixed point, 1 to 52: a mean is exact to about
            ``2**-(bits + 1)`` times the number of clients by the sum of weights.

    Raises:
        ValueError: A value is outside of its range.
        ImportError: The package ``cryptography`` is missing.
    """

    threshold: float = 0.66
    bits: int = 32

    def __post_init__(self) -> None:
        """Checks both values and that the package is there."""
        settle(self, require_positive, "threshold")
        settle(self, require_at_least, "bits", least=1)
        if self.threshold > 1:
            raise ValueError(
                f"threshold={self.threshold!r} cannot be met: it is a part of the clients of a "
                "round, above 0 to 1"
            )
        if self.bits > _MOST_BITS:
            raise ValueError(f"bits must be a whole number from 1 to {_MOST_BITS}, got {self.bits}")
        if importlib.util.find_spec("cryptography") is None:
            raise ImportError(
                "SecureAggregation needs the package cryptography: pip install 'fedproc[secure]'"
            )

    def needed(self, clients: int) -> int:
        """Returns how many of so many clients must finish."""
        # 0.07 * 100 is 7.000000000000001 in floating point, and 7 is meant
        return math.ceil(self.threshold * clients - 1e-9)

    def check(self, strategy: Strategy, layout: Layout, cohort: int) -> None:
        """Raises ValueError if a sum is not enough for these, or would be the update of one."""
        if self.needed(cohort) < 2:
            raise ValueError(
                f"threshold={self.threshold:g} of {cohort} clients a round lets "
                f"{self.needed(cohort)} finish alone, and the sum of one is its update: at least "
                "2 must be needed; raise threshold or clients_per_round"
            )
        if FixedPoint(self.bits, cohort).bound < 1:
            raise ValueError(
                f"bits={self.bits} leaves {cohort} clients no range for their updates; use fewer"
            )
        counters = sum(section.numel for section in layout.of_kind("largest"))
        if counters > _MOST_COUNTERS:
            raise ValueError(
                f"the model has integer buffers of {counters} elements; under secure aggregation "
                f"the largest of at most {_MOST_COUNTERS} (such as BatchNorm's counters) is found"
            )
        _require_sum_is_enough(strategy)


def how_to_play(rules: Rules, layout: Layout, cohort: int) -> tuple[type[Trainer], Play]:
    """Returns what trains in the workers and what plays a round here, checked.

    Raises:
        ValueError: ``rules.secure`` is nothing of the kind, or cannot work with the rest.
    """
    if rules.secure is None:
        return Trainer, plain_round.play
    if not isinstance(rules.secure, SecureAggregation):
        raise ValueError(f"secure must be SecureAggregation(…) or None, got {rules.secure!r}")
    rules.secure.check(rules.strategy, layout, cohort)
    # these need the package cryptography, which is an extra
    from fedproc.client.secure_trainer import SecureTrainer
    from fedproc.federated import secure_round

    return SecureTrainer, secure_round.play


def _require_sum_is_enough(strategy: Strategy) -> None:
    kind = type(strategy)
    if kind.keeps_rows:
        why = "compares single updates"
    elif kind.mean_weight is not Strategy.mean_weight:
        why = "weighs every update by what it says of itself"
    elif kind.after is not Strategy.after:
        why = "reads what every client keeps"
    else:
        return
    raise ValueError(
        f"{kind.__name__} {why}, but secure aggregation shows their sum only: use FedAvg, FedProx "
        "or a server optimizer such as FedAdam, or leave out secure="
    )
