"""One client trained by a user's own function. Runs in workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedproc.client.devices import at_home
from fedproc.client.training import TrainContext, TrainFunction, checked_metrics
from fedproc.client.update import NO_BLOCK, Update

if TYPE_CHECKING:
    from torch import Tensor

    from fedproc.client.resident import Resident


def run_function(
    resident: Resident, train: TrainFunction, rows: tuple[Tensor, Tensor], context: TrainContext
) -> Update:
    """Calls ``train`` with the resident model, which is loaded, and a copy of the rows.

    Raises:
        Exception: What the function raises; the model is made anew.
        TypeError: It returned no dict of numbers.
        ValueError: It replaced parts of the model.
    """
    x, y = rows
    # The function may write into its rows; the block keeps them as they are.
    try:
        metrics = checked_metrics(train(resident.model, x.clone(), y.clone(), context))
        resident.unfreeze()
        resident.require_whole()
    except BaseException:
        # nobody knows what the function left; the next client gets a model made anew
        resident.renew()
        raise
    steps = metrics.get("steps")
    return Update(
        block=NO_BLOCK,
        examples=len(x),
        steps=steps,
        step_norm=steps,
        rows=0,
        loss_sum=0.0,
        metrics=metrics,
        state=context.state if x.device.type == "cpu" else at_home(context.state),
    )
