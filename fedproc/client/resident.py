"""The model that stays in a worker and is loaded anew for every client.

Runs in worker processes. May assume one client at a time.
"""

from __future__ import annotations

import contextlib
import copy
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedproc.client.kept_tensor import facts_of
from fedproc.client.layout import Layout, fill, load
from fedproc.client.module_state import ModuleState, keepers_of
from fedproc.memory.copying import same_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fedproc.client.layout import Slot


class Resident:
    """A model with its travelling tensors looked up once.

    Attributes:
        model: The model; a custom function may have spoilt it until :meth:`renew`.
        layout: Where its tensors lie in the flat form.
    """

    def __init__(self, pristine: nn.Module, *, custom: bool, loss: object = None) -> None:
        """Keeps ``pristine``.

        Args:
            pristine: Architecture and frozen values.
            loss: What the model is trained with; what it keeps is put back, too.
            custom: Local epochs change parameters and buffers only, so the model itself can be
                resident. A custom function may do anything to its model: it works on a copy.
        """
        # What was sent lies in memory that other processes can map. Training there would show
        # them every client's model.
        self._pristine = pristine if custom else copy.deepcopy(pristine)
        self.layout = Layout.of(pristine)
        self._custom = custom
        self._loss = ModuleState(keepers_of(loss))
        self._is_untouched = False
        self.renew()

    def renew(self) -> None:
        """Makes the model again, whatever was done to it."""
        self.model = copy.deepcopy(self._pristine) if self._custom else self._pristine
        self._tensors = self.layout.tensors(self.model)
        self._members = [member for members in self._tensors for member in members]
        self._facts = [facts_of(member) for member in self._members]
        self._parameters = list(self.model.parameters())
        self._flags = [parameter.requires_grad for parameter in self._parameters]
        self._versions = self._frozen_versions()
        self._modules = list(self.model.modules())
        self._shape = self._as_it_is()
        # a custom function that writes to a frozen parameter has failed
        loaded = [*self._parameters, *self.model.buffers()] if self._custom else self._members
        self._state = ModuleState(self._modules, loaded=loaded, changing=self._custom)

    @property
    def remembers(self) -> bool:
        """Whether a forward pass may find what another has left, unless the model is loaded."""
        return self._state.remembers or self._loss.remembers

    def load(self, pieces: Sequence[Tensor], *, closed: bool = False) -> None:
        """Takes over values, as :meth:`fedproc.client.layout.Layout.pieces` lists them.

        All else that modules and loss keep is as it was at the start, whatever the last client did.

        Args:
            pieces: The values.
            closed: Until the next call no code runs that is given parameters, or can do more to
                them than compute with them.
        """
        self._state.restore()
        self._loss.restore()
        if not self._is_untouched:
            self.unfreeze()
            self._straighten()
        self._is_untouched = closed
        load(pieces, self._members)

    def versions(self) -> list[int]:
        """Lists how often each parameter was written to.

        Code that only computes may, in place: an embedding with ``max_norm`` scales the rows it
        looks up.
        """
        return [parameter._version for parameter in self._parameters]

    def _straighten(self) -> None:
        """Undoes what ``parameter.data = ...`` did: strides decide bits of the next client."""
        for member, facts in zip(self._members, self._facts, strict=True):
            if facts_of(member) != facts:
                shape, stride, dtype = facts
                member.data = torch.empty_strided(shape, stride, dtype=dtype, device=member.device)

    def train(self) -> None:
        """Puts the model into training mode; torch would set every module again."""
        if not all(map(_is_training, self._modules)):
            self.model.train()

    def write(self, slot: Slot) -> None:
        """Copies the values into ``slot``.

        Raises:
            ValueError: The model put something else in the place of a parameter or buffer.
        """
        # a custom function's model is known to be whole by then
        may_differ = self._state.is_watching and not self._custom
        fill(slot, self._tensors_now() if may_differ else self._tensors)

    def _are_ours(self, found: Sequence[Sequence[Tensor]]) -> bool:
        return all(a is b for a, b in zip(chain(*found), self._members, strict=True))

    def _are_as_made(self, found: Sequence[Sequence[Tensor]]) -> bool:
        return self._are_ours(found) and [facts_of(each) for each in chain(*found)] == self._facts

    def _tensors_now(self) -> list[list[Tensor]]:
        """Finds the tensors, which the model may have assigned anew."""
        try:
            found = self.layout.tensors(self.model)
            if self._are_as_made(found) or Layout.of(self.model) == self.layout:
                return found
            cause: Exception | None = None
        except (KeyError, ValueError) as error:  # one is missing, or is nothing that has a mean
            cause = error
        raise ValueError(
            "the model replaced a parameter or buffer by one of another shape or dtype, or removed "
            "it, in the forward pass; write to it in place"
        ) from cause

    def forget_gradients(self) -> None:
        """Drops all gradients, and whoever wanted to see them."""
        for parameter in self._parameters:
            parameter.grad = None
            for hooks in (parameter._backward_hooks, parameter._post_accumulate_grad_hooks):
                if hooks:  # the factory of optimizers has hooked into it
                    hooks.clear()  # autograd looks into the same dict

    def unfreeze(self) -> None:
        """Sets ``requires_grad`` of all parameters as it was."""
        for parameter, flag in zip(self._parameters, self._flags, strict=True):
            if parameter.requires_grad is not flag:
                parameter.detach_().requires_grad_(flag)

    def require_whole(self) -> None:
        """Makes sure that a custom function left the model as it can be loaded again.

        Raises:
            ValueError: It did not.
        """
        same = self._as_it_is() == self._shape
        if not same:
            with contextlib.suppress(ValueError):
                same = Layout.of(self.model) == self.layout
                same = same and self._are_ours(self.layout.tensors(self.model))
        if same and self._frozen_are_as_sent():
            return
        raise ValueError(
            "the train function replaced parameters or buffers of the model, or changed frozen "
            "ones; change trained values in place, and use copy.deepcopy(model) for anything else"
        )

    def _as_it_is(self) -> list[object]:
        """Lists what a layout depends on, quickly: if this is the same, so is the layout."""
        seen: list[object] = [self._frozen_versions()]
        for module in self._modules:
            for members in (module._parameters, module._buffers):
                for name, tensor in members.items():
                    if tensor is not None:
                        strides = tensor.layout is torch.strided and tensor.stride()
                        facts = tensor.shape, tensor.dtype, strides, tensor.requires_grad
                        seen.append((name, id(tensor), *facts))
            seen.extend((name, id(child)) for name, child in module._modules.items())
            seen.append(tuple(module._non_persistent_buffers_set))
        return seen

    def _frozen_are_as_sent(self) -> bool:
        """Looks at the versions first, then at the values: ``.data`` and NumPy leave no trace."""
        if self._frozen_versions() != self._versions:
            return False
        pairs = zip(self._parameters, self._pristine.parameters(), self._flags, strict=True)
        return all(flag or same_bits(own, sent) for own, sent, flag in pairs)

    def _frozen_versions(self) -> list[int]:
        pairs = zip(self._parameters, self._flags, strict=True)
        return [parameter._version for parameter, flag in pairs if not flag]


def _is_training(module: nn.Module) -> bool:
    return module.training and type(module).train is nn.Module.train
