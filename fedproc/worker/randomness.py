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


class Turns:
    """The turns of one inline worker: its states, while others have the generators."""

    def __init__(self, seed: int, threads: int) -> None:
        """Start its streams from ``seed``."""
        self.threads = threads
        self.states: tuple[Any, ...] | None = None  # at its first turn: not while another has one
        self._seed = seed

    @contextlib.contextmanager
    def turn(self, *, strict: bool = False) -> Iterator[None]:
        """Run with this worker's generators and threads; the process's come back afterwards."""
        _STAGE.enter(self, strict=strict)
        try:
            yield
        finally:
            _STAGE.leave(self)

    def resume(self) -> None:
        """Put its states and threads into the process."""
        if self.states is None:
            seed_all(self._seed)
        else:
            restore(self.states)
        torch.set_num_threads(self.threads)


class _Stage:
    """Whose states are in the global generators: the process's, or an inline worker's.

    One worker has them at a time. A second one waits; but only a moment for an ordinary command
    (it may itself wait for the second), and then borrows them: it puts its own in for the length
    of its command. Whoever had them draws from the borrower's streams meanwhile, and has its own
    back afterwards, as has the process after the last, in whatever order they end. Exact results
    need that nobody borrows from a federated client: for a command that is *strict*, everybody
    waits, and it waits for everybody.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._holders: list[Turns] = []  # the last one has the generators
        self._strict = False
        self._process: tuple[tuple[Any, ...], int] | None = None

    def enter(self, turns: Turns, *, strict: bool) -> None:
        with self._free:
            if strict:
                self._free.wait_for(lambda: not self._holders)
            else:
                self._free.wait_for(lambda: not self._holders, PATIENCE_SECONDS)
                self._free.wait_for(lambda: not self._strict)
            if self._holders:
                self._holders[-1].states = states()
            else:
                self._process = states(), torch.get_num_threads()
            self._holders.append(turns)
            self._strict = strict
            turns.resume()

    def leave(self, turns: Turns) -> None:
        with self._free:
            had_them = self._holders[-1] is turns
            self._holders.remove(turns)
            self._strict = False
            if had_them:
                turns.states = states()
                self._give_back()
            self._free.notify_all()

    def _give_back(self) -> None:
        if self._holders:
            self._holders[-1].resume()
            return
        assert self._process is not None
        saved, threads = self._process
        restore(saved)
        torch.set_num_threads(threads)


_STAGE = _Stage()
