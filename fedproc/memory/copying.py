"""Copying many bytes quickly, and new memory for them. Runs in parent and workers."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedproc.memory import pages
from fedproc.memory.spares import SPARES

SIDE_BY_SIDE_BYTES = 4 << 20
"""From here on a copy is worth threads, and new memory large pages."""
COPIERS = min(4, pages.usable_cores())


def copy_bytes(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy bytes, in pieces side by side when they are many and torch itself has one thread.

    One thread gets about half of a machine's bandwidth.
    """
    if len(source) < SIDE_BY_SIDE_BYTES or torch.get_num_threads() > 1:
        target.copy_(source)
        return
    pieces = zip(target.chunk(COPIERS), source.chunk(COPIERS), strict=True)
    side_by_side(torch.Tensor.copy_, list(pieces))


def side_by_side(work: Callable[..., object], each: Sequence[tuple[Any, ...]]) -> None:
    """Call ``work(*arguments)`` for each of some arguments, all but the first in other threads.

    The threads end here: a worker may be forked by its user, and a pool would not survive that.

    Raises:
        Exception: the first error, once all have ended.
    """
    inference = torch.is_inference_mode_enabled()  # of this thread; others would start without
    errors: list[BaseException] = []

    def run(arguments: tuple[Any, ...]) -> None:
        try:
            with torch.inference_mode(inference):
                work(*arguments)
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            errors.append(error)

    threads: list[threading.Thread] = []
    try:
        for arguments in each[1:]:
            thread = threading.Thread(target=run, args=(arguments,))
            thread.start()
            threads.append(thread)
        run(each[0])
    finally:
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def fresh(nbytes: int) -> torch.Tensor:
    """Private memory nobody else holds (uint8, 1-d, uninitialised), used before where it is large.

    The kernel clears new memory page by page, which costs far more than the copy into it.
    """
    if nbytes >= SIDE_BY_SIDE_BYTES:
        return SPARES.take(nbytes)
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")  # whatever the user's default is
