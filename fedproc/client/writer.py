"""The source of a program: one operation of torch after the other. Runs in workers.

Written in TorchScript, from the operations that were seen, in the order in which they came. A
result is a variable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedproc.client.program import Program
from fedproc.client.views import Views

if TYPE_CHECKING:
    from torch._ops import OpOverload

    from fedproc.client.program import Results

_aten = torch.ops.aten


class UnwritableError(Exception):
    """An operation cannot be written down.

    It reads what is neither known nor a result, so it may be another tensor next time; or
    TorchScript cannot express a value, or would leave the operation out.
    """


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
        self.changes = func._schema.is_mutable
        self.draws = torch.Tag.nondeterministic_seeded in func.tags

    def __str__(self) -> str:
        targets = ", ".join(self.targets) + ("," if self.unpacks else "")
        return f"{targets} = {self.name}({', '.join(self.arguments)})"


class Writer:
    """Writes the source of a program: a call for each operation, a variable for each result."""

    def __init__(self, inputs: Sequence[Tensor], known: Iterable[Tensor], *, turns: bool) -> None:
        self._inputs = [f"x{place}" for place in range(len(inputs))]
        self._names = {id(x): name for x, name in zip(inputs, self._inputs, strict=True)}
        self._known: dict[str, Tensor] = {}
        self._lines: list[_Line] = []
        self._variables: set[str] = set()
        self._transposed: dict[str, str] = {}
        self._held: list[Any] = []  # a name belongs to an id while its tensor is alive
        self._views = Views(inputs, turns=turns)
        for tensor in known:
            name = self._names.setdefault(id(tensor), f"k{len(self._known)}")
            self._known.setdefault(name, tensor)

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
        line.name = f"aten.{func._schema.name.removeprefix('aten::')}"
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
        line.arguments = [shown, *map(_written, form)]
        line.name = "aten.as_strided"
        line.targets = [self._variable(tensor)]
        self._lines.append(line)

    def program(self, results: Results) -> Program:
        """Makes the program that returns ``results``.

        Raises:
            UnwritableError: A result is not known, or nobody reads what was drawn at random.
            RuntimeError: TorchScript does not know an operation.
        """
        live: set[str] = set()
        returned = "".join(f"{self._expression(tensor, live)}, " for tensor in results)
        body = [f"return ({returned})", *self._backwards(live)]
        inputs = ", ".join(f"{name}: Tensor" for name in [*self._inputs, *self._known])
        source = f"def replay({inputs}):\n    " + "\n    ".join(reversed(body)) + "\n"
        program = Program(source, list(self._known.values()))
        if not program.calls(line.name for line in self._lines if line.draws):
            raise UnwritableError
        return program

    def _backwards(self, live: set[str]) -> Iterator[str]:
        """Yields the lines from the last to the first."""
        mode: bool | None = None
        for line in reversed(self._lines):
            targets = set(line.targets)
            if not (line.changes or line.draws or targets & live):
                continue
            if mode not in (None, line.grad):
                yield f"torch.set_grad_enabled({mode})"
            mode = line.grad
            yield str(line)
            live = (live - targets) | line.reads
        if mode is not None:
            yield f"torch.set_grad_enabled({mode})"

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
                raise UnwritableError
            if name in self._variables:
                reads.add(name)
            return name
        if isinstance(value, list | tuple):
            return f"[{', '.join(self._expression(part, reads) for part in value)}]"
        return _written(value)

    def _variable(self, tensor: Any) -> str:
        name = f"v{len(self._variables) + 1}"
        self._variables.add(name)
        if isinstance(tensor, Tensor):
            self._names[id(tensor)] = name
        return name


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.size(), tensor.stride(), tensor.storage_offset()


def _written(value: Any) -> str:
    """Writes what is no tensor."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return str(value)
    if isinstance(value, torch.device):
        return f"torch.device('{value}')"
    raise UnwritableError


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in a value, in lists and tuples, too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
