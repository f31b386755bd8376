"""Looking into objects on behalf of their pointers. Runs in the worker, named by commands."""

from typing import Any

import torch
from torch import nn

from fedproc.wire.commands import DETACHED


def method(target: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method."""
    return getattr(target, name)(*args, **kwargs)


def call(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an object."""
    return target(*args, **kwargs)


def truth(target: Any) -> bool:
    """Truth of an object."""
    return bool(target)


def kind_of(target: Any, name: str) -> str:
    """What attribute ``name`` is: missing, none, tensor, module, method or value."""
    try:
        value = getattr(target, name)
    except AttributeError:
        return "missing"
    if value is None:
        return "none"
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, nn.Module):
        return "module"
    return "method" if callable(value) else "value"


def parameter_names(module: nn.Module, recurse: bool = True) -> list[str]:
    """Names of the parameters, tied ones once."""
    return [name for name, _ in module.named_parameters(recurse=recurse)]


def state_names(module: nn.Module) -> list[str]:
    """Names of the tensors of ``state_dict``."""
    state = module.state_dict()
    return [name for name, value in state.items() if isinstance(value, torch.Tensor)]


def step(whole: Any, part: str | int) -> Any:
    """A part of an object: an attribute, an item, or what a module adds to its ``state_dict``."""
    if part == "_extra_state":
        return whole.get_extra_state()
    if part == DETACHED:
        return whole.detach()
    return getattr(whole, part) if isinstance(part, str) else whole[part]


def has_gradient(tensor: torch.Tensor) -> bool:
    """Whether a leaf has a gradient."""
    return tensor.grad is not None


def set_attribute(tensor: torch.Tensor, name: str, value: Any) -> None:
    """Set ``grad``, ``requires_grad`` or ``data``."""
    setattr(tensor, name, value)


def attribute(target: Any, name: str) -> Any:
    """An attribute; an AttributeError raised while it is computed is not 'no such attribute'."""
    return getattr(target, name)


def copy(target: Any) -> Any:
    """An independent copy: a tensor becomes a new leaf without gradient."""
    if isinstance(target, torch.Tensor):
        twin = target.detach().clone()
        if isinstance(target, nn.Parameter):
            return nn.Parameter(twin, requires_grad=target.requires_grad)
        return twin.requires_grad_(target.requires_grad)
    from copy import deepcopy

    return deepcopy(target)
