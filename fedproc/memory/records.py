"""Records of one tensor and plain values, which travel without a table. Runs in parent and workers.

The general way looks at all that is in a value: whether it is a tensor, shares memory with another,
is code. Where a class says that only its first part is a tensor and the rest is plain, one plain
pickle does. That matters for what is sent once in several milliseconds: its code is in no cache by
then, so every instruction counts tenfold.
"""

from collections.abc import Callable
from typing import Any

import torch

_plain: dict[type, Callable[[Any], bool]] = {}
_named: dict[str, type] = {}


def travels_as_record(cls: type[Any], is_plain: Callable[[Any], bool]) -> None:
    """Let values of ``cls`` travel so; both processes import the module that says it.

    Args:
        cls: a tuple whose first part is a tensor, made anew from its parts.
        is_plain: whether the other parts of such a value hold no tensors, pointers or code.
    """
    _plain[cls] = is_plain
    _named[f"{cls.__module__}.{cls.__qualname__}"] = cls


def taken_apart(value: Any) -> tuple[str, torch.Tensor, tuple[Any, ...]] | None:
    """(name of its class, tensor, plain rest) of a record; None of all else."""
    cls = type(value)
    is_plain = _plain.get(cls)
    if is_plain is None or not is_plain(value):
        return None
    tensor: torch.Tensor = value[0]
    if not tensor.is_contiguous() or tensor.requires_grad:
        return None
    return f"{cls.__module__}.{cls.__qualname__}", tensor, tuple(value[1:])


def put_together(name: str, tensor: torch.Tensor, rest: tuple[Any, ...]) -> Any:
    """The record again.

    Raises:
        KeyError: no record has this name.
    """
    return _named[name](tensor, *rest)
