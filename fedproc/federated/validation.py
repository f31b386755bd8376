"""Checks of arguments, at construction, with errors that say what would be right.

Runs in the parent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from fedproc.client.ranges import require_at_least, require_positive
from fedproc.client.training import LocalTraining
from fedproc.federated.data import FederatedDataset
from fedproc.federated.strategies import Strategy

if TYPE_CHECKING:
    from fedproc.cluster.cluster import Cluster


def require_parts(model: object, data: object, local: object, strategy: object) -> None:
    """Raises ValueError unless these can be the parts of an aggregator."""
    if not isinstance(model, nn.Module):
        message = f"model must be a local torch.nn.Module, got {type(model).__name__}"
    elif not isinstance(data, FederatedDataset):
        message = (
            f"data must be a FederatedDataset, see fedproc.federate; got {type(data).__name__}"
        )
    elif not isinstance(local, LocalTraining) and (not callable(local) or isinstance(local, type)):
        message = (
            f"local must be LocalTraining(…) or a function train(model, x, y, ctx), got {local!r}"
        )
    elif not isinstance(strategy, Strategy):
        message = (
            f"strategy must be an object of fedproc.strategies, such as FedAvg(), got {strategy!r}"
        )
    else:
        return
    raise ValueError(message)


def weight_of(weighting: object) -> Callable[[int], float]:
    """Returns what weighs a client by its rows.

    Raises:
        ValueError: There is no such weighting.
    """
    if weighting not in ("examples", "uniform"):
        raise ValueError(f"weighting must be 'examples' or 'uniform', got {weighting!r}")
    return float if weighting == "examples" else _one


def _one(rows: int) -> float:  # noqa: ARG001 - called as a weight of rows
    return 1.0


def require_callable(callbacks: Sequence[object]) -> None:
    """Raises ValueError for a callback that cannot be called."""
    for callback in callbacks:
        if not callable(callback):
            raise ValueError(
                f"a callback must be callable as (aggregator, record), got {callback!r}"
            )


def require_reachable(min_clients: int, cohort: int) -> None:
    """Raises ValueError unless a round of ``cohort`` clients can have so many updates."""
    if require_at_least("min_clients", min_clients, 1) > cohort:
        raise ValueError(f"min_clients={min_clients}, but a round draws {cohort} clients")


def require_deadline(deadline: object, cluster: Cluster) -> float | None:
    """Returns the seconds of a round's deadline, or None.

    Raises:
        ValueError: It is no number above 0, or the workers are inline and cannot be killed.
    """
    if deadline is None:
        return None
    seconds = require_positive("deadline", deadline)
    if cluster.transport == "inline":
        raise ValueError(
            "deadline needs worker processes: inline workers are threads of this process, and "
            "nothing can end them; use transport='process'"
        )
    return seconds


def require_alone(vectorize: object, privacy: object, secure: object) -> None:
    """Checks that clients that must be protected one by one are not trained in stacks.

    Raises:
        ValueError: They would be.
    """
    protected = "privacy" if privacy is not None else "secure" if secure is not None else None
    if vectorize and protected:
        raise ValueError(
            f"vectorize={vectorize!r} trains many clients as one, but {protected}= protects each "
            "update before it leaves its client. Leave vectorize out."
        )
