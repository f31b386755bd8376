"""Checks of numbers that users pass, with errors that say what would be right.

Runs in the parent, when objects are made, so that no client fails on a bad value later.
"""

from __future__ import annotations

import math
import operator


def require_at_least(name: str, value: object, least: int) -> int:
    """Returns ``value`` if it is an integer >= ``least``.

    Raises:
        ValueError: It is not; bool counts as no integer.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return value


def require_positive(name: str, value: object) -> float:
    """Returns ``value`` if it is a finite number above 0.

    Raises:
        ValueError: It is not; bool counts as no number.
    """
    if not _is_number(value) or not 0 < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def require_fraction(name: str, value: object, below: float = 1.0) -> float:
    """Returns ``value`` if 0 <= ``value`` < ``below``.

    Raises:
        ValueError: It is not; bool counts as no number.
    """
    if not _is_number(value) or not 0 <= value < below:  # type: ignore[operator]
        raise ValueError(f"{name} must be a number from 0 to below {below}, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def require_seed(value: object) -> int:
    """Returns ``value`` as an int.

    Raises:
        ValueError: It is no integer.
    """
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"seed must be an integer, got {value!r}") from None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
