"""What of an update may leave a worker whose clients have private data. Runs in workers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedproc.client.training import LocalTraining
from fedproc.errors import NotPermittedError

if TYPE_CHECKING:
    from fedproc.client.update import Update
    from fedproc.client.work import Work


def may_leave(update: Update, work: Work) -> Update:
    """Takes out what may not leave.

    Raises:
        NotPermittedError: A custom function keeps something, which would leave.
    """
    least = work.private_rows
    if least is None:
        return update
    if update.state and not isinstance(work.local, LocalTraining):
        raise NotPermittedError(
            "ctx.state of a client with private data would leave its worker; keep nothing"
        )
    if update.examples >= least:
        return update
    return replace(update, rows=0, loss_sum=0.0, metrics={})
