"""The random streams of a worker: Python's, NumPy's and torch's. Runs in the worker.

A process owns its global generators. Inline workers share those of the parent, so each takes a
*turn*: it puts its own states in, runs, and puts the parent's back.
"""

import contextlib
import hashlib
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

PATIENCE_SECONDS = 0.05
"""How long an inline worker waits for another's ordinary command before it runs beside it."""


def derive(seed: int, name: str) -> int:
    """A 64-bit seed from the cluster's seed and a worker's name."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    torch.default_generator.manual_seed(seed)


def states() -> tuple[Any, ...]:
    """The states of the three global generators."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def restore(saved: tuple[Any, ...]) -> None:
    """Put back what ``states`` gave."""
    random.setstate(saved[0])
    np.random.set_state(saved[1])
    torch.set_rng_state(saved[2])


class _Stage:
    """Whose states are in the global generators: the process's, or an inline worker's.

    One worker has them at a time. A second one waits; but only a moment for an ordinary command
    (it may itself wait for the second), and then borrows them: it puts its own in for the length
    of its command. Exact results need that nobody borrows from a federated client: for a command
    that is *strict*, everybody waits, and it waits for everybody.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._holders: list[bool] = []

    def enter(self, *, strict: bool) -> None:
        with self._free:
            if strict:
                self._free.wait_for(lambda: not self._holders)
            else:
                self._free.wait_for(lambda: not self._holders, PATIENCE_SECONDS)
                self._free.wait_for(lambda: True not in self._holders)
            self._holders.append(strict)

    def leave(self, *, strict: bool) -> None:
        with self._free:
            self._holders.remove(strict)
            self._free.notify_all()


_STAGE = _Stage()


class Turns:
    """The turns of one inline worker."""

    def __init__(self, seed: int, threads: int) -> None:
        """Start its streams from ``seed``."""
        self._threads = threads
        _STAGE.enter(strict=False)
        saved = states()
        seed_all(seed)
        self._own = states()
        restore(saved)
        _STAGE.leave(strict=False)

    @contextlib.contextmanager
    def turn(self, *, strict: bool = False) -> Iterator[None]:
        """Run with this worker's generators and threads; the process's come back afterwards."""
        _STAGE.enter(strict=strict)
        saved, threads = states(), torch.get_num_threads()
        restore(self._own)
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            self._own = states()
            restore(saved)
            torch.set_num_threads(threads)
            _STAGE.leave(strict=strict)
