"""The fold of a private round: clipped changes become one noisy model. Runs in the parent.

Takes the place of :class:`fedproc.federated.fold.Fold`. The denominator is the expected size of the
cohort, whoever took part, and buffers stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fedproc.client import compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from fedproc.client.layout import Layout
    from fedproc.federated.fold import Weighted
    from fedproc.federated.noise import SecretStream


class PrivateFold:
    """Adds clipped changes up, in cohort order."""

    def __init__(
        self,
        layout: Layout,
        start: Tensor,
        denominator: float,
        noise: float,
        stream: SecretStream,
    ) -> None:
        """Starts a round.

        Args:
            layout: The form of the blocks.
            start: The global model: uint8, shape (nbytes,); may not change meanwhile.
            denominator: What the sum is divided by: q N.
            noise: Standard deviation of the noise on every coordinate of the sum.
            stream: Where the noise comes from.
        """
        self._layout, self._start = layout, start
        self._denominator, self._noise, self._stream = denominator, noise, stream
        self._sum = torch.zeros(layout.trained_numel, dtype=torch.float64, device="cpu")

    def add(self, updates: Sequence[Weighted]) -> None:
        """Adds the clipped changes of clients, which all weigh 1; blocks may be reused."""
        for update in updates:
            self._add(update.block)

    def _add(self, block: Tensor) -> None:
        place = 0
        for section in self._layout.of_kind("trained"):
            total, change = self._sum[place : place + section.numel], section.view(block)
            if compiled.fits(change):
                compiled.add(total, [change], [1.0], first=False)
            else:
                total.add_(change)
            place += section.numel

    def add_sum(self, changes: Tensor) -> None:
        """Adds the sum of clipped changes: float64, shape (parameters,)."""
        self._sum.add_(changes)

    def trained(self) -> tuple[Tensor, None]:
        """Returns x + (sum + noise) / denominator: float64, shape (parameters,). Call it once."""
        if self._noise:
            self._sum.add_(self._stream.normal(len(self._sum)), alpha=self._noise)
        change = self._sum.div_(self._denominator)
        return change.add_(self._layout.flat_trained(self._start)), None

    def write(self, trained: Tensor, allocate: Callable[[int], Tensor] | None = None) -> Tensor:
        """Makes the block of the new model; buffers are those the round started with.

        Args:
            trained: The new trained parameters: float64, shape (parameters,).
            allocate: See :meth:`fedproc.client.layout.Layout.room`.
        """
        block, place = self._layout.room(allocate).copy_(self._start), 0
        for section in self._layout.of_kind("trained"):
            section.view(block).copy_(trained[place : place + section.numel])
            place += section.numel
        return block
