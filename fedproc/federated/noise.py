"""Random numbers nobody can predict or repeat: for noise and for who takes part. In the parent.

The seed of a run is public: who knows it could compute the noise and subtract it. So these numbers
come from a secret key, new in every process and never written anywhere.
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import Final

import numpy as np
import torch
from torch import Tensor

# Numbers made at once: bounds the memory besides the result.
_PIECE: Final = 1 << 16
_KEY_BYTES: Final = 32
# Terms of one normal number; a sum of several, as in Opacus' secure mode.
_TERMS: Final = 4


class SecretStream:
    """A stream of SHAKE-256(key, counter): an extendable hash, here a keyed generator of bytes."""

    def __init__(self, key: bytes | None = None) -> None:
        """Takes 32 bytes from the operating system; tests give a key, nobody else should."""
        self._key = os.urandom(_KEY_BYTES) if key is None else key
        self._counter = 0

    def uniform(self, count: int) -> Tensor:
        """Returns numbers in (0, 1), multiples of 2^-54: float64, shape (count,)."""
        return torch.from_numpy(self._uniform(count))

    def normal(self, count: int) -> Tensor:
        """Returns numbers of the standard normal distribution: float64, shape (count,).

        Box-Muller gives a normal number whose low bits can tell which uniform ones it came from
        (Mironov 2012), so each number is the sum of four, divided by two: then that search costs
        2^159 steps (Holohan and Braghin, "Secure Random Sampling in Differential Privacy", 2021).
        """
        result = np.empty(count, dtype=np.float64)
        for start in range(0, count, _PIECE):
            piece = result[start : start + _PIECE]
            piece[:] = self._box_muller(len(piece))
            for _ in range(_TERMS - 1):
                piece += self._box_muller(len(piece))
            piece /= math.sqrt(_TERMS)
        return torch.from_numpy(result)

    def _box_muller(self, count: int) -> np.ndarray:
        half = -(-count // 2)
        u = self._uniform(2 * half)
        radius = np.sqrt(-2.0 * np.log(u[:half]))
        angle = 2.0 * math.pi * u[half:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def _uniform(self, count: int) -> np.ndarray:
        self._counter += 1
        message = self._key + self._counter.to_bytes(8, "little")
        words = np.frombuffer(hashlib.shake_256(message).digest(8 * count), dtype="<u8")
        return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
