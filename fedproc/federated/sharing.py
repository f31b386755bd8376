"""Rows of all workers, read by each of them where they lie. Runs in the parent.

A client can then train on any worker: rounds are spread evenly, and a worker that is done early
takes clients from another one's queue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedproc.client.work import Span
from fedproc.federated.passing import Promise, take_all
from fedproc.remote.calls import fold
from fedproc.remote.moving import attach

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedproc.client.elsewhere import Elsewhere
    from fedproc.cluster.cluster import Cluster
    from fedproc.federated.holding import Block, Holding
    from fedproc.remote.worker import Worker


class Sharing:
    """Knows where the rows lie that workers tell each other of; each is asked once."""

    def __init__(self) -> None:
        """Knows nothing yet."""
        self._places: dict[Block, Sequence[Elsewhere]] = {}
        self._known: tuple[Holding, ...] = ()

    def rows_for(
        self, worker: Worker, holdings: tuple[Holding, ...]
    ) -> tuple[list[tuple[Any, Any]], dict[str, Span]]:
        """Returns blocks and spans of which a trainer in ``worker`` is made.

        Args:
            worker: Reads its own rows, and those of the other holdings where they lie.
            holdings: Of which it is to have the rows.

        Raises:
            RemoteError: It cannot map the memory of another worker.
            WorkerLostError: One of them has ended.
        """
        others = [held for held in holdings if held.worker is not worker]
        if others:
            self.learn(holdings)
        for held in others:
            attach(held.worker.link, worker.link)
        blocks: list[tuple[Any, Any]] = []
        spans: dict[str, Span] = {}
        for held in holdings:
            for client, span in held.spans().items():
                spans[client] = Span(len(blocks) + span.block, span.start, span.stop)
            for block in held.blocks:
                x, y = (block.x, block.y) if held.worker is worker else self._places[block]
                blocks.append((x, y))
        return blocks, spans

    def learn(self, holdings: tuple[Holding, ...]) -> None:
        """Asks where rows lie, of whoever was not asked; workers answer when they are idle.

        Raises:
            WorkerLostError: One of them has ended.
        """
        if holdings == self._known:
            return
        known = self._places
        blocks = {block: held.worker for held in holdings for block in held.blocks}
        self._places = {block: known[block] for block in blocks if block in known}
        new = [block for block in blocks if block not in known]
        # a call that the aggregator asks for: others would wait for the updates on their way
        asked = [_ask(blocks[block].link.arena_name, block) for block in new]
        self._places.update(zip(new, take_all(asked), strict=True))
        self._known = holdings


def _ask(arena: str, block: Block) -> Promise:
    name = "fedproc.client.elsewhere.places_of"
    return Promise(*fold(name, (arena, block.x, block.y), what="places_of"))


def can_share(cluster: Cluster) -> bool:
    """Tells whether the workers can read each other's memory: on the CPU, and allowed to."""
    workers = cluster.workers
    return len(workers) > 1 and all(
        str(worker.device) == "cpu" and worker.link.registered is None for worker in workers
    )
