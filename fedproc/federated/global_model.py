"""The global model: one module for the life of an aggregator, and its flat form.

Runs in the parent. Users may look at the module and write to it between rounds.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from fedproc.client.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


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
            Whether values that do not travel were changed since the last call.

        Raises:
            ValueError: Other parameters are trained now than at the start.
        """
        if Layout.of(self.module) != self.layout:
            raise ValueError(
                "parameters of aggregator.model were replaced, frozen or unfrozen since the "
                "aggregator was made; make a new one from the changed model"
            )
        before = self._frozen
        self._look()
        return before != self._frozen

    def _look(self) -> None:
        self._tensors = self.layout.tensors(self.module)
        # the changes in place of parameters that travel only with a new trainer
        self._frozen = [p._version for p in self.module.parameters() if not p.requires_grad]
