"""A program: captured operations of torch, called one after the other. Runs in workers.

The interpreter of TorchScript calls them, without Python in between, which takes as long as the
operations of a small model themselves. It optimizes nothing, since other operations have other
bits. What was read last goes.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

Results = tuple[Tensor | None, ...]
Compute = Callable[..., Results]
T = TypeVar("T")


def _named(name: str) -> Any:
    """Tells TorchScript what a source names."""
    return {"torch": torch, "aten": torch.ops.aten}.get(name)


class Program:
    """The operations of a computation, for inputs of the shapes that it was captured with.

    Attributes:
        source: What is called, in TorchScript, for whoever wants to see it.
    """

    def __init__(self, source: str, known: Sequence[Tensor]) -> None:
        """Compiles ``source``, which defines ``replay``, of the inputs and ``known``.

        Raises:
            RuntimeError: TorchScript does not know an operation.
        """
        self.source = source
        self._known = known
        self._unit = torch._C.CompilationUnit()
        self._unit.define(source, _named)
        self._replay = self._unit.find_function("replay")

    def __call__(self, inputs: Sequence[Tensor]) -> Results:
        """Computes what the captured function returned; the results have no graph.

        Raises:
            RuntimeError: An operation failed; torch itself may raise another class.
        """
        return self._below_autograd(inputs, as_they_are)

    def instead_of(
        self, ordinary: Compute, inputs: Sequence[Tensor], use: Callable[[Results], T]
    ) -> T:
        """Computes, and returns what ``use`` makes of the results, below autograd like them.

        Where an operation fails, ``ordinary`` raises the error of torch: the interpreter of
        TorchScript makes another class and text of it.
        """
        try:
            return self._below_autograd(inputs, use)
        except RuntimeError:
            ordinary(*inputs)
            raise

    def calls(self, names: Iterable[str]) -> bool:
        """Tells whether it calls operations as often as they are named.

        What nobody reads is not even called. That loses nothing but random numbers: the next ones
        would be others.
        """
        graph = self._replay.graph.copy()
        torch._C._jit_pass_dce(graph)
        called = Counter(node.kind().replace("::", ".") for node in graph.nodes())
        return Counter(names) <= called

    def _below_autograd(self, inputs: Sequence[Tensor], use: Callable[[Results], T]) -> T:
        grad, below = torch.is_grad_enabled(), None
        try:
            below = torch._C._AutoDispatchBelowADInplaceOrView()
            with _AS_WRITTEN:
                results = self._replay(*inputs, *self._known)
            return use(results)
        finally:
            below = None  # noqa: F841 - here it ends, not with the frame, which an error keeps
            torch._C._set_grad_enabled(grad)


class _AsWritten:
    """While any thread is within, TorchScript does not optimize.

    Its switch is one for the process, and it looks there at the start of each call, without the
    interpreter's lock. So whoever is done first must not put it back: workers may be threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = True

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch._C._get_graph_executor_optimize()
                torch._C._set_graph_executor_optimize(False)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch._C._set_graph_executor_optimize(self._before)


_AS_WRITTEN: Final = _AsWritten()


def as_they_are(results: Results) -> Results:
    """Returns what it is given."""
    return results
