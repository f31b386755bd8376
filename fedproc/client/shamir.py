"""Shamir's secret sharing: any ``threshold`` shares give the secret, fewer say nothing about it.

Runs in workers (who split) and in the parent (who combines). A. Shamir, "How to Share a Secret",
1979: the secret is f(0) of a random polynomial f of degree threshold - 1 over a prime field, a
share is one point of it.
"""

from __future__ import annotations

import secrets
from functools import lru_cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33
PRIME: Final = 2**256 + 297
"""The smallest prime above every secret of 32 bytes."""


def split(secret: bytes, threshold: int, points: int) -> list[bytes]:
    """Makes the shares at the points 1, 2, …, ``points``.

    Args:
        secret: 32 bytes.
        threshold: How many shares give the secret back, 1 to ``points``.
        points: How many shares to make.

    Returns:
        Shares of 33 bytes; the share of point x is at place x - 1.

    Raises:
        ValueError: The secret has another length, or the threshold cannot be reached.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, this one has {len(secret)}")
    if not 1 <= threshold <= points:
        raise ValueError(f"{points} shares cannot have a threshold of {threshold}")
    # highest power first; all coefficients but the last, which is the secret, are random
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "big"))
    return [_value(coefficients, x).to_bytes(SHARE_BYTES, "big") for x in range(1, points + 1)]


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Computes the secret from shares, given as point -> share.

    Raises:
        ValueError: There are fewer than ``threshold``, or they are not shares of one secret.
    """
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares, {threshold} are needed")
    points = tuple(sorted(shares)[:threshold])
    weights = _weights_at_zero(points)
    total = sum(
        weight * int.from_bytes(shares[point], "big")
        for point, weight in zip(points, weights, strict=True)
    )
    secret = total % PRIME
    if secret >= 1 << (8 * SECRET_BYTES):
        raise ValueError("these are not shares of one secret")
    return secret.to_bytes(SECRET_BYTES, "big")


def _value(coefficients: list[int], x: int) -> int:
    """Evaluates a polynomial by Horner's rule."""
    value = 0
    for coefficient in coefficients:
        value = (value * x + coefficient) % PRIME
    return value


@lru_cache(maxsize=8)
def _weights_at_zero(points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights: f(0) is the sum of weight times f(point)."""
    weights = []
    for x in points:
        above, below = 1, 1
        for other in points:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
