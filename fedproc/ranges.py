"""Checks of numbers that users pass, with errors that say what would be right.

Runs in the parent, when objects are made, so that nothing fails on a bad value later. Numbers of
NumPy are numbers, bool is none; what is returned is Python's own.
"""

from __future__ import annotations

import math
import numbers
import operator
import time
from collections.abc import Callable


def as_whole(value: object) -> int | None:
    """``value`` as an int; None if it is no whole number."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]  # whether it is one, is the question
    except TypeError:
        return None


def as_real(value: object) -> float | None:
    """``value`` as a float; None if it is no real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an int, or a fraction of two
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def require_whole(name: str, value: object) -> int:
    """``value`` as an int.

    Raises:
        ValueError: It is no whole number.
    """
    number = as_whole(value)
    if number is None:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return number


def require_at_least(name: str, value: object, least: int) -> int:
    """``value`` as an int >= ``least``.

    Raises:
        ValueError: It is no such number.
    """
    number = as_whole(value)
    if number is None or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number


def require_count_or_none(name: str, value: object) -> int | None:
    """``value`` as an int of at least 1, or None.

    Raises:
        ValueError: It is neither.
    """
    number = None if value is None else as_whole(value)
    if value is not None and (number is None or number < 1):
        raise ValueError(f"{name} must be a whole number of at least 1, or None, got {value!r}")
    return number


def require_positive(name: str, value: object) -> float:
    """``value`` as a finite float above 0.

    Raises:
        ValueError: It is no such number.
    """
    return _real(name, value, "a finite number above 0", lambda n: 0 < n < math.inf)


def require_not_negative(name: str, value: object) -> float:
    """``value`` as a finite float of at least 0.

    Raises:
        ValueError: It is no such number.
    """
    return _real(name, value, "a finite number of at least 0", lambda n: 0 <= n < math.inf)


def require_fraction(name: str, value: object, below: float = 1.0) -> float:
    """``value`` as a float, 0 <= ``value`` < ``below``.

    Raises:
        ValueError: It is no such number.
    """
    return _real(name, value, f"a number from 0 to below {below}", lambda n: 0 <= n < below)


def require_seconds(name: str, value: object) -> float:
    """``value`` as a float above 0; infinity is.

    Raises:
        ValueError: It is no such number.
    """
    return _real(name, value, "a number of seconds above 0", lambda n: n > 0)  # NaN is not


def _real(name: str, value: object, what: str, fits: Callable[[float], bool]) -> float:
    number = as_real(value)
    if number is None or not fits(number):
        raise ValueError(f"{name} must be {what}, got {value!r}")
    return number


def require_switch(name: str, value: object) -> bool:
    """``value``, if it is True or False.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def settle(record: object, check: Callable[..., object], *names: str, **limits: float) -> None:
    """Put what ``check`` makes of them in the place of fields of a frozen record."""
    for name in names:
        object.__setattr__(record, name, check(name, getattr(record, name), **limits))


def deadline_of(timeout: object) -> float | None:
    """When a limit of seconds from now is over, in seconds of ``time.monotonic``; None: never.

    Raises:
        ValueError: it is neither a number nor None.
    """
    if timeout is None:
        return None
    seconds = as_real(timeout)
    if seconds is None or math.isnan(seconds):
        raise ValueError(f"timeout must be a number of seconds, or None, not {timeout!r}")
    return time.monotonic() + seconds
