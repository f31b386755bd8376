"""A multiprocessing.Pool as a good engineer would write it.

It is forked once, so the rows are there without being sent. The model and a sum for each process
are in shared memory: a task is the number of a round and names of clients, its answer one number.
"""

import multiprocessing

import torch
from torch import Tensor

from benchmarks.peers.part import PROCESSES, Part, halves
from benchmarks.workloads import Workload, flat

REQUIRES = ()

_part: Part
_start: Tensor
_sums: Tensor


def begin(workload: Workload, start: Tensor, sums: Tensor) -> None:
    """In a new process of the pool."""
    global _part, _start, _sums  # where else could an initializer put it
    _part, _start, _sums = Part(workload), start, sums


def task(place: int, number: int, clients: tuple[str, ...]) -> int:
    """One part of a round, summed into row ``place`` of the sums; whichever process takes it."""
    return _part.train(_start, number, clients, _sums[place])


class System:
    """The parent."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._played = 0
        self._vector = flat(workload.model()).share_memory_()
        size = (PROCESSES, len(self._vector))
        self._sums = torch.zeros(size, dtype=torch.float64).share_memory_()
        given = (workload, self._vector, self._sums)
        self._pool = multiprocessing.get_context("fork").Pool(PROCESSES, begin, given)

    def play(self, rounds: int) -> None:
        """The next rounds."""
        for _ in range(rounds):
            self._played += 1
            parts = halves(self._workload.cohort(self._played))
            tasks = [(place, self._played, clients) for place, clients in enumerate(parts)]
            weights = self._pool.starmap(task, tasks, chunksize=1)
            self._vector.copy_(self._sums.sum(0).div_(sum(weights)))

    def model(self) -> Tensor:
        """The parameters."""
        return self._vector.clone()

    def close(self) -> None:
        """Ends the processes."""
        self._pool.close()
        self._pool.join()
