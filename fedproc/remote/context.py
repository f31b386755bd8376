"""Modes of the calling thread that travel with a command. Runs in the parent.

See ``worker.modes`` for the other end.
"""

from typing import Any

import torch
from torch import get_default_dtype, is_autocast_enabled, is_grad_enabled


def modes() -> tuple[Any, ...] | None:
    """``(grad, inference, autocast, default dtype)``, None where all of it is as usual."""
    grad = is_grad_enabled()
    autocast = is_autocast_enabled("cpu")
    dtype = get_default_dtype()
    if grad and not autocast and dtype is torch.float32:
        return None
    cast = (
        (torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()) if autocast else None
    )
    return grad, torch.is_inference_mode_enabled(), cast, dtype
