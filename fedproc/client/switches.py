"""What code of users may switch on in torch: it ends with the client. Runs in workers.

A train function may enter ``torch.autocast`` and fail before it leaves it, or choose deterministic
algorithms for good; the next client must not find it, since it need not train in the same worker.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from fedproc import autocast

if TYPE_CHECKING:
    from collections.abc import Callable

    _Switch = tuple[Callable[[], Any], Callable[[Any], object]]


class Switches:
    """Switches of torch as they were when this was made, by the parent's modes for instance."""

    __slots__ = ("_before", "_switches")

    def __init__(self, device: torch.device) -> None:
        """Looks at them; ``device``: where clients train."""
        own = () if device.type == "cpu" else _autocast(device.type)
        self._switches = (*_EVERYWHERE, *own)
        self._before = [read() for read, _ in self._switches]

    def put_back(self) -> None:
        """Makes all of them what they were."""
        now = [read() for read, _ in self._switches]
        for (_, write), found, before in zip(self._switches, now, self._before, strict=True):
            if found != before:
                write(before)
        # autocast keeps what it made of parameters, and finds it by the tensors, which stay
        torch.clear_autocast_cache()


def _autocast(kind: str) -> tuple[_Switch, ...]:
    return (
        (partial(torch.is_autocast_enabled, kind), partial(torch.set_autocast_enabled, kind)),
        (partial(torch.get_autocast_dtype, kind), partial(torch.set_autocast_dtype, kind)),
    )


def _default_device() -> torch.device | None:
    """What ``torch.set_default_device`` was told; torch's own way to ask walks all modes."""
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device


_EVERYWHERE: Final[tuple[_Switch, ...]] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (_default_device, torch.set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    *_autocast("cpu"),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (autocast.depth, autocast.go_to),
)
