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
        dtype, shape: Of the tensor, whose elements lie one after the other.
    """

    arena: str
    offset: int
    dtype: torch.dtype
    shape: torch.Size

    def read(self) -> Tensor:
        """Returns the tensor, which must not be written to.

        Raises:
            RuntimeError: That memory is not attached to this worker.
        """
        block = Block(self.offset, self.shape.numel() * self.dtype.itemsize)
        return lent_by(self.arena, block).view(self.dtype).view(self.shape)


def places_of(arena: str, *tensors: Tensor) -> list[Elsewhere]:
    """Tells other workers where tensors of this one lie; its arena has the given name.

    Raises:
        RuntimeError: One does not lie there in one piece.
    """
    found = []
    for tensor in tensors:
        offset = offset_of(tensor) if tensor.numel() else 0
        if offset is None or not tensor.is_contiguous():
            raise RuntimeError("rows that others are to read do not lie in shared memory")
        found.append(Elsewhere(arena, offset, tensor.dtype, tensor.shape))
    return found


Rows = Tensor | Elsewhere


def here(rows: Rows) -> Tensor:
    """Returns rows of this worker as they are, and those of another one as a tensor."""
    return rows.read() if isinstance(rows, Elsewhere) else rows
