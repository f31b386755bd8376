"""The global model: one module for the life of an aggregator, and its flat form.

Runs in the parent. Users may look at the module and write to it between rounds.
"""

from __future__ import annotations

import copy
import operator
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, nn

from fedproc.client.layout import Layout
from fedproc.client.pure import is_constant
from fedproc.client.repeatable import hooks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


_FUNCTIONS: Final = (FunctionType, BuiltinFunctionType)


class GlobalModel:
    """A copy of the module that was given, updated in place.

    Attributes:
        module: The ordinary module.
        layout: Where its tensors lie in the flat form.
    """

    def __init__(self, given: nn.Module) -> None:
        """Copies ``given``.

        Raises:
            ValueError: It has nothing to train, or tensors without a defined mean.
        """
        self.layout = Layout.of(given)
        self.module = copy.deepcopy(given)
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
            a frozen value, a number, function or hook of a module, a module. Lists and other
            objects that a module keeps are not looked at, nor what is written to
            ``parameter.data``.

        Raises:
            ValueError: Other parameters are trained now than at the start.
        """
        if Layout.of(self.module) != self.layout:
            raise ValueError(
                "parameters of aggregator.model were replaced, frozen or unfrozen since the "
                "aggregator was made; make a new one from the changed model"
            )
        before = self._untold
        self._look()
        return not _are_same(before, self._untold)

    def as_it_is(self) -> nn.Module:
        """Copies the module with all that :meth:`look_again` may not notice when it is changed.

        Tensors that travel with every round are shared: nobody is told their values by it.
        """
        shared = {id(tensor): tensor for kind in self._tensors for tensor in kind}
        for module in self.module.modules():
            for value in vars(module).values():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    shared.setdefault(id(value), value)  # a result that somebody left there
        return copy.deepcopy(self.module, dict[int, Any](shared))

    def _look(self) -> None:
        self._tensors = self.layout.tensors(self.module)
        frozen = [p for p in self.module.parameters() if not p.requires_grad]
        self._untold = _Untold(frozen, list(self.module.modules()))


class _Untold:
    """What workers learn of a model only with a new trainer."""

    def __init__(self, tensors: Sequence[Tensor], modules: Sequence[nn.Module]) -> None:
        """Notes frozen tensors, and the modules with what they keep."""
        hooks = [hook for part in modules for each in hooks_of(part) for hook in each.values()]
        self.objects = [*tensors, *modules, *hooks]
        self.changes = [tensor._version for tensor in tensors]
        # Other attributes are not looked at: whoever calls the model may leave a result or a list
        # there, and has not changed what is to be trained.
        self.constants = {
            (place, name): value
            for place, module in enumerate(modules)
            for name, value in vars(module).items()
            if is_constant(value) and name != "training"
        }
        self.functions = {
            (place, name): value
            for place, module in enumerate(modules)
            for name, value in vars(module).items()
            if isinstance(value, _FUNCTIONS)
        }


def _are_same(before: _Untold, now: _Untold) -> bool:
    if before.changes != now.changes or len(before.objects) != len(now.objects):
        return False
    if not all(map(operator.is_, before.objects, now.objects)):
        return False
    if before.functions != now.functions:
        return False
    both = before.constants.keys() & now.constants.keys()
    pairs = ((before.constants[key], now.constants[key]) for key in both)
    return all(a is b or a == b for a, b in pairs)
