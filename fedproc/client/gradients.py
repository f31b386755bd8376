"""The loss of a batch and the gradients of a model: by autograd, later by replaying it.

Runs in workers. Batches of a shape that has come before are captured and replayed
(:mod:`fedproc.client.capture`), if model and loss allow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from fedproc.client.capture import Programs
from fedproc.client.program import Results
from fedproc.client.repeatable import Repeatable, is_watched
from fedproc.client.stepping import descend

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
        self._strides = [parameter.stride() for parameter in self.parameters]
        # the gradient of the loss by itself; autograd would make one in every step
        self._one = torch.ones((), dtype=self.parameters[0].dtype, device="cpu")
        self._programs = Programs([*self._repeatable.known, self._one])
        self._is_replaying = False

    def begin(self) -> bool:
        """Looks whether somebody has hooked into the model; if not, batches are replayed."""
        self._is_replaying = self._repeatable.holds()
        return self._is_replaying

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
        ordinary = partial(self._by_backward, step)
        if not (self._is_replaying and self._are_clear()):
            return _value(ordinary(x, y)[0], step)
        loss, *gradients = self._programs(self._by_autograd, ordinary, (x, y))
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return _value(loss, step)

    def descend(self, x: Tensor, y: Tensor, step: int, lr: float) -> float | None:
        """Takes the step of plain SGD at a batch whose shape was captured, without ``grad``.

        For those who know that batches are replayed and that nobody looks at a gradient.

        Returns:
            The loss before the step; None: the shape was not captured, and nothing was done.

        Raises:
            FloatingPointError: The loss is NaN or infinite.
        """
        program = self._programs.find((x, y))
        if program is None:
            return None
        # below autograd, which has no part in it: entering and leaving it costs as much as the step
        ordinary, follow = partial(self._by_backward, step), partial(self._follow, step, lr)
        return program.instead_of(ordinary, (x, y), follow)

    def _follow(self, step: int, lr: float, results: Results) -> float:
        loss, *gradients = results
        value = _value(loss, step)
        descend(self.parameters, gradients, lr)
        return value

    def _are_clear(self) -> bool:
        """Whether ``backward`` would do what it did, and only make a gradient of each parameter."""
        for p, stride in zip(self.parameters, self._strides, strict=True):
            if p.grad is not None or not p.requires_grad or is_watched(p):
                return False
            if p.stride() != stride:  # an optimizer replaced ``p.data``; backward looks at that
                return False
        return torch.is_grad_enabled()

    def _by_backward(self, step: int, x: Tensor, y: Tensor) -> Results:
        loss = self._loss(self._model(x), y)
        _require_one_number(loss)
        _value(loss, step)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss, *(parameter.grad for parameter in self.parameters)

    def _by_autograd(self, x: Tensor, y: Tensor) -> Results:
        """Computes what ``backward`` would; each gradient is of its parameter alone."""
        loss = self._loss(self._model(x), y)
        found = self._walked_back(loss)
        taken = {_memory(tensor) for tensor in (*self._repeatable.known, x, y, loss)}
        return loss, *_owned(self.parameters, found, taken)

    def _walked_back(self, loss: Tensor) -> Sequence[Tensor | None]:
        if loss.shape != () or loss.dtype != self._one.dtype:
            return torch.autograd.grad(loss, self.parameters, allow_unused=True)
        # What torch.autograd.grad does, too; but before, it would check the shape of our gradient
        # of the loss by a part of the compiler, whose import takes 0.6 s and 38 MiB in each worker.
        found: Sequence[Tensor | None] = Variable._execution_engine.run_backward(
            (loss,), (self._one,), False, False, tuple(self.parameters), True,
            accumulate_grad=False,
        )  # fmt: skip
        return found


def _owned(
    parameters: Sequence[Tensor], gradients: Iterable[Tensor | None], taken: set[int]
) -> list[Tensor | None]:
    """Copies gradients where ``backward`` would: what others see, or lies otherwise in memory."""
    owned: list[Tensor | None] = []
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:  # the loss does not depend on it
                owned.append(None)
                continue
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


def _value(loss: Tensor | None, step: int) -> float:
    assert loss is not None
    value: float = loss.item()
    if not math.isfinite(value):
        raise non_finite_loss(value, step)
    return value


def non_finite_loss(value: float, step: int) -> FloatingPointError:
    """Makes the error of a client whose loss is NaN or infinite after ``step`` steps."""
    return FloatingPointError(
        f"the loss is {value} at step {step + 1}: lower the learning rate, or clip"
    )
