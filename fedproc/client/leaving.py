"""What of an update may leave a worker whose clients have private data. Runs in workers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedproc.client.denominators import labelled_rows
from fedproc.client.training import LocalTraining
from fedproc.errors import NotPermittedError

if TYPE_CHECKING:
    from torch import Tensor

    from fedproc.client.update import Update
    from fedproc.client.work import Work


def may_leave(update: Update, work: Work, targets: Tensor) -> Update:
    """Takes out what may not leave of private data; ``targets``: of the client.

    Raises:
        NotPermittedError: A custom function keeps something, which would leave.
    """
    if update.state and not isinstance(work.local, LocalTraining):
        raise NotPermittedError(
            "ctx.state of a client with private data would leave its worker; keep nothing"
        )
    loss = work.local.loss if isinstance(work.local, LocalTraining) else None
    if labelled_rows(loss, targets) >= (work.private_rows or 0):
        return update
    return replace(update, rows=0, loss_sum=0.0, metrics={})
