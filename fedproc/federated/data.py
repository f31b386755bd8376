"""Federated data: which client has which rows, and on which worker they are.

Runs in the parent. The rows of a worker's clients lie in few blocks in its memory; a client is a
range of one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedproc.client.seeding import derive_seed
from fedproc.cluster.placing import none_left
from fedproc.federated.holding import (
    Block,
    Factory,
    FactorySource,
    Holding,
    RowsSource,
    Source,
    deal,
    hold,
)
from fedproc.federated.partition import ByKey, Partition, split
from fedproc.federated.rows import as_rows, rows_of
from fedproc.federated.summary import Summary, summarise
from fedproc.federated.validation import require_clients, require_cluster, require_functions
from fedproc.ranges import require_at_least, require_whole

if TYPE_CHECKING:
    from fedproc.cluster.cluster import Cluster
    from fedproc.remote.worker import Worker


class FederatedDataset:
    """Clients, their rows, and the workers that hold them.

    A client that has a worker's name lives there; the others are dealt so that the workers hold
    about the same number of rows. Where a client lives never changes a result.

    Attributes:
        cluster: The cluster that holds the rows.
        clients: Names of the clients, in the order in which updates are added up.
        sizes: Client -> rows.
        is_readable: Whether every worker may read all rows: public ones, sent from the parent.
    """

    def __init__(
        self, shards: Mapping[str, Any], cluster: Cluster, *, private: bool = False
    ) -> None:
        """Puts explicit shards on the workers.

        Args:
            shards: Client -> a pair (x, y) of tensors or arrays, or a map-style dataset. The
                parent keeps a reference, to restore the rows of a lost worker.
            cluster: Where to put them.
            private: The rows may be used in their worker but not leave it.

        Raises:
            ValueError: No shards, or a shard is no pair of equal length.
        """
        require_clients("shards", shards, "(x, y)")
        sources = {client: RowsSource(*pair) for client, pair in rows_of(shards).items()}
        self._place(sources, cluster, private=private)

    @classmethod
    def from_factories(
        cls, factories: Mapping[str, Factory], cluster: Cluster, *, private: bool = False
    ) -> FederatedDataset:
        """Lets every factory make its client's ``(x, y)`` in the worker.

        Args:
            factories: Client -> function without arguments. It may run again on another worker,
                if its worker is lost, and must return the same rows then.
            cluster: Where to run them.
            private: The rows may be used in their worker but not leave it.

        Raises:
            RemoteError: A factory failed.
            ValueError: No factories.
        """
        require_functions("factories", factories)
        sources = {client: FactorySource(make) for client, make in factories.items()}
        return cls.from_sources(sources, cluster, private=private)

    @classmethod
    def from_sources(
        cls, sources: Mapping[str, Source], cluster: Cluster, *, private: bool = False
    ) -> FederatedDataset:
        """Puts the rows of ``sources`` on the workers.

        Raises:
            ValueError: No sources, or a name that is no string.
        """
        data = cls.__new__(cls)
        data._place(sources, cluster, private=private)
        return data

    def _place(self, sources: Mapping[str, Source], cluster: Cluster, *, private: bool) -> None:
        require_clients("sources", sources, "source")
        require_cluster(cluster)
        if not sources:
            raise ValueError("there must be at least one client")
        for client in sources:
            if not isinstance(client, str):
                raise ValueError(f"the name of a client must be a string, got {client!r}")
        self.cluster = cluster
        self.clients = tuple(sources)
        self._sources = dict(sources)
        # a factory tells its size when it has run
        self._sizes = {c: len(s) if isinstance(s, RowsSource) else 1 for c, s in sources.items()}
        self._private = private
        self.is_readable = not private and all(isinstance(s, RowsSource) for s in sources.values())
        self._holdings: dict[str, Holding] = {}
        self._blocks: dict[str, Block] = {}
        self._homes: dict[str, str] = {}
        self._spread(self.clients, [worker.name for worker in cluster.workers])

    @property
    def sizes(self) -> dict[str, int]:
        """Client -> rows, in the order of ``clients``."""
        return dict(self._sizes)

    @property
    def private(self) -> bool:
        """Whether the rows may not leave their workers."""
        return self._private

    def __len__(self) -> int:
        """Returns the number of rows of all clients."""
        return sum(self._sizes.values())

    def __contains__(self, client: object) -> bool:
        """Tells whether there is such a client."""
        return client in self._sizes

    def __repr__(self) -> str:
        """Shows counts, never values."""
        return (
            f"<FederatedDataset: {len(self)} rows of {len(self.clients)} clients "
            f"on {len(self._holdings)} workers>"
        )

    def summary(self) -> Summary:
        """Counts the rows and labels of every client; ``print`` it, or ``.plot(path)`` it.

        The workers count. Labels of private data are counted only for clients with at least
        ``Cluster(min_rows=…)`` rows.
        """
        return summarise(self)

    def worker_of(self, client: str) -> Worker:
        """Returns the worker that holds the rows of ``client`` now.

        The clients of a lost worker move to its replacement, or to the other workers.

        Raises:
            KeyError: There is no such client.
        """
        return self._holding(client).worker

    def __getitem__(self, client: str) -> tuple[Any, Any]:
        """Returns pointers to the inputs and the targets of ``client``: views, not copies.

        Raises:
            KeyError: There is no such client.
        """
        block, _ = self.place_of(client)
        rows = slice(*block.spans[client])
        return block.x[rows], block.y[rows]

    def place_of(self, client: str) -> tuple[Block, int]:
        """Returns the block that holds a client's rows, and the first of them in it."""
        self._holding(client)
        block = self._blocks[client]
        return block, block.spans[client][0]

    def homes(self, clients: Sequence[str]) -> dict[str, str]:
        """Maps clients to the names of the workers that hold their rows now.

        Each worker is looked at once; the clients of a lost one move first.
        """
        for name in {self._homes[client] for client in clients}:
            holding = self._holdings.get(name)
            if holding is None or not holding.worker.alive:
                self.restore()
        return {client: self._homes[client] for client in clients}

    def holdings(self) -> dict[str, Holding]:
        """Maps worker names to what those workers hold."""
        return dict(self._holdings)

    def restore(self) -> None:
        """Puts the clients of lost workers on their replacements, or on the other workers.

        Raises:
            WorkerLostError: No worker is alive, or another one was lost meanwhile.
            ClosedError: The cluster is closed.
        """
        self._holdings = {n: held for n, held in self._holdings.items() if held.worker.alive}
        homeless: dict[str, list[str]] = {}
        for client, home in self._homes.items():
            if home not in self._holdings:
                homeless.setdefault(home, []).append(client)
        alive = [worker.name for worker in self.cluster.workers if worker.alive]
        for home, clients in homeless.items():
            if not alive:
                raise none_left(self.cluster, home)
            self._spread(clients, [home] if home in alive else alive)

    def _spread(self, clients: Sequence[str], workers: Sequence[str]) -> None:
        loads: dict[str, int] = {}
        for client, home in self._homes.items():
            loads[home] = loads.get(home, 0) + self._sizes[client]
        homes = deal({client: self._sizes[client] for client in clients}, workers, loads)
        for name in workers:
            mine = {client: self._sources[client] for client in clients if homes[client] == name}
            if mine:
                self._hold(self.cluster[name], mine)

    def _hold(self, worker: Worker, sources: Mapping[str, Source]) -> None:
        blocks = hold(worker, sources, private=self._private)
        # from here on nothing can fail: the clients live there
        before = self._holdings.get(worker.name)
        older = before.blocks if before is not None else ()
        self._holdings[worker.name] = Holding(worker, (*older, *blocks))
        for block in blocks:
            self._blocks.update(dict.fromkeys(block.spans, block))
            self._homes.update(dict.fromkeys(block.spans, worker.name))
            self._sizes.update({c: stop - start for c, (start, stop) in block.spans.items()})

    def _holding(self, client: str) -> Holding:
        """Returns what the worker of a client holds; a lost worker's clients move first."""
        if client not in self._sizes:
            raise KeyError(
                f"no client {client!r}; there are {len(self.clients)}: {self.clients[:5]!r}…"
            )
        holding = self._holdings.get(self._homes[client])
        if holding is None or not holding.worker.alive:
            self.restore()
            holding = self._holdings[self._homes[client]]
        return holding


