"""How tensors that have no place in the table of a message are pickled: sparse ones, mostly.

Runs in parent and worker. Torch's own way forgets that a tensor is a leaf, and keeps every sparse
tensor that it loads in a list (``torch._utils._sparse_tensors_to_validate``) until ``torch.load``
is called: its memory is never free again.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

_COMPRESSED = (torch.sparse_csr, torch.sparse_bsr)
"""Layouts whose rows are compressed; in the other two it is the columns."""


def reduced(tensor: torch.Tensor) -> Any:
    """What ``reducer_override`` returns for a tensor."""
    if tensor.requires_grad and tensor.is_leaf:
        return _leaf, (tensor.detach(), tensor.grad)
    values = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        parts = values._indices(), values._values()
        return coo, (*parts, tuple(tensor.shape), tensor.is_coalesced())
    if tensor.layout in (*_COMPRESSED, torch.sparse_csc, torch.sparse_bsc):
        by_rows = tensor.layout in _COMPRESSED
        indices = values.crow_indices() if by_rows else values.ccol_indices()
        others = values.col_indices() if by_rows else values.row_indices()
        name = str(tensor.layout).removeprefix("torch.")
        return _compressed, (indices, others, values.values(), tuple(tensor.shape), name)
    return NotImplemented


def _leaf(values: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
    values.requires_grad_().grad = grad
    return values


def coo(indices: Any, values: Any, shape: Any, is_coalesced: Any) -> torch.Tensor:
    """The sparse tensor of these parts, which were one: nothing is looked at again."""
    return torch.sparse_coo_tensor(
        indices, values, shape, check_invariants=False, is_coalesced=is_coalesced, device="cpu"
    )


def _compressed(indices: Any, others: Any, values: Any, shape: Any, name: str) -> torch.Tensor:
    return torch.sparse_compressed_tensor(
        indices,
        others,
        values,
        shape,
        layout=getattr(torch, name),
        check_invariants=False,
        device="cpu",
    )


REDUCERS: Mapping[type, Callable[[Any], Any]] = {torch.Tensor: reduced}
"""For an ``Encoder``."""
