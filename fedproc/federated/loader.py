"""Batches of pointers, for training that the parent drives step by step. Runs in the parent.

A batch holds rows of one client, so it lies in one worker; clients go worker by worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fedproc.client.seeding import generator_for
from fedproc.ranges import require_at_least, require_whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from fedproc.federated.data import FederatedDataset


class FederatedDataLoader:
    """Iterates over the rows of all clients, once per epoch, as pairs of pointers."""

    def __init__(
        self,
        data: FederatedDataset,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        """Prepares; nothing is sent before the first batch.

        Args:
            data: The clients and their rows.
            batch_size: Rows of a batch; the last batch of a client may have fewer.
            shuffle: A new order of each client's rows for every ``iter()``.
            drop_last: Leave out batches with fewer rows.
            seed: Decides the orders.

        Raises:
            ValueError: A value is outside of its range.
        """
        self._data = data
        self._batch_size = require_at_least("batch_size", batch_size, 1)
        self._shuffle = shuffle
        self._drop_last = drop_last
        self._seed = require_whole("seed", seed)
        self._epoch = 0

    def __len__(self) -> int:
        """Returns the number of batches of an epoch."""
        return sum(len(self._starts(rows)) for rows in self._data.sizes.values())

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Starts a new epoch: yields pairs of pointers to inputs and targets."""
        self._epoch += 1
        return self._batches(self._epoch)

    def _batches(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        sizes = self._data.sizes  # a copy at each access
        for client in self._by_worker():
            rows = sizes[client]
            order = None
            if self._shuffle:
                generator = generator_for(self._seed, epoch, client, "loader")
                order = torch.randperm(rows, generator=generator, device="cpu")
            for start in self._starts(rows):
                yield self._batch(client, start, min(start + self._batch_size, rows), order)

    def _batch(self, client: str, start: int, stop: int, order: Tensor | None) -> tuple[Any, Any]:
        """Returns rows of the block that the client lies in: two or three messages."""
        block, first = self._data.place_of(client)
        if order is None:
            rows = slice(first + start, first + stop)
            return block.x[rows], block.y[rows]
        there = self._data.worker_of(client).send(first + order[start:stop])
        return block.x[there], block.y[there]

    def _starts(self, rows: int) -> range:
        whole = rows - rows % self._batch_size if self._drop_last else rows
        return range(0, whole, self._batch_size)

    def _by_worker(self) -> list[str]:
        """Lists the clients worker by worker, in the order of the cluster's workers."""
        places = {worker.name: n for n, worker in enumerate(self._data.cluster.workers)}
        homes = self._data.homes(self._data.clients)
        return sorted(self._data.clients, key=lambda client: places[homes[client]])
