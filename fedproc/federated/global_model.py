"""The global model: one module for the life of an aggregator, and its flat form.

Runs in the parent. Users may look at the module and write to it between rounds.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import TYPE_CHECKING, Final

from torch import nn

from fedproc.client.layout import Layout
from fedproc.client.pure import is_constant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


class GlobalModel:
    """A copy of the module that was given, updated in place.

    Attributes:
        module: The ordinary module.
        layout: Where its tensors lie in the flat form.
    """

    def __init__(self, given: nn.Module, loss: object = None) -> None:
        """Copies ``given``.

        Args:
            given: The model.
            loss: What it is trained with; a module may be changed, too.

        Raises:
            ValueError: It has nothing to train, or tensors without a defined mean.
        """
        self.layout = Layout.of(given)
        self.module = copy.deepcopy(given)
        self._loss = loss
        self._look()

    def block(self, allocate: Callable[[int], Tensor] | None = None) -> Tensor:
        """Returns the values as they are now, in flat form; ``allocate``: see ``Layout.room``."""
        return self.layout.pack(self._tensors, self.layout.room(allocate))

    def load(self, block: Tensor, before: Tensor) -> None:
        """Takes over values in flat form, all of them or none: else those that were ``before``."""
        try:
            self.layout.unpack(block, self._tensors)
        except BaseException:  # an interrupt must not leave half of a round in the model
            self.layout.unpack(before, self._tensors)
            raise

    def look_again(self) -> bool:
        """Finds the tensors of the module, which may be others than before.

        Returns:
            Whether something that travels only with a new trainer was changed since the last call:
            a frozen value, a number of a module or of the loss, a hook.

        Raises:
            ValueError: Other parameters are trained now than at the start.
        """
        if Layout.of(self.module) != self.layout:
            raise ValueError(
                "parameters of aggregator.model were replaced, frozen or unfrozen since the "
                "aggregator was made; make a new one from the changed model"
            )
        frozen, structure = self._frozen, self._structure
        self._look()
        return frozen != self._frozen or not _are_same(structure, self._structure)

    def _look(self) -> None:
        self._tensors = self.layout.tensors(self.module)
        # the changes in place of parameters that travel only with a new trainer
        self._frozen = [p._version for p in self.module.parameters() if not p.requires_grad]
        self._structure = [part for module in self._modules() for part in _parts(module)]

    def _modules(self) -> list[nn.Module]:
        loss = list(self._loss.modules()) if isinstance(self._loss, nn.Module) else []
        return [*self.module.modules(), *loss]


# what is looked at by itself, or by nobody: a user evaluates the model and leaves it like that
_ELSEWHERE: Final = frozenset(("_parameters", "_buffers", "_modules", "training"))


def _parts(module: nn.Module) -> Iterator[object]:
    """Yields a module and what it keeps besides tensors: numbers, hooks, whatever was set."""
    yield module
    for name, value in vars(module).items():
        if name not in _ELSEWHERE:
            yield name
            yield from chain.from_iterable(value.items()) if isinstance(value, dict) else (value,)


def _are_same(before: list[object], now: list[object]) -> bool:
    return len(before) == len(now) and all(
        a is b or (is_constant(a) and is_constant(b) and a == b)
        for a, b in zip(before, now, strict=True)
    )
