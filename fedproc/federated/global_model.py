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
        self._frozen = self._frozen_versions()

    def block(self, allocate: Callable[[int], Tensor] | None = None) -> Tensor:
        """Returns the values as they are now, in flat form; ``allocate``: see ``Layout.room``."""
        return self.layout.pack(self.layout.tensors(self.module), self.layout.room(allocate))

    def load(self, block: Tensor, before: Tensor) -> None:
        """Takes over values in flat form, all of them or none: else those that were ``before``."""
        tensors = self.layout.tensors(self.module)
        try:
            self.layout.unpack(block, tensors)
        except BaseException:  # an interrupt must not leave half of a round in the model
            self.layout.unpack(before, tensors)
            raise

    def frozen_changed(self) -> bool:
        """Tells whether values that do not travel were changed since the last call.

        Raises:
            ValueError: Other parameters are trained now than at the start.
        """
        if Layout.of(self.module) != self.layout:
            raise ValueError(
                "parameters of aggregator.model were replaced, frozen or unfrozen since the "
                "aggregator was made; make a new one from the changed model"
            )
        before, self._frozen = self._frozen, self._frozen_versions()
        return before != self._frozen

    def _frozen_versions(self) -> list[int]:
        """Counts the changes in place of parameters that travel only with a new trainer."""
        return [p._version for p in self.module.parameters() if not p.requires_grad]
