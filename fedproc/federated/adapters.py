"""Rows out of datasets that are more than pairs of tensors: Hugging Face's, torchvision's.

Runs in the parent, and in workers for factories. Knows those libraries by their interface only
and imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedproc.federated.rows import MapDataset, as_rows

Transform = Callable[[Any], Any]


def columns(
    dataset: object,
    inputs: str | int,
    targets: str | int,
    *,
    transform: Transform | None = None,
) -> tuple[Tensor, Tensor]:
    """Takes inputs and targets out of a dataset whose rows have more, or images.

    Args:
        dataset: ``dataset[i]`` is a mapping (Hugging Face) or a tuple (torchvision).
        inputs: Name or place of the inputs in a row.
        targets: Name or place of the targets in a row.
        transform: Applied to the input of every row; None turns images of PIL into tensors with
            :func:`image_tensor`, and leaves all else as it is.

    Returns:
        Inputs (rows, ...) and targets (rows, ...), for :func:`fedproc.federate`, for
        ``evaluate_on``, or as the result of a factory.

    Raises:
        ValueError: Rows have no such part, or are not all of one shape.
    """
    if not isinstance(dataset, MapDataset) or isinstance(dataset, (Mapping, str, bytes)):
        what = type(dataset).__name__
        parts = f": choose one of {list(dataset)}" if isinstance(dataset, Mapping) else ""
        raise ValueError(f"a dataset with len() and rows by number is needed, got {what}{parts}")
    return as_rows(_Pairs(dataset, inputs, targets, transform or _plain))


class _Pairs:
    """Shows a dataset as one of pairs."""

    def __init__(
        self, dataset: MapDataset, inputs: str | int, targets: str | int, transform: Transform
    ) -> None:
        self._dataset = dataset
        self._keys = inputs, targets
        self._transform = transform

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self._dataset[index]
        x, y = (_part(row, key, index) for key in self._keys)
        return self._transform(x), y


def _part(row: Any, key: str | int, index: int) -> Any:
    try:
        return row[key]
    except (KeyError, IndexError, TypeError) as error:
        there = "a " + type(row).__name__
        if isinstance(row, Mapping):
            there = f"{list(row)}"
        elif isinstance(row, Sequence):
            there = f"{len(row)} parts"
        raise ValueError(f"row {index} of the dataset has no {key!r}; it has {there}") from error


def image_tensor(image: Any) -> Tensor:
    """Turns an image into float32 of shape (channels, height, width), from 0 to 1.

    Args:
        image: Of PIL, or an array (height, width) or (height, width, channels); integers are
            divided by the largest value of their type, as torchvision's ``ToTensor`` does for
            bytes.
    """
    array = np.asarray(image)
    if array.ndim not in (2, 3):
        raise ValueError(f"an image has 2 or 3 dimensions, got the shape {array.shape}")
    channels = array[:, :, np.newaxis] if array.ndim == 2 else array
    # a copy: torch shares only memory that it may write to, and an image's it may not
    values = torch.from_numpy(np.array(channels.transpose(2, 0, 1), order="C"))
    if values.dtype is torch.bool or values.is_floating_point():
        return values.float()
    return values.float().div_(torch.iinfo(values.dtype).max)


def _plain(value: Any) -> Any:
    # an image of PIL, or one that looks like it
    is_image = hasattr(value, "getbands") and hasattr(value, "__array_interface__")
    return image_tensor(value) if is_image else value
