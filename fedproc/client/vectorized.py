"""Many clients trained at once: their parameters stacked, their gradients by ``torch.func.vmap``.

Runs in workers. A **stack** is a number of clients whose models are the rows of one matrix. Each
step computes the losses of all of them in one go; their sum has the gradient of each client in
its row, because no client's loss depends on another's parameters. Small models are limited by
what Python and torch spend on each operation, and a stack spends it once for all clients.

The sums inside of an operation are formed in another order than for one client alone, so the
last bits differ from the sequential result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from fedproc.client.capture import Programs
from fedproc.client.denominators import is_sum
from fedproc.client.gradients import non_finite_loss
from fedproc.client.orders import Orders, first_batches
from fedproc.client.repeatable import Repeatable
from fedproc.client.row_loss import NotVectorizableError, row_losses
from fedproc.client.rules import step_norm
from fedproc.client.seeding import derive_seed
from fedproc.client.shards import Shards
from fedproc.client.single_step import SharedStep, is_affine, is_sound
from fedproc.client.stacked_optimizer import StackedOptimizer, chosen_by, require_clippable
from fedproc.client.stacked_rules import stacked_correction
from fedproc.client.update import NO_BLOCK, Task, Update, weights_of
from fedproc.client.vectorizable import stack_size, try_rows
from fedproc.memory.copying import fresh

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fedproc.client.layout import Layout
    from fedproc.client.resident import Resident
    from fedproc.client.rules import LocalRule
    from fedproc.client.training import LocalTraining

_TRIED_ROWS: Final = 16


@dataclass(frozen=True, slots=True)
class Trained:
    """What a stack made.

    Attributes:
        updates: One per client, without blocks and times.
        values: Trained parameters (clients, parameters), or (1, parameters): their mean.
        failures: Place of a client -> why its update does not count.
        is_mean: Whether ``values`` is the mean of the clients that did not fail, by the weights of
            their tasks.
    """

    updates: list[Update]
    values: Tensor
    failures: dict[int, FloatingPointError]
    is_mean: bool = False


class Stacks:
    """Trains stacks of clients from one resident model.

    Attributes:
        most: Clients that may train at once, where each has a model.
    """

    def __init__(
        self,
        resident: Resident,
        local: LocalTraining,
        rule: LocalRule | None,
        blocks: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        """Keeps the model; nothing is tried before the first stack.

        ``blocks``: inputs and targets of all clients that may come.
        """
        self._layout: Layout = resident.layout
        self.most = stack_size(resident.layout.nbytes)
        self._resident = resident
        self._local = local
        self._rule = rule
        self._repeatable = Repeatable(resident.model, local.loss)
        # as local epochs give them to the optimizer; of one dtype, this is the order of a block
        self._parameters = self._repeatable.parameters
        self._row_losses = row_losses(local.loss)
        self._programs = Programs(self._repeatable.known, turns=True)
        self._blocks = blocks
        self._mean: bool | None = None

    def _losses(self, values: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """Computes the loss of every client; buffers and frozen parameters they share."""
        losses: Tensor = torch.func.vmap(self._loss)(values, x, y, weights)
        return losses

    def _loss(self, values: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """Computes the loss of one client's batch; the weights are those of its rows."""
        return (self._row_losses(self._outputs(values, x), y) * weights).sum()

    def _outputs(self, values: Tensor, x: Tensor) -> Tensor:
        entries = [e for section in self._layout.of_kind("trained") for e in section.entries]
        pieces = torch.split(values, [entry.numel for entry in entries])
        named = {e.name: piece.view(e.shape) for e, piece in zip(entries, pieces, strict=True)}
        outputs: Tensor = torch.func.functional_call(self._resident.model, named, (x,))
        return outputs

    def train(
        self,
        tasks: Sequence[Task],
        shards: Shards,
        states: Sequence[Mapping[str, Any]],
        shared: Mapping[str, Tensor],
    ) -> Trained:
        """Trains clients from the values of the resident model, which is in train mode.

        Args:
            tasks: The clients.
            shards: Their rows.
            states: What each kept.
            shared: What the strategy sent.

        Raises:
            NotVectorizableError: They cannot be trained at once.
            Exception: What the model or the loss raises on the rows of one of them.
        """
        mean = self._tried(shards)
        orders = Orders(shards.starts, shards.sizes, self._local, _seeds(tasks))
        anchor = self._anchor()
        values = anchor.repeat(len(states), 1)
        chosen = chosen_by(self._local.optimizer, self._parameters)
        require_clippable(self._local, chosen, self._parameters)
        optimizer = StackedOptimizer(chosen, self._parameters, values)
        known = [states[place] for place in orders.sorted]
        correction = stacked_correction(self._rule, anchor, shared, known)
        losses = torch.zeros(orders.counts.shape, dtype=torch.float64, device="cpu")
        for training, gradients in self._walk(orders, shards, values, losses, mean=mean):
            if correction is not None:
                correction.apply(gradients, training)
            optimizer.step(gradients)
        kept = correction.keep(values, orders.steps, chosen) if correction else [{} for _ in states]
        sums = self._over_rows(losses, torch.from_numpy(orders.counts)).sum(0).tolist()
        columns = zip(orders.sorted, orders.steps, orders.rows, sums, kept, strict=True)
        done = sorted(columns, key=itemgetter(0))
        updates = _updates(shards.sizes, [row[1:] for row in done], chosen)
        return Trained(updates, orders.as_given(values), _failures(orders, losses))

    def _walk(
        self, orders: Orders, shards: Shards, values: Tensor, losses: Tensor, *, mean: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields for each step the models that still train, and their gradients; notes losses."""
        replays = self._repeatable.holds()
        for number, step in enumerate(orders.walk(values, mean=mean)):
            training = values[: step.clients]
            inputs = training, *shards.take(step.index, step.clients), step.weights
            gradients, losses[number, : step.clients] = self._gradients(inputs, replays=replays)
            yield training, gradients

    def is_affine(self) -> bool:
        """Tells whether the mean of first steps is the step by the mean of the gradients."""
        if not self._repeatable.holds():  # code of users may do anything to what flows back
            return False
        try:
            chosen = chosen_by(self._local.optimizer, self._parameters)
        except NotVectorizableError:  # told when a stack is to be trained
            return False
        return is_affine(self._local, self._rule, chosen)

    def may_share(self, sizes: Sequence[int]) -> bool:
        """Tells whether clients with so many rows can share a step, of which the mean is wanted."""
        return all(self._local.steps(size) == 1 for size in set(sizes)) and self.is_affine()

    def share_step(self, tasks: Sequence[Task], shards: Shards) -> Trained:
        """Takes one step for clients that have weights, and of which each takes only one.

        Raises:
            NotVectorizableError: They cannot be trained at once.
            FloatingPointError: Their mean may hide one that is not finite.
            Exception: What the model or the loss raises on the rows of one of them.
        """
        mean = self._tried(shards)
        step = SharedStep(self._resident.model, self._parameters, self._row_losses, mean=mean)
        batches = first_batches(shards.starts, shards.sizes, self._local, _seeds(tasks))
        weights = weights_of(tasks)
        self._resident.forget_gradients()  # of a stack for which torch raised
        found = step.gradient((shards.x, shards.y), batches, weights)
        losses = found.tolist()
        values = self._anchor()
        optimizer = step.take(values, self._local.optimizer)
        failures = {n: non_finite_loss(x, 0) for n, x in enumerate(losses) if not math.isfinite(x)}
        if len(failures) < len(tasks) and not is_sound(values, weights):
            raise FloatingPointError("the mean of the updates is not finite")
        numbers: list[tuple[int, int, float, dict[str, Any]]]
        counts = list(map(len, batches))
        sums = self._over_rows(found, torch.tensor(counts, device="cpu")).tolist()
        numbers = [(1, rows, total, {}) for rows, total in zip(counts, sums, strict=True)]
        updates = _updates(shards.sizes, numbers, optimizer)
        return Trained(updates, values[None], failures, is_mean=True)

    def _over_rows(self, losses: Tensor, counts: Tensor) -> Tensor:
        """Returns sums over the rows of batches, as local epochs count: each has the mean loss."""
        return losses if is_sum(self._local.loss) else losses * counts

    def _anchor(self) -> Tensor:
        """Returns a copy of the global parameters: (parameters,)."""
        first, *_ = pieces = [parameter.detach().reshape(-1) for parameter in self._parameters]
        if first.device.type != "cpu":
            return torch.cat(pieces)
        room = fresh(sum(len(piece) for piece in pieces) * first.itemsize)
        return torch.cat(pieces, out=room.view(first.dtype))

    def _gradients(self, inputs: tuple[Tensor, ...], *, replays: bool) -> tuple[Tensor, Tensor]:
        """Returns the gradient (clients, parameters) and loss (clients,) of every client."""
        if replays:
            return self._programs(self._by_autograd, self._by_autograd, inputs)  # type: ignore[return-value]
        return self._by_autograd(*inputs)

    def _by_autograd(
        self, values: Tensor, x: Tensor, y: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        leaf = values.detach().requires_grad_()
        losses = self._losses(leaf, x, y, weights)
        (gradients,) = torch.autograd.grad(losses.sum(), leaf)
        if self._local.clip_grad_norm is not None:
            norms = gradients.norm(dim=1, keepdim=True)
            # the formula of torch.nn.utils.clip_grad_norm_, for each row
            gradients.mul_((self._local.clip_grad_norm / (norms + 1e-6)).clamp(max=1.0))
        return gradients, losses.detach()

    def _tried(self, shards: Shards) -> bool:
        """Tries model and loss before the first stack; returns whether the loss is a mean."""
        if self._mean is None:
            losses = self._local.loss, self._row_losses
            rows = shards.some(_TRIED_ROWS), self._blocks
            found = try_rows(self._resident.model, self._parameters, losses, rows, self._twice)
            self._mean = found == "mean"
        return self._mean

    def _twice(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """Returns the gradients of two equal clients: (2, parameters)."""
        leaf = self._anchor().repeat(2, 1).requires_grad_()
        rows = [part.expand(2, *part.shape) for part in (x, y, weights)]
        gradients: Tensor = torch.autograd.grad(self._losses(leaf, *rows).sum(), leaf)[0]
        return gradients


def _seeds(tasks: Sequence[Task]) -> list[int]:
    return [derive_seed(task.seed, task.round, task.client, "shuffle") for task in tasks]


def _updates(
    sizes: Sequence[int],
    numbers: Sequence[tuple[int, int, float, dict[str, Any]]],
    optimizer: torch.optim.Optimizer,
) -> list[Update]:
    """Makes updates without blocks.

    Args:
        sizes: Rows of each client.
        numbers: Steps, rows processed, sum of the loss over those, what is kept: of each client.
        optimizer: One like those that took the steps.
    """
    norms = {steps: step_norm(optimizer, steps) for steps in {row[0] for row in numbers}}
    return [
        Update(
            block=NO_BLOCK,
            examples=size,
            steps=steps,
            step_norm=norms[steps],
            rows=rows,
            loss_sum=loss_sum,
            metrics={"loss": loss_sum / rows, "steps": float(steps)},
            state=kept,
        )
        for size, (steps, rows, loss_sum, kept) in zip(sizes, numbers, strict=True)
    ]


def _failures(orders: Orders, losses: Tensor) -> dict[int, FloatingPointError]:
    """Finds the first loss of each client that is NaN or infinite."""
    if bool(torch.isfinite(losses).all()):
        return {}
    failures = {}
    for place, column in zip(orders.sorted, losses.unbind(1), strict=True):
        bad = torch.nonzero(~torch.isfinite(column))
        if len(bad):
            step = int(bad[0])
            failures[place] = non_finite_loss(float(column[step]), step)
    return failures
