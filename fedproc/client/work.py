"""What a trainer is made from, as records. The parent makes them, workers read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fedproc.client.layout import Layout
    from fedproc.client.rules import LocalRule
    from fedproc.client.training import LocalTraining, TrainFunction
    from fedproc.client.update import Task


@dataclass(frozen=True, slots=True)
class Span:
    """Where the rows of a client lie: rows ``start`` to ``stop`` of block ``block``."""

    block: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Work:
    """What a trainer does for every client.

    Attributes:
        local: Local epochs, or a custom ``train(model, x, y, ctx)``.
        rule: The gradient correction of the strategy, or None.
        threads: Torch threads while a client trains; None keeps what the worker has.
        device: Where the resident model and the batches live.
        private_rows: The data are private: numbers leave only as means over so many rows, and
            what a custom function keeps may not leave. None: they are not.
    """

    local: LocalTraining | TrainFunction
    rule: LocalRule | None = None
    threads: int | None = 1
    device: str = "cpu"
    private_rows: int | None = None

    def blocks(self, layout: Layout, tasks: Sequence[Task], count: int | None = None) -> Tensor:
        """Allocates a block for the update of each of some tasks of one round, or ``count``.

        The parent may read them where they are, unless the update is of private data or is still
        to be clipped.
        """
        secret = self.private_rows is not None or tasks[0].clip_norm is not None
        return layout.new_blocks(len(tasks) if count is None else count, secret=secret)
