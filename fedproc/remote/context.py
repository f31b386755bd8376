"""Modes of the calling thread that travel with a command. Runs in the parent.

See ``worker.modes`` for the other end.
"""

import sys
from types import FrameType
from typing import Any

import torch
from torch import get_default_dtype, is_autocast_enabled, is_grad_enabled

from fedproc.errors import PlacementError
from fedproc.remote.operations import is_pointer

_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def modes() -> tuple[Any, ...] | None:
    """``(grad, inference, autocast, default dtype)``, None where all of it is as usual.

    Raises:
        PlacementError: gradients are off because a ``torch.autograd.Function`` was applied here.
    """
    grad = is_grad_enabled()
    if not grad:
        _require_no_function()
    autocast = is_autocast_enabled("cpu")
    dtype = get_default_dtype()
    if grad and not autocast and dtype is torch.float32:
        return None
    cast = (
        (torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()) if autocast else None
    )
    return grad, torch.is_inference_mode_enabled(), cast, dtype


def _require_no_function() -> None:
    """Refuse what a ``torch.autograd.Function`` that was applied to pointers does in its forward.

    Torch runs it here, sees no tensor, and would never call its backward: gradients would be wrong
    without a word. With a tensor of this process among its arguments it is a step of this
    process's autograd, and may use pointers as it likes.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not _APPLY:
        frame = frame.f_back
    if frame is None:
        return
    name, args = frame.f_locals["cls"].__qualname__, frame.f_locals["args"]
    if any(map(is_pointer, args)) and not any(isinstance(arg, torch.Tensor) for arg in args):
        raise PlacementError(
            f"{name} is a torch.autograd.Function: applied to pointers it runs in this process, "
            "and its backward would never be called. Run it where the data is: "
            f"worker.run({name}.apply, pointer)."
        )
