"""The source of a program: one call of torch after the other. Runs in workers.

Written from the operations that were seen in the order in which they came. A result is a variable,
which goes when it was read last; everything that is no tensor is bound to a name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch import Tensor

from fedproc.client.views import Views

if TYPE_CHECKING:
    from torch._ops import OpOverload

Results = tuple[Tensor | None, ...]
Compute = Callable[..., Results]
T = TypeVar("T")

_aten = torch.ops.aten
# Torch's own bindings take half of the time. Not for others: their defaults may be different ones.
_BINDINGS: Final[dict[Any, Callable[..., Any]]] = {
    _aten.t.default: torch.t,
    _aten.mm.default: torch.mm,
    _aten.addmm.default: torch.addmm,
    _aten.bmm.default: torch.bmm,
    _aten.convolution.default: torch.convolution,
    _aten.relu.default: torch.relu,
    _aten._log_softmax.default: torch._log_softmax,
    _aten._log_softmax_backward_data.default: torch._log_softmax_backward_data,
    _aten.add.Tensor: torch.add,
    _aten.mul.Tensor: torch.mul,
    _aten.mul.Scalar: torch.mul,
    _aten.neg.default: torch.neg,
    _aten.ne.Scalar: torch.ne,
    _aten.sum.default: torch.sum,
    _aten.sum.dim_IntList: torch.sum,
    _aten.gather.default: torch.gather,
    _aten.scatter_add.default: torch.scatter_add,
    _aten.where.self: torch.where,
    _aten.scalar_tensor.default: torch.scalar_tensor,
    _aten.ones_like.default: torch.ones_like,
    _aten.new_zeros.default: Tensor.new_zeros,
    _aten.clone.default: torch.clone,
    _aten.cat.default: torch.cat,
    _aten.split_with_sizes.default: torch.split_with_sizes,
    _aten.view.default: Tensor.view,
    _aten.expand.default: Tensor.expand,
    _aten.transpose.int: torch.transpose,
    _aten.permute.default: torch.permute,
    _aten.unsqueeze.default: torch.unsqueeze,
    _aten.squeeze.dim: torch.squeeze,
}


class Program:
    """The operations of a computation, for inputs of the shapes that it was captured with.

    Attributes:
        source: What is called, for whoever wants to see it.
    """

    def __init__(self, source: str, bound: dict[str, Any]) -> None:
        """Compiles ``source``, which defines ``replay``; ``bound``: what its names mean."""
        self.source = source
        exec(compile(source, "<captured by fedproc>", "exec"), bound)
        # taken out of its own globals: no cycle, so it goes with the last who holds it
        self._replay: Compute = bound.pop("replay")

    def __call__(self, inputs: Sequence[Tensor]) -> Results:
        """Computes what the captured function returned; the results have no graph."""
        return self.then(inputs, _as_they_are)

    def then(self, inputs: Sequence[Tensor], use: Callable[[Results], T]) -> T:
        """Computes, and returns what ``use`` makes of the results, below autograd like them."""
        grad, below = torch.is_grad_enabled(), None
        try:
            below = torch._C._AutoDispatchBelowADInplaceOrView()
            return use(self._replay(*inputs))
        finally:
            below = None  # noqa: F841 - here it ends, not with the frame, which an error keeps
            torch._C._set_grad_enabled(grad)


def _as_they_are(results: Results) -> Results:
    return results


class UnknownTensorError(Exception):
    """An operation reads what is neither known nor a result: it may be another one next time."""


class _Line:
    """One call in the source of a program."""

    def __init__(self, func: OpOverload[..., Any], grad: bool) -> None:
        self.grad = grad
        self.name = ""
        self.arguments: list[str] = []
        self.reads: set[str] = set()
        self.targets: list[str] = []
        self.unpacks = False
        # what changes a tensor or draws a random number is done though nobody reads its result
        self.needed = func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags

    def __str__(self) -> str:
        targets = ", ".join(self.targets) + ("," if self.unpacks else "")
        return f"{targets} = {self.name}({', '.join(self.arguments)})"


class Writer:
    """Writes the source of a program: a call for each operation, a variable for each result."""

    def __init__(self, inputs: Sequence[Tensor], known: Iterable[Tensor], *, turns: bool) -> None:
        self._inputs = [f"x{place}" for place in range(len(inputs))]
        self._names = {id(x): name for x, name in zip(inputs, self._inputs, strict=True)}
        self._bound: dict[str, Any] = {"set_grad": torch._C._set_grad_enabled}
        self._lines: list[_Line] = []
        self._variables: set[str] = set()
        self._transposed: dict[str, str] = {}
        self._held: list[Any] = []  # a name belongs to an id while its tensor is alive
        self._views = Views(inputs, turns=turns)
        for tensor in known:
            self._names.setdefault(id(tensor), self._bind(tensor))

    def add(
        self,
        func: OpOverload[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
        grad: bool,
    ) -> None:
        """Adds an operation that gave ``result``, with gradients enabled or not."""
        self._held.append((args, kwargs, result))
        given, made = list(tensors_in([args, *kwargs.values()])), list(tensors_in([result]))
        root = self._views.note(func, given, made)
        if root is not None:
            for tensor in made:
                self._show(root, tensor, grad)
            return
        turned = self._views.turned(given[0], made[0]) if func is _aten.clone.default else None
        if turned is not None:
            for factor, its_root in zip(*turned, strict=True):
                self._show(its_root, factor, grad)
            func, args, kwargs = _aten.bmm.default, turned[0], {}
        line = _Line(func, grad)
        line.arguments = [
            *(self._expression(value, line.reads) for value in args),
            *(f"{key}={self._expression(value, line.reads)}" for key, value in kwargs.items()),
        ]
        if (same := self._same(func, line)) is not None:
            self._names[id(result)] = same
            return
        line.name = self._bind(_callable(func))
        line.unpacks = isinstance(result, list | tuple) and bool(result)
        line.targets = [self._variable(tensor) for tensor in (result if line.unpacks else [result])]
        if func is _aten.t.default:
            self._transposed[line.targets[0]] = line.arguments[0]
        self._lines.append(line)

    def _show(self, root: Tensor, tensor: Tensor, grad: bool) -> None:
        """Adds what shows ``tensor`` in the memory of ``root``."""
        self._held.append(tensor)
        line = _Line(_aten.as_strided.default, grad)
        shown, form = self._expression(root, line.reads), _form(tensor)
        if form == _form(root):
            self._names[id(tensor)] = shown
            return
        line.arguments = [shown, *map(self._bind, form)]
        line.name = self._bind(torch.as_strided)
        line.targets = [self._variable(tensor)]
        self._lines.append(line)

    def program(self, results: Results) -> Program:
        """Makes the program that returns ``results``."""
        live: set[str] = set()
        returned = "".join(f"{self._expression(tensor, live)}, " for tensor in results)
        body = [f"return ({returned})", *self._backwards(live)]
        source = f"def replay({', '.join(self._inputs)}):\n    " + "\n    ".join(reversed(body))
        return Program(source, self._bound)

    def _backwards(self, live: set[str]) -> Iterator[str]:
        """Yields the lines from the last to the first; a variable goes when it was read last."""
        mode: bool | None = None
        for line in reversed(self._lines):
            targets = set(line.targets)
            if not (line.needed or targets & live):
                continue
            if mode not in (None, line.grad):
                yield f"set_grad({mode})"
            mode = line.grad
            over = sorted((line.reads | targets) - live)
            if over:
                yield f"del {', '.join(over)}"
            yield str(line)
            live = (live - targets) | line.reads
        if mode is not None:
            yield f"set_grad({mode})"

    def _same(self, func: OpOverload[..., Any], line: _Line) -> str | None:
        """Names the tensor that an operation gives back: without autograd some do nothing."""
        if func is _aten.detach.default:
            return line.arguments[0]
        if func is _aten.t.default:
            return self._transposed.get(line.arguments[0])
        return None

    def _expression(self, value: Any, reads: set[str]) -> str:
        """Writes a value; adds the variables in it to ``reads``."""
        if isinstance(value, Tensor):
            name = self._names.get(id(value))
            if name is None:
                raise UnknownTensorError
            if name in self._variables:
                reads.add(name)
            return name
        if isinstance(value, list | tuple) and any(True for _ in tensors_in(value)):
            return f"[{', '.join(self._expression(part, reads) for part in value)}]"
        return self._bind(value)

    def _bind(self, value: Any) -> str:
        name = f"b{len(self._bound)}"
        self._bound[name] = value
        return name

    def _variable(self, tensor: Any) -> str:
        name = f"v{len(self._variables) + 1}"
        self._variables.add(name)
        if isinstance(tensor, Tensor):
            self._names[id(tensor)] = name
        return name


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.size(), tensor.stride(), tensor.storage_offset()


def _callable(func: OpOverload[..., Any]) -> Callable[..., Any]:
    """Finds what calls an operation in the least time."""
    return _BINDINGS.get(func, func._op)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in a value, in lists and tuples, too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
