"""A tensor that clients may read and that is loaded by nobody: as it was, before every client.

Runs in workers. A frozen parameter, a buffer of a loss, or a tensor that a module keeps besides its
parameters and buffers: code of a user's may write to it in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fedproc.memory.copying import same_bits

if TYPE_CHECKING:
    from torch import Tensor


class KeptTensor:
    """A tensor, and how it was when this was made."""

    __slots__ = ("_compares", "_facts", "_requires_grad", "_tensor", "_values", "_version")

    def __init__(self, tensor: Tensor, *, loaded: bool, unseen: bool) -> None:
        """Copies the values.

        Args:
            tensor: Where somebody may write to.
            loaded: The values are somebody else's matter: they are not copied.
            unseen: Who writes may leave no trace: by ``.data``, or by NumPy. Values are compared.
        """
        self._tensor = tensor
        self._requires_grad = tensor.requires_grad
        self._values = None if loaded else tensor.detach().clone()
        self._version = tensor._version
        self._compares = unseen and not loaded and _can_be_compared(tensor)
        self._facts = facts_of(tensor) if self._compares else None

    def restore(self) -> None:
        """Makes the tensor what it was, without a gradient, and no part of a graph."""
        tensor = self._tensor
        if tensor.requires_grad is not self._requires_grad:
            tensor.detach_().requires_grad_(self._requires_grad)
        if tensor.is_leaf:
            tensor.grad = None
        if self._values is None:
            return
        if self._compares and facts_of(tensor) != self._facts:
            tensor.data = self._values.clone()
        elif tensor._version != self._version or not self._is_untouched(self._values):
            with torch.no_grad():
                tensor.copy_(self._values)
        self._version = tensor._version

    def _is_untouched(self, values: Tensor) -> bool:
        return not self._compares or same_bits(self._tensor, values)


def facts_of(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    """What ``tensor.data = ...`` may change besides values; strides decide bits of results."""
    return tensor.shape, tensor.stride(), tensor.dtype


def _can_be_compared(tensor: Tensor) -> bool:
    """Whether its bits can be looked at as they lie."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    special = tensor.is_meta or tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    return plain and tensor.layout is torch.strided and not special
