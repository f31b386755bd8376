"""Rows of all workers, read by each of them where they lie. Runs in the parent.

A client can then train on any worker: rounds are spread evenly, and a worker that is done early
takes clients from another one's queue.
"""

from __future__ import annotations

import logging
from itertools import permutations
from typing import TYPE_CHECKING, Any

from fedproc.client.work import Span
from fedproc.errors import FedprocError, ObjectGoneError, WorkerLostError
from fedproc.federated.passing import Promise, take_all
from fedproc.remote.calls import fold
from fedproc.remote.moving import attach

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedproc.client.elsewhere import Elsewhere
    from fedproc.cluster.cluster import Cluster
    from fedproc.federated.holding import Block, Holding
    from fedproc.remote.link import Link
    from fedproc.remote.worker import Worker

_log = logging.getLogger("fedproc")


class Sharing:
    """Whether the workers of a cluster read each other's rows, and where these lie.

    Attributes:
        opened: The holdings whose rows all their workers can read.
    """

    def __init__(self, cluster: Cluster, *, allowed: bool) -> None:
        """Asks nobody yet.

        Args:
            cluster: Only processes on the CPU that run whatever they are sent can share.
            allowed: Whether these rows may be shared.
        """
        workers = cluster.workers
        self._is_possible = (
            allowed
            and cluster.transport == "process"
            and len(workers) > 1
            and all(str(w.device) == "cpu" and w.link.registered is None for w in workers)
        )
        self._places: dict[Block, Sequence[Elsewhere]] = {}
        self.opened: tuple[Holding, ...] = ()

    def open(self, holdings: tuple[Holding, ...]) -> bool:
        """Lets the workers read each other's rows in the round that begins; whether they can.

        Not while one of them still has something to do: that may write to rows, which another
        worker would read too early, and nobody else shall wait for it. Nor when one has anything
        private, which may have been written to rows.
        """
        if not self._is_possible or not all(_is_open(held.worker.link) for held in holdings):
            return False
        try:
            for held in holdings:
                held.blocks[0].x.done()  # it is gone if the worker was cleared
            if holdings != self.opened:
                self._learn(holdings)
                for held, other in permutations(holdings, 2):
                    attach(held.worker.link, other.worker.link)
        except (WorkerLostError, ObjectGoneError):  # the round will notice
            return False
        except (FedprocError, OSError) as error:
            self._is_possible = False
            why = str(error).partition("\n")[0]
            _log.warning("each worker trains only the clients whose rows it holds: %s", why)
            return False
        self.opened = holdings
        return True

    def rows_for(
        self, worker: Worker, holdings: Sequence[Holding]
    ) -> tuple[list[tuple[Any, Any]], dict[str, Span]]:
        """Returns blocks and spans of which a trainer in ``worker`` is made.

        Args:
            worker: Reads its own rows, and those of the other holdings where they lie.
            holdings: Of which it is to have the rows: its own only, or those that are opened.
        """
        blocks: list[tuple[Any, Any]] = []
        spans: dict[str, Span] = {}
        for held in holdings:
            for client, span in held.spans().items():
                spans[client] = Span(len(blocks) + span.block, span.start, span.stop)
            for block in held.blocks:
                own = held.worker.name == worker.name  # or its predecessor's, which is an error
                x, y = (block.x, block.y) if own else self._places[block]
                blocks.append((x, y))
        return blocks, spans

    def _learn(self, holdings: Sequence[Holding]) -> None:
        """Asks where rows lie, of whoever was not asked; forgets blocks that are gone."""
        known = self._places
        blocks = {block: held.worker.link for held in holdings for block in held.blocks}
        self._places = {block: known[block] for block in blocks if block in known}
        new = [block for block in blocks if block not in known]
        asked = [_ask(blocks[block].arena_name, block) for block in new]
        self._places.update(zip(new, take_all(asked), strict=True))


def _is_open(link: Link) -> bool:
    """Whether nothing that was asked of a worker is left to do, and nothing there is private."""
    if link.end is not None or link.keeps_private:
        return False
    done, last = link.done(), link.outbox.last
    return done >= last or not link.inbox.unfinished(done, last)


def _ask(arena: str, block: Block) -> Promise:
    name = "fedproc.client.elsewhere.places_of"
    return Promise(*fold(name, (arena, block.x, block.y), what="places_of"))
