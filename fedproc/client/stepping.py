"""One step of an optimizer, without what torch wraps around it for profilers and compilers.

Runs in worker processes. A small model spends as much time in those wrappers as in the step: an
annotation for the profiler and two marks for the compiler, each time. Here the same function of the
same optimizer runs without them, so the bits are the same. Whatever somebody could notice (hooks,
a step that a scheduler or a subclass replaced) goes the ordinary way.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as optimizers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

Step = Callable[[], Any]

_ZERO_GRAD: Final = Optimizer.zero_grad
_SGD_STEP: Final = inspect.unwrap(torch.optim.SGD.step)


def step_of(optimizer: Optimizer) -> Step:
    """Returns what takes a step: the optimizer's own ``step``, or what torch wraps in it."""
    raw = _unwrapped(type(optimizer).step)
    if raw is None or is_observed(optimizer):
        return optimizer.step
    plain = raw is _SGD_STEP and type(optimizer) is torch.optim.SGD

    def step() -> None:
        if is_observed(optimizer):  # a hook that was added since, by a loss or by a module
            optimizer.step()
            return
        with torch.no_grad():
            if plain and all(map(_is_plain, optimizer.param_groups)):
                for group in optimizer.param_groups:
                    descend(group["params"], [p.grad for p in group["params"]], group["lr"])
            else:
                raw(optimizer)

    return step


def _is_plain(group: Mapping[str, Any]) -> bool:
    """Whether a step of SGD does nothing but subtract ``lr`` times the gradient."""
    extras = group["momentum"] or group["weight_decay"] or group["maximize"]
    return not (extras or group["foreach"] or group["fused"]) and type(group["lr"]) is float


def descend(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], lr: float) -> None:
    """Takes the step of plain SGD: the very operation that torch's own does in the end.

    Called without gradients or below autograd. A parameter whose gradient is None stays as it is.
    """
    moved = [p for p, along in zip(parameters, gradients, strict=True) if along is not None]
    if moved:
        torch._foreach_add_(moved, [along for along in gradients if along is not None], alpha=-lr)


def plain_lr(optimizer: Optimizer) -> float | None:
    """Returns the learning rate if a step does nothing but :func:`descend` on all parameters."""
    groups = optimizer.param_groups
    if type(optimizer) is not torch.optim.SGD or is_observed(optimizer):
        return None
    if len(groups) == 1 and _is_plain(groups[0]):
        return float(groups[0]["lr"])
    return None


def zero_grad_of(optimizer: Optimizer) -> Step:
    """Returns what forgets the gradients of an optimizer's parameters."""
    if type(optimizer).zero_grad is not _ZERO_GRAD or "zero_grad" in vars(optimizer):
        return optimizer.zero_grad

    def zero_grad() -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                _forget(parameter)

    return zero_grad


def steps_by_torch(kind: type[Optimizer]) -> bool:
    """Whether the steps of a class, and forgetting gradients, are torch's own code."""
    return _unwrapped(kind.step) is not None and kind.zero_grad is _ZERO_GRAD


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


@functools.lru_cache(maxsize=64)
def _unwrapped(step: Callable[..., Any]) -> Callable[[Optimizer], Any] | None:
    """Returns the step as it was written in torch; None if it, or a wrapper, is not torch's."""
    while (inner := getattr(step, "__wrapped__", None)) is not None:
        if home_of(step) != "torch.optim.optimizer":
            return None
        step = inner
    return step if home_of(step).startswith("torch.optim.") else None


def home_of(function: Callable[..., Any]) -> str:
    """Returns the module whose code it is; ``__module__`` is copied by wrappers, this is not."""
    return str(getattr(function, "__globals__", {}).get("__name__"))


def is_observed(optimizer: Optimizer) -> bool:
    """Whether somebody has a part in the steps of an optimizer, or wants to see them."""
    return bool(
        "step" in vars(optimizer)
        or optimizer.defaults.get("differentiable")
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or all_are_observed()
    )


def all_are_observed() -> bool:
    """Whether somebody wants to see the steps of all optimizers."""
    return bool(
        optimizers._global_optimizer_pre_hooks
        or optimizers._global_optimizer_post_hooks
        or torch._C._autograd._profiler_enabled()
    )
