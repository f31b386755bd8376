"""The largest of small integers, found by a sum. Runs in workers and in the parent.

A sum of masked vectors is all the server learns, and a largest value is no sum. It becomes one: a
client whose counter grew by d writes random words at the places 0 … d - 1 and zeros behind. A sum
of random words is zero with probability 2**-64, a sum of zeros always: so the words of the sum
that are not zero say how much the counter of some client grew, and nothing about the others.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

PLACES: Final = 4096
"""How much a counter may grow in one round, and the words that one counter takes."""


def write(growth: Tensor, words: Tensor) -> bool:
    """Writes what a client adds to the sum.

    Args:
        growth: How much each counter grew: int64, shape (counters,).
        words: int64 zeros, shape (counters * PLACES,).

    Returns:
        Whether every counter grew by 0 to PLACES.
    """
    if bool(((growth < 0) | (growth > PLACES)).any()):
        return False
    for row, count in zip(words.view(-1, PLACES), growth.tolist(), strict=True):
        drawn = bytearray(os.urandom(8 * count))
        if count:
            row[:count] = torch.frombuffer(drawn, dtype=torch.int64)
    return True


def read(words: Tensor) -> Tensor:
    """Returns the largest growth of each counter (int64) from the words of the sum."""
    return (words.view(-1, PLACES) != 0).sum(dim=1)
