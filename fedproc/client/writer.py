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
_CHANGING = {_aten.native_batch_norm.default}
"""They change a tensor, and their declaration does not say so."""


class UnwritableError(Exception):
    """An operation cannot be written down.

    It reads what is neither known nor a result, so it may be another tensor next time; or
    TorchScript does not know it, cannot express a value, or would call something else.
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
        # nobody needs to read the result, but the tensor that it changes: TorchScript looks at that
        self.changes = func._schema.is_mutable
        self.draws = torch.Tag.nondeterministic_seeded in func.tags
        self.must_be_called = self.draws or func in _CHANGING

    def __str__(self) -> str:
        targets = ", ".join(self.targets) + ("," if self.unpacks else "")
        return f"{targets} = {self.name}({', '.join(self.arguments)})"


class Writer:
    """Writes the source of a program: a call for each operation, a variable for each result."""

    def __init__(self, inputs: Sequence[Tensor], known: Iterable[Tensor], *, turns: bool) -> None:
        self._inputs = [f"x{place}" for place in range(len(inputs))]
        self._names = {id(x): name for x, name in zip(inputs, self._inputs, strict=True)}
        self._known: list[Tensor] = []
        self._lines: list[_Line] = []
        self._variables: set[str] = set()
        self._transposed: dict[str, str] = {}
        self._held: list[Any] = []  # a name belongs to an id while its tensor is alive
        self._views = Views(inputs, turns=turns)
        for tensor in known:
            if id(tensor) not in self._names:
                self._names[id(tensor)] = f"k{len(self._known)}"
                self._known.append(tensor)

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
        if _has_number_first(func, args):
            raise UnwritableError
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
        line.arguments = [shown, *(self._expression(value, line.reads) for value in form)]
        line.name = "aten.as_strided"
        line.targets = [self._variable(tensor)]
        self._lines.append(line)

    def program(self, results: Results) -> Program:
        """Makes the program that returns ``results``.

        Raises:
            UnwritableError: A result is not known; or TorchScript does not know an operation, or
                would call another one.
        """
        live: set[str] = set()
        returned = "".join(f"{self._expression(tensor, live)}, " for tensor in results)
        lines = self._read(live)
        inputs = ", ".join(
            f"{name}: Tensor"
            for name in [*self._inputs, *(f"k{n}" for n in range(len(self._known)))]
        )
        body = "\n    ".join([*_with_modes(lines), f"return ({returned})"])
        must = [line.name for line in lines if line.must_be_called]
        source = f"def replay({inputs}):\n    {body}\n"
        try:
            program = Program(source, self._known, draws=any(line.draws for line in lines))
        except RuntimeError as error:
            raise UnwritableError from error
        if not program.calls([line.name for line in lines], must):
            raise UnwritableError
        return program

    def _read(self, live: set[str]) -> list[_Line]:
        """Lists the lines without those whose results nobody reads."""
        read: list[_Line] = []
        for line in reversed(self._lines):
            targets = set(line.targets)
            if line.changes or line.must_be_called or targets & live:
                read.append(line)
                live = (live - targets) | line.reads
        return read[::-1]

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


def _with_modes(lines: Iterable[_Line]) -> Iterator[str]:
    """Yields the text of lines, and the switches of gradients between them."""
    mode: bool | None = None
    for line in lines:
        if line.grad != mode:
            mode = line.grad
            yield f"torch.set_grad_enabled({mode})"
        yield str(line)


def _has_number_first(func: OpOverload[..., Any], args: Sequence[Any]) -> bool:
    """Whether a number is where a tensor comes first.

    TorchScript turns such operations round: ``3 / x`` is three times ``1 / x``, with other bits.
    """
    parameters = func._schema.arguments
    return bool(args) and str(parameters[0].type) == "Tensor" and not isinstance(args[0], Tensor)


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.size(), tensor.stride(), tensor.storage_offset()


def _written(value: Any) -> str:
    """Writes what is neither a tensor nor a list."""
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
