"""Clipping: a client's change of the model, cut to an L2 norm before it leaves its worker.

Runs in worker processes, after the training of one client, so the parent never holds what was not
clipped. McMahan et al., "Learning Differentially Private Recurrent Language Models", 2018.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from fedproc.client.layout import Layout, Slot

# Pieces that torch sums in one thread: the norm has the same bits for any number of threads.
_PIECE: Final = 1 << 15
# The norm is a rounded number, so the factor is a little smaller than the quotient: more than all
# roundings together, far less than anybody can see.
_MARGIN: Final = 1.0 - 2.0**-40
_BITS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def clip_update(layout: Layout, start: Sequence[Tensor], slot: Slot, clip_norm: float) -> bool:
    """Makes a trained model the clipped change of it, in place.

    The trained sections of ``slot`` become d * min(1, clip_norm / ||d||), d = trained - start. One
    norm over all of them, in float64; every value is rounded towards zero to the dtype of its
    parameter, so the L2 norm of what leaves is at most ``clip_norm``. Buffers become zero: nothing
    of them leaves.

    Args:
        layout: The form of the model.
        start: The global model, as :meth:`fedproc.client.layout.Layout.pieces` lists it; read only.
        slot: The trained model, finite; becomes the clipped change.
        clip_norm: The largest norm.

    Returns:
        Whether the norm of the change was at most ``clip_norm``.

    Raises:
        FloatingPointError: The change is too large for float64.
    """
    squares = []
    for before, after in _pieces(layout, start, slot):
        change = after.double() - before.double()
        squares.append(torch.dot(change, change).item())
    norm = math.sqrt(math.fsum(squares))
    if not math.isfinite(norm):
        raise FloatingPointError("the norm of the update is not finite")
    within = norm <= clip_norm
    factor = 1.0 if within else clip_norm / norm * _MARGIN
    for before, after in _pieces(layout, start, slot):
        _round_towards_zero((after.double() - before.double()).mul_(factor), after)
    for section, values in zip(layout.sections, slot, strict=True):
        if section.kind != "trained":
            values.zero_()
    return within


def _pieces(layout: Layout, start: Sequence[Tensor], slot: Slot) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the trained parameters before and after, in pieces."""
    befores = iter(start)  # trained sections come first
    for section, values in zip(layout.sections, slot, strict=True):
        if section.kind == "trained":
            for after in torch.split(values, [entry.numel for entry in section.entries]):
                before = next(befores).reshape(-1)
                yield from zip(torch.split(before, _PIECE), torch.split(after, _PIECE), strict=True)


def _round_towards_zero(values: Tensor, out: Tensor) -> None:
    """Casts float64 ``values`` into ``out`` without making any of them larger."""
    out.copy_(values)
    grown = out.double().abs() > values.abs()
    # One less, as an integer, is the next float towards zero, for both signs and from infinity too.
    bits = out.view(_BITS[out.element_size()])
    bits.sub_(grown.to(bits.dtype))
