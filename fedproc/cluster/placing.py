"""Which workers there are, as what they run, and on which device. Runs in the parent.

No torch here: whether a device is there is for its worker to say.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from fedproc.memory.pages import usable_cores
from fedproc.transport.base import Transport
from fedproc.transport.inline import InlineTransport
from fedproc.transport.process import ProcessTransport


def names_of(workers: int | Iterable[str] | None) -> list[str]:
    """The workers' names: as given, or ``worker-0`` ...; one per usable core for None.

    Raises:
        ValueError: no workers, or a name that is empty or given twice.
    """
    if workers is None:
        workers = usable_cores()
    if isinstance(workers, bool):
        raise ValueError("workers must be a number or names, not a bool")
    if isinstance(workers, int):
        if workers < 1:
            raise ValueError(f"a cluster needs at least one worker, not {workers}")
        return [f"worker-{number}" for number in range(workers)]
    if isinstance(workers, str):
        raise ValueError(f"workers must be a list of names: [{workers!r}]")
    names = list(workers)
    if not names:
        raise ValueError("a cluster needs at least one worker: the list of names is empty")
    for name in names:
        if not name or type(name) is not str:
            raise ValueError(f"a worker's name is a text that is not empty, not {name!r}")
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
