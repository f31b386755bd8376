"""Copying many bytes quickly, and new memory for them. Runs in parent and workers."""

import threading

import torch

from fedproc.memory import pages

SIDE_BY_SIDE_BYTES = 4 << 20
"""From here on a copy is worth threads, and new memory large pages."""
COPIERS = min(4, pages.usable_cores())


def copy_bytes(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy bytes, in pieces side by side when they are many and torch itself has one thread.

    One thread gets about half of a machine's bandwidth. The helping threads end here: a worker may
    be forked by its user, and a pool would not survive that.
    """
    if len(source) < SIDE_BY_SIDE_BYTES or torch.get_num_threads() > 1:
        target.copy_(source)
        return
    pieces = list(zip(target.chunk(COPIERS), source.chunk(COPIERS), strict=True))
    threads = [threading.Thread(target=torch.Tensor.copy_, args=piece) for piece in pieces[1:]]
    for thread in threads:
        thread.start()
    pieces[0][0].copy_(pieces[0][1])
    for thread in threads:
        thread.join()


def fresh(nbytes: int) -> torch.Tensor:
    """New private memory (uint8, 1-d, uninitialised), in large pages where the system has them.

    The kernel clears new memory page by page, which costs far more than the copy into it.
    """
    target = torch.empty(nbytes, dtype=torch.uint8)
    if nbytes >= SIDE_BY_SIDE_BYTES:
        pages.prefer_large(target.data_ptr(), nbytes)
    return target
