"""Random streams of one client, derived from names and never from where it runs.

Runs in worker processes; an inline worker runs it in a thread of the parent, so the streams of
the process are borrowed and given back. May assume that nobody else draws from them meanwhile:
a process worker runs one command at a time, and inline workers take turns.
"""

from __future__ import annotations

import random
from contextlib import contextmanager, nullcontext
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


def derive_seed(*parts: int | str) -> int:
    """Hashes names and numbers to a seed; different tuples give unrelated seeds.

    Sums such as ``seed + client`` collide across runs and clients; a hash does not.

    Args:
        *parts: What the stream is for, such as (seed, round, client, purpose).

    Returns:
        An integer in [0, 2**63).
    """
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*parts: int | str) -> torch.Generator:
    """Makes a CPU generator seeded from ``parts``, see :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@contextmanager
def preserved_streams(device: torch.device, *, torch_only: bool = False) -> Iterator[None]:
    """Gives the streams of Python, NumPy and torch back after a block as they were before.

    Args:
        device: The device of the computation; its stream counts too if it is not the CPU.
        torch_only: Nobody draws from the others: saving them takes longer than training a row.
    """
    python = None if torch_only else random.getstate()
    numpy = None if torch_only else np.random.get_state()  # noqa: NPY002 - the global stream itself
    cpu = torch.default_generator.get_state()
    accelerator = _accelerator(device)
    other = None if accelerator is None else accelerator.get_rng_state(device)
    try:
        yield
    finally:
        if python is not None and numpy is not None:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002 - the global stream itself
        torch.default_generator.set_state(cpu)
        if accelerator is not None:
            accelerator.set_rng_state(other, device)


def seed_streams(seed: int, device: torch.device, *, torch_only: bool = False) -> None:
    """Seeds the streams of Python, NumPy and torch, and that of ``device``.

    Args:
        seed: An integer in [0, 2**63), from :func:`derive_seed`.
        device: The device of the computation.
        torch_only: Nobody draws from the others.
    """
    if not torch_only:
        random.seed(seed)
        np.random.seed(seed & 0xFFFF_FFFF)  # noqa: NPY002 - the global stream itself
    torch.default_generator.manual_seed(seed)
    accelerator = _accelerator(device)
    if accelerator is not None:
        # manual_seed means the current device, which need not be this worker's
        with getattr(accelerator, "device", nullcontext)(device):
            accelerator.manual_seed(seed)


def _accelerator(device: torch.device) -> Any:
    return None if device.type == "cpu" else torch.get_device_module(device)


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Limits torch to ``threads`` threads for a block; None leaves the number as it is."""
    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
