"""Which models and losses come to the same operations in every step. Runs in workers.

A module whose code a user wrote may count its calls, draw lots in Python or look at a file; what
was captured would go on as it did the first time, and nobody would notice. So only torch's own
modules are taken, of which it is known, with torch's own losses, and only while nobody listens in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules

_MODULES: Final = frozenset[type]({
    nn.Sequential, nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear, nn.Embedding,
    nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid,
    nn.Softmax, nn.LogSoftmax,
})  # fmt: skip
_LOSSES: Final = frozenset[type]({
    nn.CrossEntropyLoss, nn.NLLLoss, nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss,
    nn.BCELoss, nn.BCEWithLogitsLoss,
})  # fmt: skip
_LOSS_FUNCTIONS: Final = frozenset[Any]({
    F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss,
    F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
})  # fmt: skip


class Repeatable:
    """A model with a loss, and whether what was captured of them holds.

    Attributes:
        known: Their parameters and buffers, the loss's too.
        parameters: Those that are trained.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        """Looks at what they are made of."""
        self._parts = list(model.modules())
        self._is_known = is_repeatable(model, loss)
        if isinstance(loss, nn.Module):
            self._parts.extend(loss.modules())
        self.known = [t for part in self._parts for t in _tensors_of(part)]
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def holds(self) -> bool:
        """Whether nobody would notice now that torch's modules, or its graph, are left out."""
        return self._is_known and not (
            modules._has_any_global_hook()  # type: ignore[no-untyped-call]
            or any(_is_changed(part) for part in self._parts)
            or any(_is_different(parameter) for parameter in self.parameters)
            or torch.is_anomaly_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch.is_inference_mode_enabled()
            or torch._C._len_torch_function_stack()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._autograd._profiler_enabled()
        )


def is_repeatable(model: nn.Module, loss: Callable[..., Tensor]) -> bool:
    """Whether model and loss are made of torch's own parts, on the CPU."""
    parts = list(model.modules())
    known = all(type(part) in _MODULES and not _is_special(part) for part in parts)
    if isinstance(loss, nn.Module):
        known = known and type(loss) in _LOSSES
        parts.append(loss)
    elif all(loss is not function for function in _LOSS_FUNCTIONS):
        return False
    return known and all(tensor.is_cpu for part in parts for tensor in _tensors_of(part))


def _is_special(part: nn.Module) -> bool:
    """Whether an embedding has sparse gradients, or writes to its parameter in the forward pass."""
    return bool(getattr(part, "sparse", False) or getattr(part, "max_norm", None))


def _tensors_of(part: nn.Module) -> list[Tensor]:
    return [*part.parameters(recurse=False), *part.buffers(recurse=False)]


def _is_changed(part: nn.Module) -> bool:
    own = vars(part)
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or "_compiled_call_impl" in own
        or not own["training"]
    )


def _is_different(parameter: Tensor) -> bool:
    hooked = parameter._backward_hooks or parameter._post_accumulate_grad_hooks
    return bool(hooked or not parameter.requires_grad)
