"""What the rounds of a private run have cost: epsilon at a fixed delta. Runs in the parent.

Rényi differential privacy (Mironov 2017) of the Poisson-sampled Gaussian mechanism (Mironov, Talwar
and Zhang 2019), summed over the rounds and converted by Canonne, Kamath and Steinke (2020),
proposition 12. Two data sets are neighbours if one has one client more. The numbers come from the
library dp-accounting.
"""

from __future__ import annotations

import functools
import logging
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


def require_library() -> tuple[Any, Any]:
    """Imports dp-accounting and its Rényi accountant.

    Raises:
        ImportError: It is not installed, or too old.
    """
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError as error:
        raise ImportError(
            "differential privacy needs the library dp-accounting, version 0.6 or later, which "
            f"computes epsilon: pip install 'fedproc[dp]' ({error})"
        ) from error
    return dp_accounting, rdp


class Accountant:
    """Computes epsilon after a number of equal rounds."""

    def __init__(self, rate: float, noise_multiplier: float, delta: float) -> None:
        """Computes the Rényi divergence of one round, at the orders of the library.

        Args:
            rate: The probability q with which each client takes part in a round.
            noise_multiplier: Standard deviation of the noise on the sum, in units of the most that
                one client can change the sum.
            delta: The probability with which epsilon may not hold.
        """
        self._delta = delta
        self._infinite = noise_multiplier == 0
        if not self._infinite:
            self._orders, self._once = _divergence(rate, noise_multiplier)

    def epsilon(self, rounds: int) -> float:
        """Returns epsilon of ``rounds`` rounds together; infinite without noise."""
        if not rounds:
            return 0.0
        if self._infinite:
            return math.inf
        _, rdp = require_library()
        found, _ = rdp.compute_epsilon(self._orders, rounds * self._once, self._delta)
        return float(found)


@functools.lru_cache(maxsize=64)
def _divergence(rate: float, noise_multiplier: float) -> tuple[Any, Any]:
    """Returns orders and the Rényi divergence of one round at each; a tenth of a second."""
    dp_accounting, rdp = require_library()
    accountant = rdp.RdpAccountant()
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    with _quiet():
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, gaussian))
    return accountant.orders, accountant.rdp


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the library from telling of orders whose series it cannot sum.

    It leaves such an order out, and the least of the others is a bound all the same.
    """
    logger = logging.getLogger("absl")

    def told(record: logging.LogRecord) -> bool:
        return "failed to converge" not in record.getMessage()

    logger.addFilter(told)
    try:
        yield
    finally:
        logger.removeFilter(told)
