"""``tensor.send(worker)`` and ``module.send(worker)``, by choice. Runs in the parent."""

from typing import Any

import torch
from torch import nn

_CLASSES: tuple[Any, ...] = (torch.Tensor, nn.Module)


def _send(self: Any, worker: Any, **options: Any) -> Any:
    """Copy this to ``worker``: a pointer; options as of ``Worker.send``."""
    return worker.send(self, **options)


def hook_torch() -> None:
    """Give tensors and modules a method ``send(worker)``. Nothing else changes; idempotent.

    Raises:
        RuntimeError: one of the classes has another ``send`` already.
    """
    for cls in _CLASSES:
        if getattr(cls, "send", _send) is not _send:
            raise RuntimeError(f"{cls.__qualname__} has a method send() already, not fedproc's")
    for cls in _CLASSES:
        cls.send = _send


def unhook_torch() -> None:
    """Take ``send`` away again; idempotent."""
    for cls in _CLASSES:
        if cls.__dict__.get("send") is _send:
            del cls.send
