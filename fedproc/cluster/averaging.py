"""Averaging models where they are. Runs in the parent; the work is done in a worker or here."""

from collections.abc import Sequence
from typing import Any

from fedproc.client.averaging import average_modules
from fedproc.errors import PlacementError
from fedproc.remote.calls import run_there
from fedproc.remote.module import ModulePointer
from fedproc.remote.pointer import Pointer


def weighted_average(models: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
    """Weighted mean of the parameters and floating buffers of models of one architecture.

    Args:
        models: pointers to modules on one worker, or local modules.
        weights: one per model, at least 0; None: all alike.

    Returns:
        A pointer to a new module on that worker, or a new local module. Integer buffers are the
        largest of the models'; it has no gradients, and the first model's mode.

    Raises:
        ValueError: no models, another number of weights than models, a weight below 0 or NaN, a
            total of 0, or different architectures.
        PlacementError: the pointers are on several workers, or mixed with local modules.
    """
    models = list(models)
    remote = [issubclass(type(model), Pointer) for model in models]
    if not any(remote):
        return average_modules(models, weights)
    if not all(remote):
        raise PlacementError(
            "weighted_average: some models are here and some in a worker. Send the local ones, or "
            "get() the others."
        )
    made = run_there(
        ModulePointer,
        "fedproc.client.averaging.average_modules",
        (models, None if weights is None else list(weights)),
        what="weighted_average",
        writes=False,
    )
    made.wait()  # bad weights are an error here, not at the first use of the result
    return made
