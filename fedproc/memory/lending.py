"""Memory that other processes read where it is: in an arena. Runs in parent and workers.

Code that knows nothing of workers asks here, too; outside a worker it gets ordinary memory.
"""

import threading
from collections.abc import Mapping

import torch

from fedproc.memory.arena import Arena, Block, Mapped
from fedproc.memory.tensors import INLINE_BYTES


class _Home(threading.local):
    arena: Arena | None = None
    mapped: Mapping[str, Mapped] | None = None


_home = _Home()


def lend_from(arena: Arena, mapped: Mapping[str, Mapped]) -> None:
    """From now on ``lendable`` memory of this thread, which runs a worker, lies in ``arena``.

    Args:
        arena: of the worker.
        mapped: arenas of other processes that are attached to it, by name.
    """
    _home.arena, _home.mapped = arena, mapped


def lendable(nbytes: int) -> torch.Tensor:
    """New memory (uint8, 1-d); what is small travels in a message and needs no arena.

    Other processes can read it from now on: not for what must not be seen. It may hold what lay
    there before: whoever asks for it writes all of it.

    Raises:
        ArenaFullError: there is no room for it.
    """
    return room_in(_home.arena, nbytes)


def room_in(arena: Arena | None, nbytes: int) -> torch.Tensor:
    """Such memory in an arena of this process, if there is one; errors as of ``lendable``."""
    if arena is None or nbytes < INLINE_BYTES:
        return torch.zeros(nbytes, dtype=torch.uint8, device="cpu")
    return torch.from_numpy(arena.lease(arena.allocate(nbytes)))


def offset_of(tensor: torch.Tensor) -> int | None:
    """Where a tensor starts in the arena of this worker, in bytes; None: it lies elsewhere."""
    return None if _home.arena is None else _home.arena.offset_of(tensor.data_ptr())


def lent_by(arena: str, block: Block) -> torch.Tensor:
    """Memory (uint8, 1-d) of another process, whose writes are seen; to be read only.

    It stays valid when that process ends.

    Raises:
        RuntimeError: that arena is not attached to this worker.
    """
    mapped = (_home.mapped or {}).get(arena)
    if mapped is None:
        raise RuntimeError(f"the shared memory {arena!r} is not attached to this worker")
    return torch.from_numpy(mapped.view(block))
