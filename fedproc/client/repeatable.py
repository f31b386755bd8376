"""Which models and losses come to the same operations in every step. Runs in workers.

A module whose code a user wrote may count its calls, draw lots in Python or look at a file; what
was captured would go on as it did the first time, and nobody would notice. So torch's own modules
and losses are taken, of which it is known, and users' whose code cannot do such things
(:mod:`fedproc.client.pure`), and only while nobody listens in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules

from fedproc.client.pure import ImpureError, Read, reads_of_function, reads_of_module
from fedproc.client.stepping import home_of

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
_CONTAINERS: Final = frozenset[type]({nn.ModuleList, nn.ModuleDict})
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
        self._parts = [*model.modules(), *(loss.modules() if isinstance(loss, nn.Module) else ())]
        self.known = [
            tensor
            for part in self._parts
            for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False))
        ]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        trained = set(map(id, self.parameters))
        # a subclass may do anything in any operation
        plain = all(type(t) in (Tensor, nn.Parameter) and t.is_cpu for t in self.known)
        can_be = plain and all(id(t) in trained or not t.requires_grad for t in self.known)
        self._reads = _reads(model, loss) if can_be else None
        self._default_dtype = torch.get_default_dtype()

    def holds(self) -> bool:
        """Whether nobody would notice now that modules, functions and graph are left out."""
        return self._reads is not None and not (
            modules._has_any_global_hook()  # type: ignore[no-untyped-call]
            or any(_is_changed(part) for part in self._parts)
            or any(map(is_watched, self.parameters))
            or not all(map(_is_same, self._reads))
            or torch.get_default_dtype() is not self._default_dtype
            or torch.is_anomaly_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch.is_inference_mode_enabled()
            or torch._C._len_torch_function_stack()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._autograd._profiler_enabled()
            or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        )


def _reads(model: nn.Module, loss: Callable[..., Tensor]) -> list[Read] | None:
    """Lists what the code of model and loss reads; None if they cannot be captured."""
    parts = list(model.modules())
    try:
        found = _reads_of_loss(loss)
        found += [_forward(kind) for kind in {type(part) for part in parts} & _MODULES]
        found.append(_torchs(vars(nn.Module), "__call__"))
        for part in parts:
            if type(part) not in _MODULES | _CONTAINERS:
                found += reads_of_module(part)
            elif _is_special(part):
                return None
    except ImpureError:
        return None
    return list({(id(read.home), read.name): read for read in found}.values())


def _reads_of_loss(loss: Callable[..., Tensor]) -> list[Read]:
    if any(loss is function for function in _LOSS_FUNCTIONS):
        return []
    if not isinstance(loss, nn.Module):
        return reads_of_function(loss)
    if type(loss) not in _LOSSES or _is_special(loss):
        raise ImpureError(f"{type(loss).__name__} is no loss of torch, or a special one")
    # the user's factory of optimizers may have it, too, and change it from client to client
    state = [Read(home, n, v) for home in (vars(loss), loss._buffers) for n, v in home.items()]
    return [_forward(type(loss)), *state]


def _forward(kind: type[nn.Module]) -> Read:
    """What a class of torch computes."""
    home = next(vars(base) for base in kind.__mro__ if "forward" in vars(base))
    return _torchs(home, "forward")


def _torchs(home: Mapping[str, Any], name: str) -> Read:
    """A method of torch's; somebody may have replaced it, or may do so later."""
    method = home[name]
    if not home_of(method).startswith("torch.nn.modules."):
        raise ImpureError(f"{name} was replaced")
    return Read(home, name, method)


def _is_special(part: nn.Module) -> bool:
    """Whether a module of torch does something that cannot be captured, or was patched.

    Embeddings may have sparse gradients, or write to their parameter in the forward pass. Smoothing
    with class weights sums them in another order while operations are written down.
    """
    own = vars(part)
    if own.get("sparse") or own.get("max_norm"):
        return True
    if own.get("label_smoothing") and getattr(part, "weight", None) is not None:
        return True
    return bool(patches_of(part))


def _is_changed(part: nn.Module) -> bool:
    own = vars(part)
    return bool(
        any(hooks_of(part))
        or "forward" in own
        or "_compiled_call_impl" in own
        or not own["training"]
    )


def hooks_of(part: nn.Module) -> tuple[dict[int, Any], ...]:
    """The hooks that run when a module is called, and on the way back."""
    own = vars(part)
    return (
        own["_forward_hooks"],
        own["_forward_pre_hooks"],
        own["_backward_hooks"],
        own["_backward_pre_hooks"],
    )


def patches_of(part: nn.Module | torch.optim.Optimizer) -> list[str]:
    """Names of methods of the class in whose place an object has something of its own."""
    return [name for name in vars(part) if callable(getattr(type(part), name, None))]


def is_watched(parameter: Tensor) -> bool:
    """Whether somebody wants to see the gradients of a parameter."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _is_same(read: Read) -> bool:
    return read.home.get(read.name) is read.value
