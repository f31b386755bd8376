"""Where the rows of clients that train at once lie. Runs in workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shards:
    """The rows of the clients of a stack.

    Attributes:
        x: Inputs (rows, ...), of these clients and perhaps of others.
        y: Targets (rows, ...).
        starts, sizes: Rows of each client lie at ``start`` to ``start + size``.
    """

    x: Tensor
    y: Tensor
    starts: Sequence[int]
    sizes: Sequence[int]

    @classmethod
    def of(cls, places: Sequence[tuple[Tensor, Tensor, int, int]]) -> Shards:
        """Finds the rows of clients; those in several blocks are copied side by side.

        Args:
            places: Inputs and targets of the client's block, first row, and the row after its last.
        """
        sizes = [stop - start for _, _, start, stop in places]
        x, y = places[0][:2]
        if all(place[0] is x for place in places):
            return cls(x, y, [start for _, _, start, _ in places], sizes)
        ends = torch.tensor([0, *sizes], device="cpu").cumsum(0).tolist()
        x = torch.cat([part[start:stop] for part, _, start, stop in places])
        y = torch.cat([part[start:stop] for _, part, start, stop in places])
        return cls(x, y, ends[:-1], sizes)

    def take(self, index: Tensor, clients: int) -> tuple[Tensor, Tensor]:
        """Returns the rows of ``index`` (clients times width): each (clients, width, ...)."""
        x, y = (part.index_select(0, index) for part in (self.x, self.y))
        return x.view(clients, -1, *x.shape[1:]), y.view(clients, -1, *y.shape[1:])

    def some(self, rows: int) -> tuple[Tensor, Tensor]:
        """Returns rows of clients spread over the stack; one may come twice."""
        clients = [place * len(self.sizes) // rows for place in range(rows)]
        places = [self.starts[c] + place % self.sizes[c] for place, c in enumerate(clients)]
        index = torch.tensor(places, device=self.x.device)
        return self.x.index_select(0, index), self.y.index_select(0, index)