def federate(
    data: object,
    cluster: Cluster,
    *,
    clients: int | None = None,
    partition: Partition | str = "iid",
    seed: int = 0,
    private: bool = False,
) -> FederatedDataset:
    """Splits data over clients and puts them on the workers.

    Args:
        data: A pair (x, y) of tensors or arrays, or a map-style dataset of such pairs, such as a
            list of them.
        cluster: Where the clients live.
        clients: Number of clients, named ``client-000``…; None makes one per worker, with its
            name (for :class:`fedproc.partition.ByKey`: one per key).
        partition: ``"iid"``, an object of ``fedproc.partition``, or any
            ``(labels, clients, rng) -> list of index arrays``.
        seed: Decides who gets which rows, together with the partition alone.
        private: The rows may be used in their worker but not leave it.

    Returns:
        The data on the workers; rows keep their order inside a client.

    Raises:
        ValueError: No data, no cluster, fewer rows than clients, or an inexact partition.
    """
    require_cluster(cluster)
    x, y = as_rows(data)
    names = _names(clients, partition, cluster)
    rng = np.random.default_rng(derive_seed(require_whole("seed", seed), "partition"))
    labels = (y.float() if y.dtype == torch.bfloat16 else y).numpy()
    parts = split(partition, labels, len(names), rng)
    sources = {name: RowsSource(x, y, part) for name, part in zip(names, parts, strict=True)}
    return FederatedDataset.from_sources(sources, cluster, private=private)


def _names(clients: int | None, partition: Partition | str, cluster: Cluster) -> list[str]:
    if isinstance(partition, ByKey):
        names = partition.names()
        if clients is not None and clients != len(names):
            raise ValueError(
                f"clients={clients}, but ByKey has {len(names)} distinct keys: leave it out"
            )
        return names
    if clients is None:
        return [worker.name for worker in cluster.workers]
    clients = require_at_least("clients", clients, 1)
    width = max(3, len(str(clients - 1)))
    return [f"client-{number:0{width}d}" for number in range(clients)]
