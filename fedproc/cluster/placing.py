"""Which worker computes on which device. Runs in the parent.

No torch here: whether a device is there is for its worker to say.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any


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
