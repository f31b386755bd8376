"""The loss of a batch and the gradients of a model: by autograd, later by replaying it.

Runs in workers. A shape of batch that comes for the second time is captured, from the third time
on it is replayed (:mod:`fedproc.client.capture`), if model and loss allow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from fedproc.client.capture import Program, capture
from fedproc.client.repeatable import is_repeatable, is_unwatched, tensors_of

MOST_PROGRAMS: Final = 64
"""Shapes that are captured; batches of others take the ordinary way."""

Loss = Callable[[Tensor, Tensor], Tensor]


class Gradients:
    """What a step of an optimizer follows, for one model and one loss."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        """Keeps both; nothing is computed yet."""
        self._model = model
        self._loss = loss
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._parts = list(model.modules())
        self._known = tensors_of(model)
        if isinstance(loss, nn.Module):
            self._parts.extend(loss.modules())
            self._known.extend(tensors_of(loss))
        # the gradient of the loss by itself; autograd would make one in every step
        self._one = torch.ones((), dtype=self._parameters[0].dtype)
        self._is_repeatable = is_repeatable(model, loss)
        self._is_replaying = False
        # None: such a batch has come once; False: it cannot be replayed
        self._programs: dict[Hashable, Program | bool | None] = {}

    def begin(self) -> Gradients:
        """Looks whether somebody has hooked into the model since the last client; returns self."""
        self._is_replaying = (
            self._is_repeatable
            and all(parameter.requires_grad for parameter in self._parameters)
            and is_unwatched(self._parts, self._parameters)
        )
        return self

    def __call__(self, x: Tensor, y: Tensor, step: int) -> float:
        """Computes the gradients at a batch, as ``backward`` leaves them in the parameters.

        Args:
            x: Inputs of shape (rows, ...).
            y: Targets of shape (rows, ...).
            step: How many steps the client has taken.

        Returns:
            The loss.

        Raises:
            ValueError: The loss is not one number.
            FloatingPointError: The loss is NaN or infinite.
        """
        if not (self._is_replaying and self._are_clear()):
            return self._backward(x, y, step)
        key = x.shape, x.dtype, x.stride(), y.shape, y.dtype, y.stride()
        program = self._programs.get(key, False)
        if isinstance(program, Program):
            loss, *gradients = program(x, y)
        elif program is None:
            known = (*self._known, self._one)
            (loss, *gradients), made = capture(self._loss_and_gradients, (x, y), known)
            self._programs[key] = made or False
        else:
            if key not in self._programs and len(self._programs) < MOST_PROGRAMS:
                self._programs[key] = None
            return self._backward(x, y, step)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss_value(loss, step)

    def _are_clear(self) -> bool:
        """Whether no gradient is left to which ``backward`` would add."""
        for parameter in self._parameters:  # noqa: SIM110 - a third of the time of all()
            if parameter.grad is not None:
                return False
        return True

    def _backward(self, x: Tensor, y: Tensor, step: int) -> float:
        loss = self._loss(self._model(x), y)
        value = loss_value(loss, step)
        loss.backward()  # type: ignore[no-untyped-call]
        return value

    def _loss_and_gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Computes what ``backward`` would; each gradient is of its parameter alone."""
        loss = self._loss(self._model(x), y)
        one = self._one if loss.shape == () and loss.dtype == self._one.dtype else None
        found = torch.autograd.grad(loss, self._parameters, one)
        taken = {_memory(tensor) for tensor in (*self._known, x, y, loss)}
        return loss, *_owned(self._parameters, found, taken)


def _owned(
    parameters: Sequence[Tensor], gradients: Iterable[Tensor], taken: set[int]
) -> list[Tensor]:
    """Copies gradients where ``backward`` would: what others see, or lies otherwise in memory."""
    owned = []
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            mine = gradient
            if _memory(gradient) in taken or gradient.stride() != parameter.stride():
                mine = torch.empty_like(parameter).copy_(gradient)
            taken.add(_memory(mine))
            owned.append(mine)
    return owned


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def loss_value(loss: Tensor, step: int) -> float:
    """Returns the loss of step ``step + 1``.

    Raises:
        ValueError: It is not one number.
        FloatingPointError: It is NaN or infinite.
    """
    if loss.numel() != 1:
        raise ValueError(
            f"the loss has shape {tuple(loss.shape)}, it must be one number: "
            "use reduction='mean' or take the mean"
        )
    value: float = loss.item()
    if not math.isfinite(value):
        raise non_finite_loss(value, step)
    return value


def non_finite_loss(value: float, step: int) -> FloatingPointError:
    """Makes the error of a client whose loss is NaN or infinite after ``step`` steps."""
    return FloatingPointError(
        f"the loss is {value} at step {step + 1}: lower the learning rate, or clip"
    )
