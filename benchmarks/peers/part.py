"""One process's part of a round, for the peers that are written by hand.

It does what a good engineer would: one model for life whose parameters are views of one vector, so
that a global model is taken with one copy and an update is added with one pass.
"""

import torch
from torch import Tensor

from benchmarks.workloads import Workload

PROCESSES = 2


class Part:
    """Trains clients one after the other, and sums what they end with."""

    def __init__(self, workload: Workload) -> None:
        torch.set_num_threads(1)
        self._workload = workload
        self._model = workload.model()
        parameters = list(self._model.parameters())
        self._vector = torch.cat([p.detach().reshape(-1) for p in parameters])
        sizes = [p.numel() for p in parameters]
        for parameter, values in zip(parameters, self._vector.split(sizes), strict=True):
            parameter.data = values.view_as(parameter)

    def train(self, start: Tensor, number: int, clients: tuple[str, ...], total: Tensor) -> int:
        """Trains these clients from ``start``.

        Args:
            start: the parameters of the global model as one float32 vector; not changed.
            number: of the round, from 1.
            clients: whom to train.
            total: gets the sum of their parameters, each times its rows; float64.

        Returns:
            The rows of all of them.
        """
        total.zero_()
        weight = 0
        for client in clients:
            self._vector.copy_(start)
            rows = self._workload.train(self._model, number, client)
            total.add_(self._vector, alpha=rows)
            weight += rows
        return weight


def halves(cohort: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The cohort dealt out to the processes."""
    return [cohort[place::PROCESSES] for place in range(PROCESSES)]
