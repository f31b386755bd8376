"""A computation captured once and replayed: the operations of torch without what leads to them.

Runs in workers. For a small model torch spends most of a step on finding out what to compute:
modules call functions, functions build a graph, the graph is walked backwards. With inputs of the
same shapes it comes to the same operations every time. So they are written down when they are
dispatched, below autograd, and from then on called one after the other: the same kernels get the
same values in the same order, and the bits are the same. CUDA graphs do this for a GPU.

That is right only for a computation that depends on nothing but its inputs and on tensors that
are known: see :mod:`fedproc.client.repeatable` for what may be captured. While operations are
written down, a few functions of torch take another way than usual (where ATen asks
``isTensorSubclassLike``); a program whose first results have other bits is not taken.
"""

from __future__ import annotations

import gc
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedproc.client.program import Compute, Program, Results, as_they_are
from fedproc.client.writer import UnwritableError, Writer, tensors_in

if TYPE_CHECKING:
    from torch._ops import OpOverload

MOST_BYTES: Final = 64 << 20
"""Results of all operations; beyond, the operations themselves take the time."""
MOST_SHAPES: Final = 64
"""What one computation is captured for; inputs of other shapes take the ordinary way."""

_DATA_DEPENDENT: Final = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Programs:
    """One computation, captured for each of the shapes that its inputs have.

    The first inputs of a shape take the ordinary way, since many shapes come only once. With the
    second, what was captured is compared with the ordinary way, bit by bit; others are replayed.
    """

    def __init__(self, known: Iterable[Tensor], *, turns: bool = False) -> None:
        """Knows nothing of the computation yet.

        Args:
            known: Tensors that are read or changed, the same ones in every call.
            turns: Other bits would do, too: see ``Views.turned``.
        """
        self._known = list(known)
        self._turns = turns
        self._found: dict[Hashable, Program | Literal["once", "refused"]] = {}

    def __call__(self, function: Compute, ordinary: Compute, inputs: Sequence[Tensor]) -> Results:
        """Returns what ``ordinary`` returns for ``inputs``.

        Args:
            function: The same, for the capture; always the same function.
            ordinary: What is done with inputs that are not replayed.
            inputs: Differ from one call to the next.
        """
        key = _key(inputs)
        found = self._found.get(key)
        if isinstance(found, Program):
            return found.instead_of(ordinary, inputs, as_they_are)
        if found == "once":
            self._found[key] = "refused"
            program, replayed = self._try(function, inputs)
            results = ordinary(*inputs)
            if program is not None and _are_equal(replayed, results):
                self._found[key] = program
            return results
        if found is None and len(self._found) < MOST_SHAPES:
            self._found[key] = "once"
        return ordinary(*inputs)

    def find(self, inputs: Sequence[Tensor]) -> Program | None:
        """Returns what inputs of such shapes replay, if it was captured."""
        found = self._found.get(_key(inputs))
        return found if isinstance(found, Program) else None

    def _try(self, function: Compute, inputs: Sequence[Tensor]) -> tuple[Program | None, Results]:
        """Captures ``function`` and replays it once; returns the program and what that gave."""
        try:
            with self._undone(inputs):
                program, _ = capture(function, inputs, self._known, turns=self._turns)
            with self._undone(inputs):
                return program, () if program is None else program(inputs)
        except Exception:  # noqa: BLE001 - the ordinary way, which follows, raises what it raises
            return None, ()

    @contextmanager
    def _undone(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Leaves tensors and the random stream as they were."""
        tensors = [*self._known, *inputs]
        before, stream = [x.detach().clone() for x in tensors], torch.get_rng_state()
        try:
            yield
        finally:
            torch.set_rng_state(stream)
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    if tensor.grad_fn is not None:  # what was written to it has made it a result
                        tensor.detach_()
                    tensor.copy_(value)


def _key(inputs: Sequence[Tensor]) -> Hashable:
    return tuple([(x.shape, x.dtype, x.stride(), x.storage_offset()) for x in inputs])


def capture(
    function: Compute,
    inputs: Sequence[Tensor],
    known: Iterable[Tensor],
    *,
    turns: bool = False,
) -> tuple[Program | None, Results]:
    """Calls ``function`` and writes down what it does.

    Args:
        function: Takes ``inputs``; returns tensors.
        inputs: What differs from one call to the next, in values but not in shape.
        known: Tensors that it reads or changes besides, the same ones in every call.
        turns: See :class:`Programs`.

    Returns:
        The program, and the results. None if it cannot be replayed: an operation looks at values,
        reads a tensor that is neither known nor made in between, or the results are large.
    """
    collects = gc.isenabled()
    gc.disable()  # a finalizer would be written down, too
    try:
        with _Recorder() as recorder:
            results = function(*inputs)
    finally:
        if collects:
            gc.enable()
    if recorder.refused:
        return None, results
    writer = Writer(inputs, known, turns=turns)
    try:
        for call in recorder.calls:
            writer.add(*call)
        return writer.program(results), results
    except UnwritableError:
        return None, results


def _are_equal(ours: Results, theirs: Results) -> bool:
    """Whether all values are the same; where one is NaN, they are not."""
    return len(ours) == len(theirs) and all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(ours, theirs, strict=True)
    )


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
            self._bytes += sum(tensor.nbytes for tensor in tensors_in(result))
            self.calls.append((func, args, kwargs or {}, result, torch.is_grad_enabled()))
            if self._bytes > MOST_BYTES or not _is_repeatable(func):
                self.refused = True
                self.calls.clear()
        return result


def _is_repeatable(func: OpOverload[..., Any]) -> bool:
    """Whether an operation gives tensors of the same shapes for inputs of the same shapes."""
    tensors = all("Tensor" in str(value.type) for value in func._schema.returns)
    return func.namespace == "aten" and tensors and _DATA_DEPENDENT.isdisjoint(func.tags)
