"""What has to be on the worker's device, and what has to come home. Runs in worker processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    import torch

    from fedproc.client.gradients import Loss


def placed_loss(loss: Loss | None, device: torch.device) -> Loss | None:
    """Moves a loss that is a module, such as CrossEntropyLoss with weights, to ``device``."""
    return loss.to(device) if isinstance(loss, nn.Module) else loss


def at_home(value: Any) -> Any:
    """Returns what a client keeps with its tensors on the CPU: the parent may have no such device.

    Looks into dicts and lists, which is all that a checkpoint takes.
    """
    if isinstance(value, Tensor):
        return value.cpu()
    if type(value) is dict:
        return {key: at_home(item) for key, item in value.items()}
    if type(value) is list:
        return [at_home(item) for item in value]
    return value
