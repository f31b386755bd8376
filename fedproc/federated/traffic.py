"""How many bytes went through the pipes during a round. Runs in the parent."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedproc.cluster.cluster import Cluster


class Traffic:
    """Counts from now on."""

    def __init__(self, cluster: Cluster) -> None:
        """Notes what went through before, per connection: a replaced worker has a new one."""
        self._cluster = cluster
        self._before = {worker.link: worker.link.channel.moved_bytes for worker in cluster}

    def since(self) -> int:
        """Returns the bytes since the start, of workers that were replaced meanwhile, too."""
        lost = [link for link in self._before if link not in {w.link for w in self._cluster}]
        now = self._cluster.message_bytes + sum(link.channel.moved_bytes for link in lost)
        return now - sum(self._before.values())
