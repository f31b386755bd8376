"""Modes of the parent's thread that hold for the commands it issues. Runs in the worker.

On the wire: ``None`` where everything is as usual, else ``(grad, inference, autocast, dtype)``
with ``autocast`` = ``(dtype, cache)`` or None and ``dtype`` the default dtype.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from fedproc import autocast


def usual() -> None:
    """After arbitrary code: the modes are the parent's again, whatever it has set."""
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
    if torch.get_default_dtype() is not torch.float32:
        torch.set_default_dtype(torch.float32)
    _leave_autocast()


@contextlib.contextmanager
def applied(modes: tuple[Any, ...] | None) -> Iterator[None]:
    """Run under the parent's modes; the worker's come back afterwards."""
    if modes is None:
        try:
            yield
        finally:
            usual()
        return
    grad, inference, cast, dtype = modes
    with contextlib.ExitStack() as stack:
        stack.callback(_leave_autocast)
        if inference:
            stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.set_grad_enabled(grad))
        if cast is not None:
            kind, cache = cast
            stack.enter_context(torch.autocast("cpu", dtype=kind, cache_enabled=cache))
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _leave_autocast() -> None:
    """End what was entered by hand."""
    if not autocast.depth() and not torch.is_autocast_enabled("cpu"):
        return
    for kind in ("cpu", "cuda"):
        torch.set_autocast_enabled(kind, False)
    torch.set_autocast_dtype("cpu", torch.bfloat16)
    autocast.go_to(0)
    torch.clear_autocast_cache()
