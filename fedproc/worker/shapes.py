"""Shapes that do not tell values. Runs in the worker.

The shape of a private tensor may be known: whoever sent it knows it. But what a mask selects, how
many values are unique, or what a function makes of the values has a shape that tells of them. So
the result of an operation on private tensors shows its shape only if the operation gives the same
shape without seeing a value: it is repeated on tensors that have none (torch's ``meta`` device).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fedproc.wire import commands
from fedproc.wire.names import resolve
from fedproc.worker import parts
from fedproc.worker.store import Entry

_OF_SHAPE = frozenset(
    """Tensor.size Tensor.dim Tensor.ndimension Tensor.numel Tensor.nelement Tensor.element_size
    Tensor.stride Tensor.is_contiguous Tensor.is_floating_point Tensor.is_complex Tensor.is_signed
    Tensor.storage_offset Tensor.type Tensor.get_device Tensor.is_same_size Tensor.is_coalesced
    Tensor.sparse_dim Tensor.dense_dim Tensor.is_inference torch.numel torch.is_floating_point
    torch.is_complex torch.is_signed torch.is_same_size torch.result_type torch.can_cast
    builtins.len fedproc.worker.parts.has_gradient fedproc.worker.parts.kind_of
    fedproc.worker.parts.parameter_names fedproc.worker.parts.state_names""".split()
)
"""Functions that answer about the shape or names of an object, not about its values."""
_OF_TYPE = ("dtype", "device", "requires_grad", "is_leaf", "layout")
_PROPERTIES = ("shape", "ndim", "nbytes", *_OF_TYPE)
_FOLLOWING = ("T", "data", "grad", "H", "mT", "mH", "real", "imag")


def tells_only_shape(command: commands.Compute, private: Sequence[Entry]) -> bool:
    """Whether the answer tells no value of these objects."""
    if command.function == "builtins.getattr":
        if len(command.args) != 2 or not isinstance(command.args[0], torch.Tensor):
            return False
        if command.args[1] in _OF_TYPE:
            return True
        known = command.args[1] in _PROPERTIES
    else:
        known = command.function in _OF_SHAPE
    return known and all(entry.open_shape for entry in private)


def shape_is_open(command: commands.Call, result: Any, used: Sequence[Entry]) -> bool:
    """Whether the shape of a result computed from private objects follows from shapes alone."""
    if not all(entry.open_shape for entry in used if entry.domain.private):
        return False
    name, args = command.function, command.args
    if name == f"{parts.__name__}.copy":
        return True
    if name == f"{parts.__name__}.call":
        return isinstance(args[0], nn.Module) and _is_of_torch(args[0])
    if name == "builtins.getattr":
        return isinstance(args[0], torch.Tensor) and args[1] in _FOLLOWING
    of_torch = isinstance(name, str) and name.startswith(("operator.", "Tensor.", "torch."))
    return of_torch and _is_same_without_values(resolve(name), command, result)


def _is_same_without_values(function: Any, command: commands.Call, result: Any) -> bool:
    shapes = [tensor.shape for tensor in _tensors(result)]
    if not shapes or isinstance(function, type):
        return False
    try:
        with torch.no_grad():
            twin = function(*_without_values(command.args), **_without_values(command.kwargs))
    except Exception:  # noqa: BLE001 - it wants values, or cannot run without them
        return False
    return shapes == [tensor.shape for tensor in _tensors(twin)]


def _is_of_torch(module: nn.Module) -> bool:
    """Whether it runs code of torch only, whose modules give shapes that depend on shapes."""
    return all(
        type(part).__module__.startswith("torch.nn.modules.")
        and not part._forward_hooks
        and not part._forward_pre_hooks
        and "forward" not in vars(part)
        for part in module.modules()
    )


def _without_values(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("meta")
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_without_values(item) for item in value)
    if isinstance(value, dict):
        return {key: _without_values(item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_without_values(part) for part in (value.start, value.stop, value.step)))
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
