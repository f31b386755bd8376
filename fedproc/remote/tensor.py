"""TensorPointer: reads like a tensor, runs in its worker. Runs in the parent.

Operators, methods and torch functions become commands; nothing waits until a value, a shape or
the like is asked for. What it tells of shape, dtype and so on is the remote tensor's.
"""

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from fedproc.errors import PlacementError
from fedproc.remote import reading
from fedproc.remote.calls import Operand, compute, operate, order, part, run_there
from fedproc.remote.facts import facts
from fedproc.remote.operations import REFUSED, TENSOR_METHODS, TENSOR_PROPERTIES
from fedproc.remote.operators import with_operators
from fedproc.remote.pointer import Pointer


@with_operators(operate)
class TensorPointer(Operand, kind="tensor"):
    """A pointer to a tensor.

    Operators, indexing, every method of ``torch.Tensor`` and every function of ``torch`` run
    where the tensor is and give pointers; questions with a plain answer (``item``, ``tolist``,
    ``torch.equal``, ``float``) wait for it.
    """

    __slots__ = ()

    # ---- told by the worker

    @property
    def shape(self) -> torch.Size:
        """Shape of the remote tensor."""
        shape = facts(self)["shape"]
        if shape is None:  # torch has none, or it would tell private values: the worker refuses
            shape = compute("builtins.getattr", (self, "shape"), what="shape")
        return torch.Size(shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the remote tensor."""
        found: torch.dtype = facts(self)["dtype"]
        return found

    @property
    def device(self) -> torch.device:
        """Device of the remote tensor."""
        found: torch.device = facts(self)["device"]
        return found

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def is_leaf(self) -> bool:
        """Whether it is a leaf of its autograd graph."""
        return bool(facts(self)["is_leaf"])

    @property
    def requires_grad(self) -> bool:
        """Whether operations on it are recorded."""
        return bool(facts(self)["requires_grad"])

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self._set("requires_grad", value)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one dimension of it."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Number of dimensions."""
        return self.ndim

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    def __len__(self) -> int:
        """Size of the first dimension."""
        shape = self.shape
        if not shape:
            # also who asks for a list of pointers to become one local tensor gets here
            raise PlacementError(
                f"len() of a 0-d tensor: {self!r} is in another process and becomes no part of a "
                "local tensor by itself. Take its value, pointer.item(), or join pointers where "
                "they are: torch.stack([...])."
            )
        return shape[0]

    # ---- parts

    @property
    def grad(self) -> "TensorPointer | None":
        """Pointer to the gradient, or None."""
        there = compute("fedproc.worker.parts.has_gradient", (self,), what="grad")
        if not there:
            return None
        return part(TensorPointer, self, ("grad",))

    @grad.setter
    def grad(self, value: "TensorPointer | None") -> None:
        self._set("grad", value)

    @property
    def data(self) -> "TensorPointer":
        """The tensor without autograd; shares its memory."""
        return part(TensorPointer, self, ("data",))

    @data.setter
    def data(self, value: "TensorPointer") -> None:
        self._set("data", value)

    def _set(self, name: str, value: Any) -> None:
        order("fedproc.worker.parts.set_attribute", (self, name, value), {}, what=f"set {name}")

    def __getattr__(self, name: str) -> Any:
        """Properties that need the worker; anything else does not exist."""
        if name.startswith("_") or not hasattr(torch.Tensor, name):
            why = "no private name is asked for there" if name[:1] == "_" else "a tensor has none"
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}: {why}")
        if name in REFUSED:
            raise PlacementError(f"{name}: {REFUSED[name]}.")
        if name in TENSOR_PROPERTIES:
            return run_there(
                TensorPointer, "builtins.getattr", (self, name), what=name, writes=False
            )
        return compute("builtins.getattr", (self, name), what=name)

    # ---- values

    def item(self) -> Any:
        """The one number of the tensor."""
        return compute("Tensor.item", (self,), what="item")

    def tolist(self) -> Any:
        """The values as nested lists."""
        return compute("Tensor.tolist", (self,), what="tolist")

    def numpy(self, *, force: bool = False) -> Any:
        """The values as an array of its own."""
        value = reading.value(self._data(), "numpy")
        return value.numpy(force=force)

    def __bool__(self) -> bool:
        """Truth of a tensor of one element."""
        return bool(compute("fedproc.worker.parts.truth", (self,), what="bool"))

    def __float__(self) -> float:
        """The one number of the tensor."""
        return float(self.item())

    def __int__(self) -> int:
        """The one number of the tensor, cut to an integer."""
        return int(self.item())

    def __complex__(self) -> complex:
        """The one number of the tensor."""
        return complex(self.item())

    def __index__(self) -> int:
        """The one integer of the tensor."""
        return int(compute("operator.index", (self,), what="index"))

    def __contains__(self, value: Any) -> bool:
        """Whether an element equals ``value``."""
        return bool(compute("operator.contains", (self, value), what="in"))

    def __iter__(self) -> Iterator["TensorPointer"]:
        """Pointers to the rows, one at a time."""
        count = len(self)
        return (operate("operator.getitem", (self, row), {}) for row in range(count))

    __hash__ = object.__hash__


def _method(name: str) -> Callable[..., Any]:
    operation = f"Tensor.{name}"

    def method(self: TensorPointer, *args: Any, **kwargs: Any) -> Any:
        return operate(operation, (self, *args), kwargs)

    method.__name__ = name
    method.__qualname__ = f"TensorPointer.{name}"
    method.__doc__ = f"``torch.Tensor.{name}`` in the worker."
    return method


def _refused(name: str) -> Callable[..., NoReturn]:
    def method(*_: Any, **__: Any) -> NoReturn:
        raise PlacementError(f"{name}: {REFUSED[name]}.")

    return method


def _add_methods() -> None:
    for name in TENSOR_METHODS:
        if name not in TensorPointer.__dict__ and not hasattr(Pointer, name):
            made = _refused(name) if name in REFUSED else _method(name)
            setattr(TensorPointer, name, made)


_add_methods()
