"""A program: captured operations of torch, called one after the other. Runs in workers.

The interpreter of TorchScript calls them, without Python in between, which takes as long as the
operations of a small model themselves. It optimizes nothing, since other operations have other
bits. What was read last goes.
"""

from __future__ import annotations

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

    def __init__(self, source: str, known: Sequence[Tensor], *, draws: bool) -> None:
        """Compiles ``source``, which defines ``replay``, of the inputs and ``known``.

        Args:
            source: In TorchScript.
            known: Tensors that are read or changed besides.
            draws: Random numbers are drawn.

        Raises:
            RuntimeError: TorchScript does not know an operation.
        """
        self.source = source
        self._known = known
        self._draws = draws
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

        Where an operation fails, ``ordinary`` raises the error of torch, with the same random
        numbers: the interpreter of TorchScript makes another class and text of it. What was
        changed by then is changed twice; whoever fails must not be used any more.
        """
        stream = torch.get_rng_state() if self._draws else None
        try:
            return self._below_autograd(inputs, use)
        except RuntimeError:
            if stream is not None:
                torch.set_rng_state(stream)
            ordinary(*inputs)
            raise

    def calls(self, names: Sequence[str], must: Iterable[str]) -> bool:
        """Tells whether what is called is what was written.

        Args:
            names: The operations, in order. TorchScript may know another way to the same values,
                but not to the same bits.
            must: Those of them that do something besides their results. What nobody reads is not
                even called: the next random numbers would be others.
        """
        graph = self._replay.graph.copy()
        if _called(graph) != list(names):
            return False
        torch._C._jit_pass_dce(graph)
        return Counter(must) <= Counter(_called(graph))

    def _below_autograd(self, inputs: Sequence[Tensor], use: Callable[[Results], T]) -> T:
        grad, optimizes, below = torch.is_grad_enabled(), _optimizes(), None
        try:
            below = torch._C._AutoDispatchBelowADInplaceOrView()
            _optimize(False)
            return use(self._replay(*inputs, *self._known))
        finally:
            below = None  # noqa: F841 - here it ends, not with the frame, which an error keeps
            _optimize(optimizes)
            torch._C._set_grad_enabled(grad)


# switches of TorchScript, for this thread
_optimizes: Final = torch._C._get_graph_executor_optimize
_optimize: Final = torch._C._set_graph_executor_optimize


def _called(graph: Any) -> list[str]:
    """Lists the operations in a graph of TorchScript."""
    kinds = [str(node.kind()).split("::") for node in graph.nodes()]
    names = [".".join(kind) for kind in kinds if kind[0] == "aten"]
    return [name for name in names if name != "aten.set_grad_enabled"]


def as_they_are(results: Results) -> Results:
    """Returns what it is given."""
    return results
