"""Ray actors as a good engineer would write them.

Two actors that keep the rows and a model. In a round the global model is put once, each actor
trains its half of the cohort and answers with one mean: the object store carries one model down
and two up, as arrays that are read in place.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.part import Part, halves
from benchmarks.workloads import Workload, flat

REQUIRES = ("ray",)
STORE_BYTES = 1 << 30


class Actor:
    """One of the two."""

    def __init__(self, workload: Workload) -> None:
        self._part = Part(workload)
        self._total = flat(workload.model()).double()

    def train(self, start: Any, number: int, clients: tuple[str, ...]) -> tuple[Any, int]:
        """The mean of what these clients end with, and their rows."""
        vector = torch.frombuffer(start, dtype=torch.float32)  # where the store keeps it
        rows = self._part.train(vector, number, clients, self._total)
        return (self._total / max(rows, 1)).float().numpy(), rows


class System:
    """The driver."""

    def __init__(self, workload: Workload) -> None:
        import ray

        self._ray = ray
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=STORE_BYTES,
        )
        self._workload = workload
        self._played = 0
        self._vector = flat(workload.model())
        kept = ray.put(workload)
        remote = ray.remote(num_cpus=1)(Actor)
        self._actors = [remote.remote(kept) for _ in range(2)]

    def play(self, rounds: int) -> None:
        """The next rounds."""
        for _ in range(rounds):
            self._played += 1
            start = self._ray.put(self._vector.numpy())
            parts = halves(self._workload.cohort(self._played))
            asked = zip(self._actors, parts, strict=True)
            answers = [actor.train.remote(start, self._played, part) for actor, part in asked]
            means, rows = zip(*self._ray.get(answers), strict=True)
            self._vector = torch.from_numpy(np.average(means, axis=0, weights=rows)).float()

    def model(self) -> Tensor:
        """The parameters."""
        return self._vector

    def close(self) -> None:
        """Ends Ray's processes."""
        self._ray.shutdown()
