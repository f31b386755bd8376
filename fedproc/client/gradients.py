"""The loss of a batch and the gradients of a model: by autograd, later by replaying it.

Runs in workers. Batches of a shape that has come before are captured and replayed
(:mod:`fedproc.client.capture`), if model and loss allow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from fedproc.client.capture import Programs
from fedproc.client.repeatable import Repeatable

Loss = Callable[[Tensor, Tensor], Tensor]


class Gradients:
    """What a step of an optimizer follows, for one model and one loss.

    Attributes:
        parameters: Those that are trained.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        """Keeps both; nothing is computed yet."""
        self._model = model
        self._loss = loss
        self._repeatable = Repeatable(model, loss)
        self.parameters = self._repeatable.parameters
        # the gradient of the loss by itself; autograd would make one in every step
        self._one = torch.ones((), dtype=self.parameters[0].dtype)
        self._programs = Programs(self._by_autograd, [*self._repeatable.known, self._one])
        self._is_replaying = False

    def begin(self) -> None:
        """Looks whether somebody has hooked into the model since the last client."""
        self._is_replaying = self._repeatable.holds()

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
        if self._is_replaying and self._are_clear():
            loss, *gradients = self._programs(x, y)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            return _value(loss, step)
        loss = self._loss(self._model(x), y)
        _require_one_number(loss)
        value = _value(loss, step)
        loss.backward()  # type: ignore[no-untyped-call]
        return value

    def _are_clear(self) -> bool:
        """Whether no gradient is left to which ``backward`` would add."""
        for parameter in self.parameters:  # noqa: SIM110 - a third of the time of all()
            if parameter.grad is not None:
                return False
        return True

    def _by_autograd(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Computes what ``backward`` would; each gradient is of its parameter alone."""
        loss = self._loss(self._model(x), y)
        _require_one_number(loss)
        one = self._one if loss.shape == () and loss.dtype == self._one.dtype else None
        found = torch.autograd.grad(loss, self.parameters, one)
        taken = {_memory(tensor) for tensor in (*self._repeatable.known, x, y, loss)}
        return loss, *_owned(self.parameters, found, taken)


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


def _require_one_number(loss: Tensor) -> None:
    if loss.numel() != 1:
        raise ValueError(
            f"the loss has shape {tuple(loss.shape)}, it must be one number: "
            "use reduction='mean' or take the mean"
        )


def _value(loss: Tensor, step: int) -> float:
    value: float = loss.item()
    if not math.isfinite(value):
        raise non_finite_loss(value, step)
    return value


def non_finite_loss(value: float, step: int) -> FloatingPointError:
    """Makes the error of a client whose loss is NaN or infinite after ``step`` steps."""
    return FloatingPointError(
        f"the loss is {value} at step {step + 1}: lower the learning rate, or clip"
    )
