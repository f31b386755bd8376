"""The compiled way of forming weighted sums of float32 values, where it was built.

Runs in parent and workers. ``_sums.c`` is compiled when fedproc is installed. It is optional: where
there was no C compiler, callers go the way of :mod:`fedproc.client.weighing`, in torch, which gives
the same bits and takes several times as long. So does everything that is not float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

try:
    from fedproc.client import _sums
except ImportError:  # not built
    _sums = None  # type: ignore[assignment]

COMPILED: Final = _sums is not None
"""Whether this installation has the compiled sums."""

# Elements of a mean that one call forms: long enough that calling costs nothing, short enough that
# Ctrl-C is heard and that threads end together on a machine that has other things to do as well.
# New memory comes in pages of 2 MiB: two threads that meet in one both clear it, and one of them
# for nothing. So where there are enough of them, a piece is as long as a page.
_PIECE: Final = 1 << 16
_PAGE: Final = 1 << 19


def fits(values: Tensor) -> bool:
    """Whether the compiled sums are there and can read ``values`` as they lie.

    ``values``: a vector (n,), or vectors that are the rows of a matrix (m, n).
    """
    return (
        COMPILED
        and values.dtype is torch.float32
        and type(values) is Tensor  # others may keep their numbers elsewhere
        and values.is_cpu
        and values.layout is torch.strided
        and values.is_contiguous()
        and not values.is_neg()  # its memory holds the negative of its values
        and values.data_ptr() % values.itemsize == 0
    )


def pieces(count: int) -> range:
    """Where the pieces of a mean of ``count`` elements begin; its step is their length."""
    return range(0, count, _PAGE if count >= 4 * _PAGE else _PIECE)


def add(
    total: Tensor, values: Sequence[Tensor] | Tensor, weights: Sequence[float], *, first: bool
) -> None:
    """Does ``total += w0 * y0``, ``total += w1 * y1`` and so on.

    Args:
        total: float64, shape (n,), contiguous, on the CPU.
        values: At least one, each such that ``fits`` says yes, of the shape of ``total``; a matrix
            is its rows.
        weights: One for each; finite.
        first: Nothing was added yet: ``total`` begins with 0.0, what it holds is not read.

    Raises:
        ValueError: The tensors differ in length, the weights in number, or ``total`` is not as
            described.
    """
    count = total.numel()
    if not (total.dtype is torch.float64 and total.is_cpu and total.is_contiguous()):
        raise ValueError(f"no float64 vector of {count} elements on the CPU, side by side")
    addresses = _addresses(values, count)
    if count:
        _sums.add(total.data_ptr(), addresses, tuple(weights), count, first)


def mean_into(
    mean: Tensor,
    values: Sequence[Tensor],
    weights: Sequence[float],
    whole: float,
    first: int,
    size: int,
) -> None:
    """Writes ``(w0 y0 + w1 y1 + ...) / whole`` into one piece of ``mean``.

    Args:
        mean: float32, shape (n,); ``fits`` says yes.
        values: At least one, each of that shape, such that ``fits`` says yes.
        weights: One for each; finite.
        whole: What the sums are divided by.
        first: Where the piece begins, see ``pieces``.
        size: Its elements; the last one may be shorter.

    Raises:
        ValueError: The tensors differ in length, the weights in number, or there is no such piece.
    """
    count = mean.numel()
    stop, addresses = min(first + size, count), _addresses(values, count)
    _sums.mean(mean.data_ptr(), addresses, tuple(weights), whole, first, stop)


def _addresses(values: Sequence[Tensor] | Tensor, count: int) -> tuple[int, ...]:
    if isinstance(values, Tensor):
        if values.shape[1:] != (count,):
            raise ValueError(f"the rows of {tuple(values.shape)} have not {count} elements")
        start, row = values.data_ptr(), count * values.itemsize
        return (
            tuple(range(start, start + len(values) * row, row)) if row else (start,) * len(values)
        )
    if any(value.numel() != count for value in values):
        raise ValueError(f"not all vectors have the {count} elements of the sums")
    return tuple(value.data_ptr() for value in values)
