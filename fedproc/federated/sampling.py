"""The cohort of a round, drawn from (seed, round) alone.

Runs in the parent. Does not depend on workers, arrival or earlier rounds, so a resumed run draws
what an uninterrupted one would have drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedproc.client.seeding import derive_seed
from fedproc.ranges import as_real, as_whole

if TYPE_CHECKING:
    from collections.abc import Sequence


def cohort_size(clients_per_round: object, population: int) -> int:
    """Computes how many clients a round draws.

    Args:
        clients_per_round: A fraction (float) in (0, 1], or a count (int) in 1…population.
        population: Number of clients.

    Returns:
        ``max(1, round(fraction * population))``, or the count.

    Raises:
        ValueError: Anything else, bool included.
    """
    count, fraction = as_whole(clients_per_round), as_real(clients_per_round)
    if count is not None and 1 <= count <= population:
        return count
    if count is None and fraction is not None and 0.0 < fraction <= 1.0:
        return max(1, round(fraction * population))
    raise ValueError(
        "clients_per_round must be a float in (0, 1] or an int from 1 to the number of clients "
        f"({population}), got {clients_per_round!r}"
    )


def draw_cohort(clients: Sequence[str], size: int, seed: int, round_number: int) -> tuple[str, ...]:
    """Draws ``size`` clients without replacement, in the order of ``clients``."""
    if size == len(clients):
        return tuple(clients)
    rng = np.random.default_rng(derive_seed(seed, round_number, "cohort"))
    chosen = np.sort(rng.choice(len(clients), size=size, replace=False))
    return tuple(clients[index] for index in chosen)
