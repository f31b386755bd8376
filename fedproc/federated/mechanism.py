"""The Gaussian mechanism of a private run: who takes part, how much noise, what it has cost.

Runs in the parent. The mechanism is what does not change from round to round. What does is in a
:class:`Ledger`: each round makes a new one out of the last, and the aggregator keeps and saves it.
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
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from fedproc.client.layout import Layout
    from fedproc.federated.privacy import DifferentialPrivacy

# Andrew et al. 2021: noise on the count of unclipped clients, as a part of the expected cohort.
_COUNT_NOISE: Final = 1 / 20


class Mechanism:
    """What all rounds of a run have in common.

    Attributes:
        privacy: What the user asked for.
        rate: The probability q with which a client takes part in a round.
        denominator: What sums are divided by: q N, the expected size of a cohort.
        update_noise: Standard deviation of the noise on the sum, in units of the clip norm.
        count_noise: The same on the count of unclipped clients; 0 without adaptive clipping.
        accountant: Rounds -> epsilon.
        stream: Where random numbers come from.
    """

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
            rate: The probability with which a client takes part in a round.
            population: The number N of all clients.
            stream: None takes a new secret one.
        """
        self.privacy, self.rate = privacy, rate
        self.denominator = rate * population
        self.stream = stream or SecretStream()
        noise = privacy.noise_multiplier
        self.count_noise = count_noise(noise, self.denominator) if privacy.adaptive else 0.0
        self.update_noise = update_noise(noise, self.count_noise)
        self.accountant = Accountant(rate, noise, privacy.delta)

    def identity(self) -> dict[str, Any]:
        """Returns what must be the same when a run continues; the budget may be another."""
        facts = asdict(self.privacy) | {"clients_per_round": self.rate}
        del facts["max_epsilon"]
        return facts


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where a private run stands: what its rounds have cost, and what the next one needs.

    Attributes:
        mechanism: What does not change.
        rounds: Rounds whose result was released.
        clip_norm: The norm to which clients clip in the next round.
    """

    mechanism: Mechanism
    rounds: int
    clip_norm: float

    @property
    def epsilon(self) -> float:
        """The cost of all rounds so far together."""
        return self.mechanism.accountant.epsilon(self.rounds)

    def draw(self, clients: Sequence[str]) -> tuple[str, ...]:
        """Draws each client by itself, from the secret stream: sampling protects if it is secret.

        Returns:
            The cohort in the order of ``clients``; it may be empty.

        Raises:
            PrivacyBudgetError: One more round would cost more than the budget.
        """
        self._require_budget()
        chances = self.mechanism.stream.uniform(len(clients)).tolist()
        pairs = zip(clients, chances, strict=True)
        return tuple(client for client, chance in pairs if chance < self.mechanism.rate)

    def fold(self, layout: Layout, start: Tensor) -> PrivateFold:
        """Makes the fold of the next round, with fresh noise; ``start`` is the global model."""
        mechanism = self.mechanism
        noise = mechanism.update_noise * self.clip_norm
        return PrivateFold(layout, start, mechanism.denominator, noise, mechanism.stream)

    def after(self, within: Iterable[bool]) -> Ledger:
        """Counts a round and lets an adaptive clip norm follow.

        Args:
            within: For each accepted client, whether its change was not clipped.
        """
        mechanism, privacy, norm = self.mechanism, self.mechanism.privacy, self.clip_norm
        if privacy.adaptive:
            # Counting +1/2 and -1/2 instead of 1 and 0 halves what one client can change.
            count = math.fsum(0.5 if unclipped else -0.5 for unclipped in within)
            if mechanism.count_noise:
                count += mechanism.count_noise * mechanism.stream.normal(1).item()
            # a part of the clients; noise on few of them may say less than none, or more than all
            part = min(1.0, max(0.0, 0.5 + count / mechanism.denominator))
            norm *= math.exp(-privacy.clip_learning_rate * (part - privacy.target_quantile))
        return Ledger(mechanism, self.rounds + 1, norm)

    def _require_budget(self) -> None:
        budget, next_one = self.mechanism.privacy.max_epsilon, self.rounds + 1
        if budget is None or self.mechanism.accountant.epsilon(next_one) <= budget:
            return
        raise PrivacyBudgetError(
            f"the privacy budget is spent: epsilon is {self.epsilon:.4g} after {self.rounds} "
            f"rounds, one more would make it {self.mechanism.accountant.epsilon(next_one):.4g}, "
            f"above max_epsilon={budget:g}; the model is as after the last round"
        )


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
