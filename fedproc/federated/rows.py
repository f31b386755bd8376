"""What users have as data, as two tensors: inputs and targets, one row each.

Runs in the parent, and in workers for the results of factories.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

# What the column of targets is called, of two; the other one is the inputs.
_TARGET_NAMES: Final = frozenset({"label", "labels", "target", "targets", "y"})
_NO_ROWS: Final = frozenset({torch.uint16, torch.uint32, torch.uint64})


@runtime_checkable
class MapDataset(Protocol):
    """A map-style dataset: ``dataset[i]`` for i from 0 to ``len(dataset)`` - 1."""

    def __len__(self) -> int:
        """Returns the number of rows."""

    def __getitem__(self, index: int, /) -> Any:
        """Returns a pair (x, y), or a mapping of two, one of them called "label" or "target"."""


def as_rows(data: object) -> tuple[Tensor, Tensor]:
    """Turns data into inputs (rows, ...) and targets (rows, ...).

    A list or tuple of pairs is a dataset with one row per pair. One of two elements can mean both:
    it is the pair (x, y) if its elements are arrays or can be made into arrays, as those of
    ``[[a, b], [c, d]]`` with numbers can: x is [a, b], and y is [c, d]. Only where they cannot, as
    in ``[(image, label), (image, label)]``, is it two rows.

    Args:
        data: A pair of tensors or arrays, or a map-style dataset of pairs, such as a list of them.

    Returns:
        Two detached CPU tensors; tensors and arrays are shared with the caller where possible.

    Raises:
        ValueError: Not such data, or inputs and targets of unlike length.
    """
    if isinstance(data, (tuple, list)):
        x, y = _listed(data)
    elif isinstance(data, torch.utils.data.TensorDataset) and len(data.tensors) == 2:
        x, y = (tensor.detach().cpu() for tensor in data.tensors)
    elif isinstance(data, MapDataset) and not isinstance(data, (Mapping, Tensor, np.ndarray)):
        x, y = _stacked(data)
    else:
        raise ValueError(
            "data must be a pair (x, y) of tensors or arrays, or a map-style dataset of such "
            f"pairs, got {type(data).__name__}"
        )
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise ValueError(
            "inputs and targets must have one row each per example, got shapes "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    for name, tensor in (("x", x), ("y", y)):
        if tensor.dtype in _NO_ROWS:
            raise ValueError(
                f"{name} is of {tensor.dtype}, of which torch cannot pick rows: give {name}.long() "
                "or, of images, a tensor of floats"
            )
    return x, y


def rows_of(clients: Mapping[str, object]) -> dict[str, tuple[Tensor, Tensor]]:
    """Turns the data of every client into its rows, as :func:`as_rows` does.

    Raises:
        ValueError: Some client has no such data; it is named.
    """
    found = {}
    for client, data in clients.items():
        try:
            found[client] = as_rows(data)
        except ValueError as error:
            raise ValueError(f"client {client!r}: {error}") from error
    return found


def _listed(data: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Turns a pair, or a list of rows that are pairs, into inputs and targets."""
    rows = bool(data) and all(isinstance(row, (tuple, list)) and len(row) == 2 for row in data)
    if len(data) != 2:
        if rows:
            return _stacked(data)
        raise ValueError(
            f"data must be a pair (x, y) or a list of pairs, one per row; got {len(data)} parts"
        )
    try:
        x, y = (_as_tensor(part) for part in data)
    except (ValueError, TypeError, RuntimeError):  # numpy cannot make an array of it
        if not rows:
            raise
        with contextlib.suppress(ValueError):
            return _stacked(data)
        raise  # no rows either: what is wrong with it as a pair says more
    return x, y


def _as_tensor(part: object) -> Tensor:
    if isinstance(part, Tensor):
        return part.detach().cpu()
    array = np.asarray(part)
    if array.dtype.kind not in "biufc":
        raise ValueError(f"inputs and targets must be numbers, got an array of {array.dtype}")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    # torch shares only memory that it may write to and that runs forward
    usable = native.flags.writeable and all(stride >= 0 for stride in native.strides)
    return torch.from_numpy(native if usable else native.copy())


def _stacked(dataset: MapDataset) -> tuple[Tensor, Tensor]:
    if len(dataset) == 0:
        raise ValueError("the dataset has no rows")
    pairs = [_pair(dataset[index], index) for index in range(len(dataset))]
    try:
        return _stack([x for x, _ in pairs]), _stack([y for _, y in pairs])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the rows of the dataset do not all have one shape: {error}") from error


def _pair(row: object, index: int) -> Sequence[Any]:
    values = _named_pair(row) if isinstance(row, Mapping) else row
    if not isinstance(values, (tuple, list)) or len(values) != 2:
        raise ValueError(
            f"row {index} of the dataset is not a pair (x, y) but a {type(row).__name__}; choose "
            "two columns with fedproc.columns(dataset, inputs, targets)"
        )
    return values


def _named_pair(row: Mapping[Any, Any]) -> Sequence[Any]:
    """Takes two columns by name: their order in a row is an accident. Anything else is no pair."""
    targets = [name for name in row if name in _TARGET_NAMES]
    if len(row) != 2 or len(targets) != 1:
        return ()
    (inputs,) = row.keys() - targets
    return row[inputs], row[targets[0]]


def _stack(values: Sequence[Any]) -> Tensor:
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([_as_tensor(value) for value in values])
    return _as_tensor(np.stack([np.asarray(value) for value in values]))
