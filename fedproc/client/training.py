"""Local epochs: what a client does with the model and its own rows.

Runs in worker processes. Plain functions of torch: they may assume that the model is loaded, the
random streams are seeded and nobody else uses the model; they know nothing of processes.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedproc.client.denominators import is_sum
from fedproc.client.descent import Descent
from fedproc.client.gradients import Loss
from fedproc.ranges import (
    require_at_least,
    require_count_or_none,
    require_positive,
    require_switch,
    settle,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fedproc.client.update import Task

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """Local epochs of minibatch descent, the client's part of FedAvg (McMahan et al. 2017).

    The optimizer is new for every client and round. The gradient of the loss is clipped before a
    strategy corrects it (FedProx, Scaffold).

    Attributes:
        loss: ``loss(outputs, targets)`` -> one number, the mean over the rows; or their sum, if it
            has ``reduction="sum"``, as losses of torch do.
        optimizer: Called with the list of trained parameters; returns a torch optimizer.
        epochs: Passes over the rows of the client.
        batch_size: Rows of a step; None takes all rows at once.
        shuffle: A new order for every client, round and epoch; False keeps the rows in order.
        max_steps: Most optimizer steps of one client in one round; None sets no limit.
        clip_grad_norm: Largest 2-norm of the gradient over all parameters; None does not clip.

    Raises:
        ValueError: A value is outside of its range.
    """

    loss: Loss
    optimizer: OptimizerFactory
    _: KW_ONLY
    epochs: int = 1
    batch_size: int | None = 32
    shuffle: bool = True
    max_steps: int | None = None
    clip_grad_norm: float | None = None

    def __post_init__(self) -> None:
        """Checks every value here, so that no client fails on it later."""
        if not callable(self.loss):
            raise ValueError(f"loss must be callable, got {self.loss!r}")
        if not callable(self.optimizer):
            raise ValueError(
                "optimizer must be a function that makes one of a list of parameters, such as "
                "functools.partial(torch.optim.SGD, lr=0.1): every client has its own in every "
                f"round; got {type(self.optimizer).__name__}"
            )
        require_switch("shuffle", self.shuffle)
        settle(self, require_at_least, "epochs", least=1)
        settle(self, require_count_or_none, "batch_size", "max_steps")
        if self.clip_grad_norm is not None:
            settle(self, require_positive, "clip_grad_norm")

    def steps(self, rows: int) -> int:
        """Returns how many steps a client with ``rows`` rows takes in a round."""
        steps = -(-rows // (self.batch_size or rows)) * self.epochs
        return steps if self.max_steps is None else min(steps, self.max_steps)


@dataclass(frozen=True, slots=True)
class TrainContext:
    """What a custom ``train(model, x, y, ctx)`` may know and keep.

    Attributes:
        client: Name of the client.
        round: Number of the round, from 1.
        generator: CPU generator seeded from (seed, round, client); the global streams of Python,
            NumPy and torch are seeded too.
        state: Kept for this client from one accepted update to the next; its tensors are on the
            CPU at the start of a round, wherever the client trains.
    """

    client: str
    round: int
    generator: torch.Generator
    state: dict[str, Any]


TrainFunction = Callable[[nn.Module, Tensor, Tensor, TrainContext], Mapping[str, float] | None]


@dataclass(slots=True)
class Progress:
    """What local epochs did.

    Attributes:
        steps: Optimizer steps taken.
        rows: Rows processed, a row counted once for each time.
        loss_sum: Sum over the processed rows of the loss before the step; each row of a batch
            counts as the mean of its batch.
        optimizer: The optimizer that took the steps.
    """

    steps: int = 0
    rows: int = 0
    loss_sum: float = 0.0
    optimizer: torch.optim.Optimizer | None = field(default=None, repr=False)


def run_local_epochs(
    model: nn.Module,
    rows: tuple[Tensor, Tensor],
    local: LocalTraining,
    generator: torch.Generator,
    correct: Callable[[], None] | None = None,
    descent: Descent | None = None,
) -> Progress:
    """Trains ``model`` in place on the rows of one client; returns what was done.

    Args:
        model: Holds the global parameters at the start.
        rows: Inputs of shape (rows, ...) and targets of shape (rows, ...).
        local: What to do.
        generator: Draws the order of the rows.
        correct: Called after each backward pass; may change the gradients.
        descent: Of this model and ``local``, from an earlier client.

    Raises:
        ValueError: The loss is not one number.
        FloatingPointError: The loss is NaN or infinite.
    """
    descent = descent or Descent(model, local, None)
    optimizer, step = descent.begin(correct)
    progress, sums = Progress(optimizer=optimizer), is_sum(local.loss)
    try:
        for x, y in _batches(rows, local, generator):
            loss = step(x, y, progress.steps)
            progress.loss_sum += loss if sums else loss * x.shape[0]
            progress.steps += 1
            progress.rows += x.shape[0]
    finally:
        descent.end()
    return progress


def non_finite_update(task: Task, where: str) -> FloatingPointError:
    """Makes the error of a client whose trained model has a NaN or infinite value."""
    return FloatingPointError(
        f"round {task.round}: the update of client {task.client!r} is rejected: {where}"
    )


def _batches(
    rows: tuple[Tensor, Tensor], local: LocalTraining, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches of all epochs, at most ``max_steps``.

    A batch is a copy: where the rows of a client lie in the block of its worker, and so their
    alignment, must not reach a kernel that might sum in another order because of it.
    """
    x, y = rows
    left = math.inf if local.max_steps is None else local.max_steps
    for _ in range(local.epochs):
        for index in _batch_indices(x.shape[0], local, generator):
            if left <= 0:
                return
            left -= 1
            if isinstance(index, slice):
                yield x[index].clone(), y[index].clone()
            else:
                here = index if x.is_cpu else index.to(x.device)
                yield x.index_select(0, here), y.index_select(0, here)


def _batch_indices(
    rows: int, local: LocalTraining, generator: torch.Generator
) -> Iterable[slice | Tensor]:
    size = local.batch_size or rows
    if local.shuffle:
        order = torch.randperm(rows, generator=generator, device="cpu")
        return [order] if rows <= size else [order[s : s + size] for s in range(0, rows, size)]
    return [slice(start, start + size) for start in range(0, rows, size)]


def checked_metrics(returned: object) -> dict[str, float]:
    """Returns what a custom function returned as floats.

    Raises:
        TypeError: It is no dict of numbers.
    """
    if returned is None:
        return {}
    if not isinstance(returned, Mapping):
        raise TypeError(
            f"the train function must return a dict of numbers, got {type(returned).__name__}"
        )
    metrics = {}
    for name, value in returned.items():
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if not isinstance(name, str) or not isinstance(number, numbers.Real):
            raise TypeError(
                f"the train function must return a dict of numbers, got {name!r}: {value!r}"
            )
        metrics[name] = float(number)
    return metrics
