"""A computation captured once and replayed: the operations of torch without what leads to them.

Runs in workers. For a small model torch spends most of a step on finding out what to compute:
modules call functions, functions build a graph, the graph is walked backwards. With inputs of the
same shapes it comes to the same operations every time. So they are written down when they are
dispatched, below autograd, and from then on called one after the other: the same kernels get the
same values in the same order, and the bits are the same. CUDA graphs do this for a GPU.

That is right only for a computation that depends on nothing but its inputs and on tensors that
are known: see :mod:`fedproc.client.repeatable` for what may be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from torch._ops import OpOverload

MOST_BYTES: Final = 64 << 20
"""Results of all operations; beyond, the operations themselves take the time."""
MOST_SHAPES: Final = 64
"""What one computation is captured for; inputs of other shapes take the ordinary way."""

_Replay = Callable[..., tuple[Tensor, ...]]
_aten = torch.ops.aten
# Torch's own bindings take half of the time. Not for others: their defaults may be different ones.
_BINDINGS: Final[dict[Any, Callable[..., Any]]] = {
    getattr(_aten, name).default: getattr(torch, name)
    for name in ("t", "mm", "addmm", "bmm", "relu", "_log_softmax", "_log_softmax_backward_data")
}
_DATA_DEPENDENT: Final = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Programs:
    """One computation, captured for each of the shapes that its inputs have.

    The first inputs of a shape take the ordinary way, since many shapes come only once; the second
    are captured, and all others replayed.
    """

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], known: Iterable[Tensor]
    ) -> None:
        """Arguments as of :func:`capture`."""
        self._function = function
        self._known = list(known)
        self._found: dict[Hashable, Program | Literal["once"] | None] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Returns what the function returns for ``inputs``."""
        key = tuple([(x.shape, x.dtype, x.stride()) for x in inputs])
        found = self._found.get(key)
        if isinstance(found, Program):
            return found(*inputs)
        if found == "once":
            results, self._found[key] = capture(self._function, inputs, self._known)
            return results
        if len(self._found) < MOST_SHAPES:
            self._found.setdefault(key, "once")
        return self._function(*inputs)


