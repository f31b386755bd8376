"""The Gaussian mechanism of a private run: who takes part, how much noise, what it has cost.

Runs in the parent. Like a strategy it is immutable, but for its stream of secret numbers; what
changes from round to round is a :class:`Spent` that the aggregator keeps, saves and gives back.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from fedproc.errors import PrivacyBudgetError
from fedproc.federated.accountant import Accountant
from fedproc.federated.noise import SecretStream
from fedproc.federated.private_fold import PrivateFold

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fedproc.client.layout import Layout
    from fedproc.federated.privacy import DifferentialPrivacy

# Andrew et al. 2021: noise on the count of unclipped clients, as a part of the expected cohort.
_COUNT_NOISE: Final = 1 / 20


@dataclass(frozen=True, slots=True)
class Spent:
    """What the rounds so far have cost, and where adaptive clipping stands.

    Attributes:
        rounds: Rounds whose result was released.
        clip_norm: The norm of the next round.
    """

    rounds: int
    clip_norm: float


class Mechanism:
    """Draws cohorts, adds noise and accounts for both."""

    def __init__(
        self,
        privacy: DifferentialPrivacy,
        rate: float,
        population: int,
        stream: SecretStream | None = None,
    ) -> None:
        """Works out the noise.

        Args:
            privacy: What the user asked for.
            rate: The probability q with which a client takes part in a round.
            population: The number N of all clients.
            stream: Where random numbers come from; None takes a new secret one.

        Raises:
            ValueError: The budget does not pay for one round.
        """
        self.privacy = privacy
        self._rate = rate
        self._denominator = rate * population
        self._stream = stream or SecretStream()
        noise = privacy.noise_multiplier
        self._count_noise = count_noise(noise, self._denominator) if privacy.adaptive else 0.0
        self._update_noise = update_noise(noise, self._count_noise)
        self._accountant = Accountant(rate, noise, privacy.delta)
        if not self._affords(Spent(0, privacy.clip_norm)):
            raise ValueError(
                f"max_epsilon={privacy.max_epsilon:g} pays for no round: one costs "
                f"{self._accountant.epsilon(1):.4g}; use more noise or a lower clients_per_round"
            )

    def start(self) -> Spent:
        """Returns what is spent before the first round."""
        return Spent(0, float(self.privacy.clip_norm))

    def draw(self, clients: Sequence[str]) -> tuple[str, ...]:
        """Draws each client by itself, from the secret stream: sampling protects if it is secret.

        Returns:
            The cohort in the order of ``clients``; it may be empty.
        """
        chances = self._stream.uniform(len(clients)).tolist()
        pairs = zip(clients, chances, strict=True)
        return tuple(client for client, chance in pairs if chance < self._rate)

    def fold(self, layout: Layout, start: Tensor, spent: Spent) -> PrivateFold:
        """Makes the fold of one round, with fresh noise; ``start`` is the global model."""
        noise = self._update_noise * spent.clip_norm
        return PrivateFold(layout, start, self._denominator, noise, self._stream)

    def after(self, spent: Spent, within: Sequence[bool]) -> Spent:
        """Counts one round and lets an adaptive clip norm follow.

        Args:
            spent: Before the round.
            within: For each accepted client, whether its change was not clipped.
        """
        norm, privacy = spent.clip_norm, self.privacy
        if privacy.adaptive:
            # Counting +1/2 and -1/2 instead of 1 and 0 halves what one client can change.
            count = math.fsum(0.5 if unclipped else -0.5 for unclipped in within)
            if self._count_noise:
                count += self._count_noise * self._stream.normal(1).item()
            part = 0.5 + count / self._denominator
            norm *= math.exp(-privacy.clip_learning_rate * (part - privacy.target_quantile))
        return Spent(spent.rounds + 1, norm)

    def epsilon(self, spent: Spent) -> float:
        """Returns epsilon of all rounds so far together."""
        return self._accountant.epsilon(spent.rounds)

    def require_budget(self, spent: Spent) -> None:
        """Raises PrivacyBudgetError if one more round would cost more than the budget."""
        if not self._affords(spent):
            raise PrivacyBudgetError(
                f"the privacy budget is spent: epsilon is {self.epsilon(spent):.4g} after "
                f"{spent.rounds} rounds, one more would make it "
                f"{self._accountant.epsilon(spent.rounds + 1):.4g}, above "
                f"max_epsilon={self.privacy.max_epsilon:g}; the model is as after the last round"
            )

    def identity(self) -> dict[str, Any]:
        """Returns what must be the same when a run continues; the budget may be another."""
        facts = asdict(self.privacy) | {"clients_per_round": self._rate}
        del facts["max_epsilon"]
        return facts

    def _affords(self, spent: Spent) -> bool:
        budget = self.privacy.max_epsilon
        return budget is None or self._accountant.epsilon(spent.rounds + 1) <= budget


def count_noise(noise_multiplier: float, expected: float) -> float:
    """Returns the standard deviation of the noise on the count of unclipped clients.

    A twentieth of the expected cohort; in small cohorts at least the noise multiplier, because
    below half of it no noise on the updates could make up for it. None at all without noise.
    """
    return max(_COUNT_NOISE * expected, noise_multiplier) if noise_multiplier else 0.0


def update_noise(noise_multiplier: float, count_noise: float) -> float:
    """Returns the noise multiplier of the updates beside a noisy count, for the same total.

    One client changes the count by at most 1/2, so z = (z_update^-2 + (2 s)^-2)^(-1/2), with s the
    standard deviation of the count's noise (Andrew et al. 2021, theorem 1).
    """
    if not count_noise:
        return noise_multiplier
    return float((noise_multiplier**-2 - (2 * count_noise) ** -2) ** -0.5)
