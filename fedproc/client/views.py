"""Which tensors of a captured computation show the memory of others. Runs in workers.

Stacked models are split, reshaped and transposed by ten operations before they meet the rows, and
each of those costs as much as a small product. Where the inputs alone decide how tensors lie in
memory, a chain of such operations is one view of the first tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch._ops import OpOverload

_aten = torch.ops.aten
_TRIALS: Final = 4


class Views:
    """The tensors of a computation, in the order in which they are made; all are kept alive."""

    def __init__(self, inputs: Sequence[Tensor], *, turns: bool) -> None:
        """Knows the inputs, whose form is the same in every replay.

        ``turns``: copies of transposed products may be found, see :meth:`turned`.
        """
        self._turns = turns
        # Known tensors may come to lie otherwise (``parameter.data = ...``), and what is computed
        # of them with them: of those nothing is noted.
        self._formed = set(map(id, inputs))
        self._roots: dict[int, Tensor] = {}  # id of a view -> the tensor whose memory it shows
        self._products: dict[int, tuple[Tensor, Tensor]] = {}  # id of a product -> its factors

    def note(
        self, func: OpOverload[..., Any], given: Sequence[Tensor], made: Sequence[Tensor]
    ) -> Tensor | None:
        """Takes in an operation.

        Returns:
            The tensor in whose memory all that was ``made`` lies, if that is all there is to it.
        """
        if func._schema.is_mutable:
            self._products.clear()  # a factor may be another one now
        if not all(id(tensor) in self._formed for tensor in given):
            return None
        self._formed.update(map(id, made))
        if func is _aten.bmm.default:
            self._products[id(made[0])] = given[0], given[1]
        if len(given) != 1 or not made or func._schema.is_mutable:
            return None
        if not all(_shares(given[0], tensor) for tensor in made):
            return None
        root = self._roots.get(id(given[0]), given[0])
        self._roots.update((id(tensor), root) for tensor in made)
        return root

    def turned(
        self, source: Tensor, copy: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """Finds the product that a contiguous copy of ``source`` is.

        Copying a transposed product takes longer than forming it. The transposes of its factors
        give it at once, though not for all shapes with the same bits: that is tried with random
        numbers. A trial is no proof, so it is not for what must have the bits of another way.

        Returns:
            The transposes in the order in which they are multiplied, and in whose memory each lies.
        """
        product = self._roots.get(id(source)) if self._turns else None
        factors = None if product is None else self._products.get(id(product))
        if product is None or factors is None or not copy.is_contiguous():
            return None
        if (source.shape, source.stride()) != (product.mT.shape, product.mT.stride()):
            return None
        left, right = factors
        turned = right.mT, left.mT
        if not torch.equal(torch.bmm(*turned), copy) or not _have_equal_bits(left, right):
            return None
        return turned, (self._roots.get(id(right), right), self._roots.get(id(left), left))


def _have_equal_bits(left: Tensor, right: Tensor) -> bool:
    """Whether factors that lie like these give the same bits when they are turned."""
    generator = torch.Generator().manual_seed(0)  # nobody's stream
    for _ in range(_TRIALS):
        try:
            drawn = [
                torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="cpu").normal_(
                    generator=generator
                )
                for t in (left, right)
            ]
        except RuntimeError:  # numbers of other kinds; elements that share their memory
            return False
        product, turned = torch.bmm(*drawn), torch.bmm(drawn[1].mT, drawn[0].mT)
        if not torch.equal(product.mT, turned):
            return False
    return True


def _shares(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors show the same memory as numbers of the same kind."""
    kinds = [(t.dtype, t.device, t.is_conj(), t.is_neg()) for t in (one, other)]
    if one is other or kinds[0] != kinds[1] or one.layout is not torch.strided:
        return False
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
