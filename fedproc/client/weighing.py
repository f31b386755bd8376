"""Weighted sums in float64, in torch: each product and each sum is rounded by itself.

What :mod:`fedproc.client.compiled` does not do: values that are not float32, or all of them where
it was not built.

Runs in parent and workers. Multiply and add fused into one operation would round once, and
differently in torch's vector and scalar code: an element's value would depend on its place. But a
product that float64 holds exactly has no rounding to leave out, and one pass over the memory less.
Weights are mostly numbers of rows, and values float32: of 29 and 24 digits the product has 53.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

_SHORT: Final = (torch.float32, torch.float16, torch.bfloat16)
_DIGITS: Final = 29
_FAR: Final = 512  # a power of two that no product of a float32 takes out of float64's range


@functools.lru_cache(maxsize=1024)
def exact_product(weight: float, dtype: torch.dtype) -> bool:
    """Whether ``weight`` times any value of ``dtype`` needs no rounding in float64."""
    digits, exponent = math.frexp(weight)
    return dtype in _SHORT and abs(exponent) < _FAR and math.ldexp(digits, _DIGITS).is_integer()


def add_weighted(
    total: Tensor, values: Tensor, weight: float, room: Tensor, *, exact: bool
) -> None:
    """Does ``total += weight * values``.

    Args:
        total: float64, shape (n,).
        values: Floating, shape (n,), of any device.
        weight: Finite.
        room: float64, shape (n,): overwritten.
        exact: What ``exact_product`` says of this weight and these values.
    """
    room.copy_(values)
    if exact:
        total.add_(room, alpha=weight)
    else:
        total.add_(room.mul_(weight))
