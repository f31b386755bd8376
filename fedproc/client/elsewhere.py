"""Rows that lie in the memory of another worker, and are read there. Runs in workers.

Nothing is copied: whoever owns the rows keeps them, and what it writes to them is seen. Only
training that copies each batch may read them so: a write would be lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedproc.memory.arena import Block
from fedproc.memory.lending import lent_by, offset_of


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Where a tensor of another worker lies.

    Attributes:
        arena: Name of the memory that worker shares.
        offset: Its first byte there.
        nbytes: How many there are, all of the tensor.
        dtype, shape, stride: Of the tensor.
    """

    arena: str
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        """Returns the tensor, which must not be written to.

        Raises:
            RuntimeError: That memory is not attached to this worker.
        """
        whole = lent_by(self.arena, Block(self.offset, self.nbytes)).view(self.dtype)
        return whole.as_strided(self.shape, self.stride)


def places_of(arena: str, *tensors: Tensor) -> list[Elsewhere]:
    """Tells other workers where tensors of this one lie; its arena has the given name.

    Raises:
        RuntimeError: One does not lie there.
    """
    found = []
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        offset = offset_of(tensor) if nbytes else 0
        if offset is None:
            raise RuntimeError("rows that others are to read do not lie in shared memory")
        shape, stride = tensor.shape, tensor.stride()  # dense: it was sent, by itself
        found.append(Elsewhere(arena, offset, nbytes, tensor.dtype, shape, stride))
    return found


Rows = Tensor | Elsewhere


def here(rows: Rows) -> Tensor:
    """Returns rows of this worker as they are, and those of another one as a tensor."""
    return rows.read() if isinstance(rows, Elsewhere) else rows
