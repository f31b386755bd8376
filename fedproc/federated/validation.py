"""Checks of arguments, at construction, with errors that say what would be right.

Runs in the parent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.cluster.placing import closed_error
from fedproc.errors import with_article
from fedproc.federated.strategies import Strategy
from fedproc.ranges import require_at_least, require_positive


def require_cluster(cluster: object) -> None:
    """Raises ValueError unless this is a cluster, and ClosedError if it is closed."""
    if not isinstance(cluster, Cluster):
        raise ValueError(f"cluster must be a fedproc.Cluster, got {_kind(cluster)}")
    require_open(cluster, "federated data")


def require_open(cluster: Cluster, doing: str) -> None:
    """Raises ClosedError if the cluster is closed; ``doing`` is what needs it."""
    if cluster.closed:
        raise closed_error(doing)


def require_clients(name: str, given: object, what: str) -> None:
    """Raises ValueError unless ``given`` maps clients to something; ``what`` says to what."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} must be a dict of client -> {what}, got {_kind(given)}")


def require_functions(name: str, given: object) -> None:
    """Raises ValueError unless ``given`` maps clients to what can be called."""
    require_clients(name, given, "function without arguments")
    for client, make in dict(given).items():  # type: ignore[call-overload]  # it was looked at
        if not callable(make):
            raise ValueError(
                f"{name}: that of client {client!r} must be a function without arguments, got "
                f"{_kind(make)}"
            )


def require_metrics(metrics: object) -> None:
    """Raises ValueError unless ``metrics`` is None or maps names to functions."""
    if metrics is None:
        return
    if not isinstance(metrics, Mapping) or not all(map(callable, metrics.values())):
        raise ValueError(
            "metrics must be a dict of name -> function of outputs and targets, as in "
            f'{{"errors": count_errors}}, got {_kind(metrics)}'
        )


def require_parts(model: object, data: object, local: object, strategy: object) -> None:
    """Checks what an aggregator is made of.

    Raises:
        ValueError: It cannot be made of these.
        ClosedError: The cluster of the data is closed.
    """
    from fedproc.federated.data import FederatedDataset  # which checks its own arguments here

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
        require_open(data.cluster, "Aggregator")
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


def callables(callbacks: object) -> tuple[Callable[..., Any], ...]:
    """Returns the callbacks as a tuple.

    Raises:
        ValueError: They are no list, or one of them cannot be called.
    """
    if not isinstance(callbacks, Iterable) or isinstance(callbacks, str):
        kind, remedy = _kind(callbacks), ""
        if callable(callbacks):
            remedy = "; pass [fn]" if kind == "a function" else "; pass it in a list"
        raise ValueError(f"callbacks must be a list of callables, got {kind}{remedy}")
    found = tuple(callbacks)
    for callback in found:
        if not callable(callback):
            raise ValueError(
                f"a callback must be callable as (aggregator, record), got {callback!r}"
            )
    return found


def _kind(value: object) -> str:
    """Says what came in place of what was asked for; data are not shown."""
    if value is None:
        return "None"
    if inspect.isroutine(value):
        return "a function"
    return with_article(type(value).__qualname__)


def require_reachable(min_clients: object, cohort: int) -> int:
    """Returns the number of updates that a round of ``cohort`` clients must have.

    Raises:
        ValueError: It is no number of at least 1, or the round cannot have so many.
    """
    least = require_at_least("min_clients", min_clients, 1)
    if least > cohort:
        raise ValueError(f"min_clients={least}, but a round draws {cohort} clients")
    return least


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
