"""What goes to a client and what comes back, as records.

Made in one process and read in another: the parent makes tasks, workers make updates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

NO_BLOCK: Final = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class Task:
    """One client's work in one round.

    Attributes:
        client: Name of the client.
        round: Number of the round, from 1.
        seed: Seed of the run; every stream of the client derives from it.
        place: Its place in the cohort.
    """

    client: str
    round: int
    seed: int
    place: int = 0


@dataclass(slots=True)
class Update:
    """What a client returns; the trainer fills in ``block`` and the times last.

    Attributes:
        block: The trained model in the flat form of its layout: uint8, shape (nbytes,).
        examples: Rows the client holds.
        steps: Optimizer steps, or ``metrics["steps"]`` of a custom function, or None.
        step_norm: Sum of the coefficients by which the steps applied the gradients, in units of
            the learning rate (FedNova's ``|a|_1``), or None where ``steps`` is None.
        rows: Rows processed; 0 for a custom function.
        loss_sum: Sum of the loss over the rows processed.
        metrics: Numbers to report.
        state: What the client keeps if the update is accepted.
        began, ended: When it trained, in seconds of ``time.perf_counter``, which all processes of
            a machine share.
    """

    block: Tensor
    examples: int
    steps: float | None
    step_norm: float | None
    rows: int
    loss_sum: float
    metrics: dict[str, float] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    began: float = 0.0
    ended: float = 0.0


@dataclass(frozen=True, slots=True)
class Updates:
    """What several clients return at once.

    Attributes:
        blocks: Their blocks: uint8, shape (clients, at least nbytes), every row aligned.
        updates: The rest, without blocks; None for a client that failed.
    """

    blocks: Tensor
    updates: list[Update | None]
