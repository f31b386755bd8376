"""Which workers there are, as what they run, and on which device. Runs in the parent.

What a cluster is asked to be is checked here. No torch: whether a device is there is for its
worker to say.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fedproc.errors import ClosedError, FedprocError, NotShippableError, WorkerLostError
from fedproc.memory.pages import usable_cores
from fedproc.ranges import as_whole
from fedproc.transport.base import Transport
from fedproc.transport.inline import InlineTransport
from fedproc.transport.process import ProcessTransport

if TYPE_CHECKING:
    from fedproc.cluster.cluster import Cluster

_MOST_WORKERS = 4096
"""More processes than one machine is of use for: a slip of the finger shall not fill its memory."""
_SHOWN_LOST = 4
"""Lost workers that an error names."""


def names_of(workers: int | Iterable[str] | None) -> list[str]:
    """The workers' names: as given, or ``worker-0`` ...; one per usable core for None.

    Raises:
        ValueError: no names and no whole number, no workers, or a name that is no text, is given
            twice or cannot be written as UTF-8.
    """
    if workers is None:
        workers = usable_cores()
    if isinstance(workers, str):
        raise ValueError(f"workers must be a list of names: [{workers!r}]")
    number = as_whole(workers)
    if number is not None:
        if number < 1:
            raise ValueError(f"a cluster needs at least one worker, not {number}")
        if number > _MOST_WORKERS:
            raise ValueError(f"a cluster has at most {_MOST_WORKERS} workers, not {number}")
        return [f"worker-{number}" for number in range(number)]
    try:
        names = iter(workers)  # type: ignore[arg-type]  # a number is none of the usual ones
    except TypeError:
        raise ValueError(
            f"workers must be names or a whole number of at least 1, got {workers!r}"
        ) from None
    return _distinct(list(names))


def _distinct(names: list[str]) -> list[str]:
    if not names:
        raise ValueError("a cluster needs at least one worker: the list of names is empty")
    for name in names:
        if type(name) is not str or not name:
            raise ValueError(f"a worker's name is a text that is not empty, not {name!r}")
        if "\0" in name or any("\ud800" <= sign <= "\udfff" for sign in name):
            # its process is told the name, and half of a pair of surrogates has no bytes
            raise ValueError(f"a worker's name must be UTF-8 without zero bytes, not {name!r}")
        if names.count(name) > 1:
            raise ValueError(f"the name {name!r} is given twice; every worker needs its own")
    return names


def make_transport(kind: str, preload: tuple[str, ...]) -> Transport:
    """The transport of that name, which begins to prepare itself.

    Raises:
        ValueError: there is no such transport.
        WorkerStartError: the zygote could not be started.
    """
    if kind == "process":
        return ProcessTransport(preload)
    if kind == "inline":
        return InlineTransport(preload)
    raise ValueError(f'transport must be "process" or "inline", not {kind!r}')


def dealt(devices: Iterable[Any] | None) -> Iterator[str]:
    """Names of devices, in turn and without an end; None: the CPU.

    Raises:
        ValueError: one name in place of a list, or an empty list.
    """
    if isinstance(devices, str) or not (devices is None or isinstance(devices, Iterable)):
        raise ValueError(f"devices must be a list, such as [{devices!r}]")
    names = ["cpu"] if devices is None else [str(device) for device in devices]
    if not names:
        raise ValueError("the list of devices is empty; leave it out, and workers use the CPU")
    return itertools.cycle(names)


def not_shippable(cluster: "Cluster") -> NotShippableError:
    """For whoever pickles or copies a cluster, or what works with it."""
    return NotShippableError(
        f"{cluster!r} belongs to this process: neither it nor what works with it (a dataset, an "
        "aggregator) can be pickled, copied or captured by a function that runs in a worker. Pass "
        "what the function needs as arguments; aggregator.save(path) keeps a run."
    )


def closed_error(doing: str) -> ClosedError:
    """For what needs the workers of a cluster that is closed."""
    return ClosedError(
        f"{doing}: the cluster is closed; its workers and what they held are gone. Do it before "
        "the end of the `with` block, or make a new Cluster."
    )


def none_left(cluster: "Cluster", last: str | None = None) -> FedprocError:
    """Why no worker of a cluster is alive: it was closed, or all were lost.

    Args:
        cluster: whose workers are gone.
        last: name of the one that was lost last, if that is known; it is named first.
    """
    if cluster.closed:
        return closed_error("federated data")
    ends = {name: worker.link.end for name, worker in cluster._workers.items()}
    names = sorted(ends, key=lambda name: name != last)
    shown = [f"{name!r} ended{_how(ends[name])}" for name in names[:_SHOWN_LOST]]
    if len(names) > len(shown):
        shown.append(f"and {len(names) - len(shown)} more")
    remedy = (
        "They are replaced when they are asked for, and were lost again: look at what ends them."
        if cluster._restart
        else "Make the cluster with Cluster(restart=True), which replaces the lost, or start one "
        f"again with cluster.replace(cluster[{names[0]!r}]); federated data comes back by itself."
    )
    end = ends[names[0]]
    lost = end if isinstance(end, WorkerLostError) else WorkerLostError("")
    return WorkerLostError(
        f"no worker of the cluster is alive: {', '.join(shown)}. {remedy}",
        worker=names[0],
        exitcode=lost.exitcode,
        last_command=lost.last_command,
    )


def _how(end: FedprocError | None) -> str:
    if not isinstance(end, WorkerLostError) or end.exitcode is None:
        return ""
    return f" with exit code {end.exitcode}" if end.signal is None else f" by {end.signal.name}"
