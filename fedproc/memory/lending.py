"""New memory that other processes can read where it is: in an arena. Runs in parent and workers.

Code that knows nothing of workers asks here, too; outside a worker it gets ordinary memory.
"""

import threading

import torch

from fedproc.memory.arena import Arena
from fedproc.memory.tensors import INLINE_BYTES


class _Home(threading.local):
    arena: Arena | None = None


_home = _Home()


def lend_from(arena: Arena) -> None:
    """From now on ``lendable`` memory of this thread, which runs a worker, lies in ``arena``."""
    _home.arena = arena


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
