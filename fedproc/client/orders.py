"""Which rows a stack of clients takes in which step: the batches of all of them in one table.

Runs in workers. Every client has the batches it has when it trains by itself: the same generator,
the same permutation for each epoch, the same cuts. What differs is the form: clients stand in the
order of their steps, most first, so that those still training are always the first ones, and a
short batch is padded with its own first row, which then weighs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt
    from torch import Tensor

    from fedproc.client.training import LocalTraining

    Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the clients that still train.

    Attributes:
        index: Rows of the first ``clients`` clients, flat: clients times width.
        clients: How many still train.
        width: Rows of a padded batch.
        weights: (clients, width): what the loss of each row counts in the loss of its batch.
    """

    index: Tensor
    clients: int
    width: int
    weights: Tensor


class Orders:
    """The batches of a stack.

    Attributes:
        sorted: Places of the clients as given, most steps first.
        steps: Steps of each client, in that order.
        rows: Rows each processes in all its steps, in that order.
        counts: (steps, clients): rows of each batch without padding, 0 after the last step.
    """

    counts: Integers

    def __init__(
        self,
        starts: Sequence[int],
        sizes: Sequence[int],
        local: LocalTraining,
        seeds: Sequence[int],
    ) -> None:
        """Draws all orders.

        Args:
            starts: Where the rows of each client begin.
            sizes: How many they are, at least 1.
            local: Batch size, epochs, shuffle, most steps.
            seeds: One per client, of the generator that draws its permutations.
        """
        batches = [-(-size // (local.batch_size or size)) for size in sizes]
        known = {size: local.steps(size) for size in set(sizes)}
        steps = [known[size] for size in sizes]
        self.sorted = sorted(range(len(sizes)), key=lambda place: -steps[place])
        self.steps = [steps[place] for place in self.sorted]
        drawn, ends = [], [0]
        generator = torch.Generator()
        for place in self.sorted:
            size, epochs = sizes[place], -(-steps[place] // batches[place])
            if local.shuffle:
                generator.manual_seed(seeds[place])
            drawn += [_order(size, local, generator) for _ in range(epochs)]
            ends.append(ends[-1] + epochs * size)
        places = self._fill(np.array(sizes)[self.sorted], np.array(ends[:-1]), local.batch_size)
        # rows of each batch, padded: (steps, clients, width)
        self._index = torch.cat(drawn).numpy()[places] + np.array(starts)[self.sorted][:, None]
        self.rows = self.counts.sum(axis=0).tolist()

    def _fill(self, sizes: Integers, ends: Integers, batch_size: int | None) -> Integers:
        """Cuts the orders into batches, for all clients and steps at once, and counts the rows.

        Args:
            sizes: (clients,): their rows.
            ends: (clients,): where the orders of each begin in those of all.
            batch_size: As the user chose it.

        Returns:
            The places of the rows of each padded batch in the orders: (steps, clients, width).
        """
        size = sizes if batch_size is None else np.full_like(sizes, batch_size)
        batches = -(-sizes // size)
        epoch, batch = np.divmod(np.arange(self.steps[0])[:, None], batches)
        trains = np.arange(self.steps[0])[:, None] < self.steps
        self.counts = np.minimum(sizes - batch * size, size) * trains
        first = (ends + epoch * sizes + batch * size) * trains
        column = np.arange(int(self.counts.max()))
        # Padding repeats the first row of its batch: it is NaN only where that row is.
        first = first[..., None]
        places: Integers = np.where(column < self.counts[..., None], first + column, first)
        return places

    def walk(self, like: Tensor, *, mean: bool) -> Iterator[Step]:
        """Yields all steps.

        Args:
            like: Gives the dtype of the weights, and the device of all.
            mean: The loss of a batch is the mean of its rows, not their sum.
        """
        for index, counts in zip(self._index, self.counts, strict=True):
            clients = int(np.count_nonzero(counts))
            rows = counts[:clients]
            width = int(rows.max())
            valid = np.arange(width) < rows[:, None]
            weights = torch.from_numpy(valid / rows[:, None] if mean else valid)
            flat = torch.from_numpy(index[:clients, :width].reshape(-1))
            yield Step(
                index=flat.to(like.device),
                clients=clients,
                width=width,
                weights=weights.to(like.device, like.dtype),
            )

    def as_given(self, values: Tensor) -> Tensor:
        """Puts the rows of a matrix, one per client, into the order of the clients as given."""
        if self.sorted == sorted(self.sorted):
            return values
        places = torch.tensor(self.sorted, device=values.device).argsort()
        return values.index_select(0, places)


def first_batches(
    starts: Sequence[int], sizes: Sequence[int], local: LocalTraining, seeds: Sequence[int]
) -> list[Tensor]:
    """Draws the rows of the first batch of each client; arguments as of :class:`Orders`."""
    generator, batches = torch.Generator(), []
    for start, size, seed in zip(starts, sizes, seeds, strict=True):
        if local.shuffle:
            generator.manual_seed(seed)
        batches.append(_order(size, local, generator)[: local.batch_size] + start)
    return batches


def _order(size: int, local: LocalTraining, generator: torch.Generator) -> Tensor:
    """Draws the order of the rows of one client for one epoch."""
    return (
        torch.randperm(size, generator=generator, device="cpu")
        if local.shuffle
        else torch.arange(size, device="cpu")
    )