class Program:
    """The operations of a computation, for inputs of the shapes that it was captured with."""

    def __init__(self, replay: _Replay) -> None:
        """Keeps the function that calls them."""
        self._replay = replay

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Computes what the captured function returned; the results have no graph."""
        grad = torch.is_grad_enabled()
        below = torch._C._AutoDispatchBelowADInplaceOrView()
        try:
            return self._replay(*inputs)
        finally:
            del below
            torch._C._set_grad_enabled(grad)


def capture(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], known: Iterable[Tensor]
) -> tuple[tuple[Tensor, ...], Program | None]:
    """Calls ``function`` and writes down what it does.

    Args:
        function: Takes ``inputs``; returns tensors.
        inputs: What differs from one call to the next, in values but not in shape.
        known: Tensors that it reads or changes besides, the same ones in every call.

    Returns:
        Its results, and the program; None if it cannot be replayed: an operation looks at values,
        reads a tensor that is neither known nor made in between, or the results are large.
    """
    with _Recorder() as recorder:
        results = function(*inputs)
    if recorder.refused:
        return results, None
    writer = _Writer(inputs, known)
    try:
        for call in recorder.calls:
            writer.add(*call)
        return results, Program(writer.function(results))
    except _UnknownTensorError:
        return results, None


_Call = tuple["OpOverload[..., Any]", tuple[Any, ...], Mapping[str, Any], Any, bool]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the operations that are dispatched, with their results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        self.refused = False
        self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.refused:
            self._bytes += sum(tensor.nbytes for tensor in _tensors(result))
            self.calls.append((func, args, kwargs or {}, result, torch.is_grad_enabled()))
            if self._bytes > MOST_BYTES or not _is_repeatable(func):
                self.refused = True
                self.calls.clear()
        return result


def _is_repeatable(func: OpOverload[..., Any]) -> bool:
    """Whether an operation gives tensors of the same shapes for inputs of the same shapes."""
    tensors = all("Tensor" in str(value.type) for value in func._schema.returns)
    return func.namespace == "aten" and tensors and _DATA_DEPENDENT.isdisjoint(func.tags)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in a value, in lists and tuples, too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


class _UnknownTensorError(Exception):
    """An operation reads what is neither known nor a result: it may be another one next time."""


class _Line:
    """One call in the source of a program."""

    def __init__(self, func: OpOverload[..., Any], name: str, grad: bool) -> None:
        self.name = name
        self.grad = grad
        self.arguments: list[str] = []
        self.reads: set[str] = set()
        self.targets: list[str] = []
        # what changes a tensor or draws a random number is done though nobody reads its result
        self.needed = func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags


class _Writer:
    """Writes the source of a program: a call for each operation, a variable for each result."""

    def __init__(self, inputs: Sequence[Tensor], known: Iterable[Tensor]) -> None:
        self._inputs = [f"x{place}" for place in range(len(inputs))]
        self._names = {id(x): name for x, name in zip(inputs, self._inputs, strict=True)}
        self._bound: dict[str, Any] = {"set_grad": torch._C._set_grad_enabled}
        self._lines: list[_Line] = []
        self._variables = 0
        self._transposed: dict[str, str] = {}
        self._held: list[Any] = []  # a name belongs to an id while its tensor is alive
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
        line = _Line(func, "", grad)
        line.arguments = [
            *(self._expression(value, line) for value in args),
            *(f"{key}={self._expression(value, line)}" for key, value in kwargs.items()),
        ]
        if (same := self._same(func, line)) is not None:
            self._names[id(result)] = same
            return
        line.name = self._bind(_callable(func))
        results = result if isinstance(result, list | tuple) else [result]
        line.targets = [self._variable(tensor) for tensor in results]
        if func is _aten.t.default:
            self._transposed[line.targets[0]] = line.arguments[0]
        if isinstance(result, list | tuple):
            line.targets[-1] += ","  # unpacked, also if it is one
        self._lines.append(line)

    def function(self, results: Sequence[Tensor]) -> _Replay:
        """Makes the function that returns ``results``."""
        last = _Line(_aten.detach.default, "", grad=False)
        returned = "".join(f"{self._expression(tensor, last)}, " for tensor in results)
        body = [f"return ({returned})", *self._backwards(set(last.reads))]
        source = f"def replay({', '.join(self._inputs)}):\n    " + "\n    ".join(reversed(body))
        exec(compile(source, "<captured by fedproc>", "exec"), self._bound)
        replay: _Replay = self._bound["replay"]
        return replay

    def _backwards(self, live: set[str]) -> Iterator[str]:
        """Yields the lines from the last to the first; a variable goes when it was read last."""
        mode: bool | None = None
        for line in reversed(self._lines):
            targets = {target.rstrip(",") for target in line.targets}
            if not (line.needed or targets & live):
                continue
            if mode is not None and mode != line.grad:
                yield f"set_grad({mode})"
            mode = line.grad
            over = sorted((line.reads | targets) - live)
            if over:
                yield f"del {', '.join(over)}"
            yield f"{', '.join(line.targets)} = {line.name}({', '.join(line.arguments)})"
            live = (live - targets) | line.reads
        yield f"set_grad({mode})"

    def _same(self, func: OpOverload[..., Any], line: _Line) -> str | None:
        """Names the tensor that an operation gives back: without autograd some do nothing."""
        if func is _aten.detach.default:
            return line.arguments[0]
        if func is _aten.t.default:
            return self._transposed.get(line.arguments[0])
        return None

    def _expression(self, value: Any, line: _Line) -> str:
        if isinstance(value, Tensor):
            name = self._names.get(id(value))
            if name is None:
                raise _UnknownTensorError
            if name.startswith("v"):
                line.reads.add(name)
            return name
        if isinstance(value, list | tuple) and any(True for _ in _tensors(value)):
            return f"[{', '.join(self._expression(part, line) for part in value)}]"
        return self._bind(value)

    def _bind(self, value: Any) -> str:
        name = f"b{len(self._bound)}"
        self._bound[name] = value
        return name

    def _variable(self, tensor: Any) -> str:
        self._variables += 1
        name = f"v{self._variables}"
        if isinstance(tensor, Tensor):
            self._names[id(tensor)] = name
        return name


def _callable(func: OpOverload[..., Any]) -> Callable[..., Any]:
    """Finds what calls an operation in the least time."""
    return _BINDINGS.get(func, func._op)
