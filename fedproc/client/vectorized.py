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
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from fedproc.client.capture import Programs
from fedproc.client.gradients import non_finite_loss
from fedproc.client.orders import Orders
from fedproc.client.repeatable import Repeatable
from fedproc.client.row_loss import (
    NotVectorizableError,
    ignored_target,
    row_losses,
)
from fedproc.client.rules import step_norm
from fedproc.client.seeding import derive_seed
from fedproc.client.shards import Shards
from fedproc.client.single_step import MeanGradient, is_affine
from fedproc.client.stacked_optimizer import StackedOptimizer
from fedproc.client.stacked_rules import stacked_correction
from fedproc.client.stepping import step_of
from fedproc.client.update import NO_BLOCK, Task, Update
from fedproc.client.vectorizable import try_rows
from fedproc.memory.copying import fresh

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
    """Trains stacks of clients from one resident model."""

    def __init__(self, resident: Resident, local: LocalTraining, rule: LocalRule | None) -> None:
        """Keeps the model; nothing is tried before the first stack."""
        self._layout: Layout = resident.layout
        self._resident = resident
        self._local = local
        self._rule = rule
        self._repeatable = Repeatable(resident.model, local.loss)
        # as local epochs give them to the optimizer; of one dtype, this is the order of a block
        self._parameters = self._repeatable.parameters
        self._row_losses = row_losses(local.loss)
        self._programs = Programs(self._repeatable.known)
        self._mean: bool | None = None
        self._looked_at: Tensor | None = None

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
            tasks: The clients. If they have weights, their mean is wanted.
            shards: Their rows.
            states: What each kept.
            shared: What the strategy sent.

        Raises:
            NotVectorizableError: They cannot be trained at once.
            Exception: What the model or the loss raises on the rows of one of them.
        """
        mean = self._tried(shards)
        seeds = [derive_seed(task.seed, task.round, task.client, "shuffle") for task in tasks]
        orders = Orders(shards.starts, shards.sizes, self._local, seeds)
        if tasks[0].weight is not None and orders.steps[0] == 1 and self.is_affine():
            weights = [task.weight or 0.0 for task in tasks]
            return self._step_together(weights, shards, orders, mean=mean)
        return self._step_each(orders, shards, states, shared, mean=mean)

    def _step_each(
        self,
        orders: Orders,
        shards: Shards,
        states: Sequence[Mapping[str, Any]],
        shared: Mapping[str, Tensor],
        *,
        mean: bool,
    ) -> Trained:
        """Trains a stack: the models of all clients side by side, step by step."""
        anchor = self._anchor()
        values = anchor.repeat(len(states), 1)
        chosen = self._local.optimizer(list(self._parameters))
        optimizer = StackedOptimizer(chosen, self._parameters, values)
        known = [states[place] for place in orders.sorted]
        correction = stacked_correction(self._rule, anchor, shared, known)
        losses = torch.zeros(orders.counts.shape, dtype=torch.float64)
        replays = self._repeatable.holds()
        for number, step in enumerate(orders.walk(values, mean=mean)):
            training = values[: step.clients]
            inputs = training, *shards.take(step.index, step.clients), step.weights
            gradients, losses[number, : step.clients] = self._gradients(inputs, replays=replays)
            if correction is not None:
                correction.apply(gradients, training)
            optimizer.step(gradients)
        kept = correction.keep(values, orders.steps, chosen) if correction else [{} for _ in states]
        updates = self._updates(orders, shards, losses, kept, chosen)
        if orders.sorted != sorted(orders.sorted):
            places = torch.tensor(orders.sorted, device=values.device).argsort()
            values = values.index_select(0, places)
        return Trained(updates, values, _failures(orders, losses))

    def is_affine(self) -> bool:
        """Tells whether the mean of first steps is the step by the mean of the gradients."""
        return is_affine(self._local, self._rule, self._local.optimizer(list(self._parameters)))

    def _step_together(
        self, weights: Sequence[float], shards: Shards, orders: Orders, *, mean: bool
    ) -> Trained:
        """Takes one step for all clients, each of which takes only one.

        Raises:
            FloatingPointError: The mean is not finite, though losses are.
        """
        (step,) = orders.walk(self._parameters[0], mean=mean)
        gradient = MeanGradient(self._resident.model, self._row_losses, (shards.x, shards.y))
        self._resident.forget_gradients()  # of a stack for which torch raised
        losses = gradient.of(step, [weights[place] for place in orders.sorted])[None]
        values = self._anchor()
        optimizer = self._stepped(values)
        self._resident.forget_gradients()
        failures = _failures(orders, losses)
        if len(failures) < len(weights) and not math.isfinite(values.sum()):
            raise FloatingPointError("the mean of the updates is not finite")
        updates = self._updates(orders, shards, losses, [{} for _ in weights], optimizer)
        return Trained(updates, values[None], failures, is_mean=True)

    def _stepped(self, values: Tensor) -> torch.optim.Optimizer:
        """Takes the step of the resident model's gradients in ``values``: it has to stay."""
        pieces = torch.split(values, [parameter.numel() for parameter in self._parameters])
        stepping = []
        for parameter, piece in zip(self._parameters, pieces, strict=True):
            stepping.append(torch.nn.Parameter(piece.view(parameter.shape)))
            stepping[-1].grad = parameter.grad
        optimizer = self._local.optimizer(stepping)
        step_of(optimizer)()
        return optimizer

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

    def _updates(
        self,
        orders: Orders,
        shards: Shards,
        losses: Tensor,
        kept: list[dict[str, Any]],
        chosen: torch.optim.Optimizer,
    ) -> list[Update]:
        """Makes the updates in the order of the tasks; all else is in that of ``orders``."""
        norms = {steps: step_norm(chosen, steps) for steps in set(orders.steps)}
        # as if every row of a batch had the loss of its batch: local epochs count like that
        sums = (losses * torch.from_numpy(orders.counts)).sum(0).tolist()
        updates = []
        for place in np.argsort(orders.sorted).tolist():
            steps, rows, loss_sum = orders.steps[place], orders.rows[place], sums[place]
            update = Update(
                block=NO_BLOCK,
                examples=shards.sizes[orders.sorted[place]],
                steps=steps,
                step_norm=norms[steps],
                rows=rows,
                loss_sum=loss_sum,
                metrics={"loss": loss_sum / rows, "steps": float(steps)},
                state=kept[place],
            )
            updates.append(update)
        return updates

    def _tried(self, shards: Shards) -> bool:
        """Tries model and loss before the first stack; returns whether the loss is a mean."""
        ignored = ignored_target(self._local.loss)
        if ignored is not None and self._looked_at is not shards.y:
            if not shards.y.is_floating_point() and bool((shards.y == ignored).any()):
                raise NotVectorizableError(
                    f"some targets are {ignored}, which {type(self._local.loss).__name__} leaves "
                    "out of its mean: it is no mean of the losses of the rows; drop those rows, "
                    "or use vectorize=False"
                )
            self._looked_at = shards.y
        if self._mean is None:
            local = self._local.loss, self._row_losses
            rows = shards.some(_TRIED_ROWS)
            found = try_rows(self._resident.model, self._parameters, local, rows, self._twice)
            self._mean = found == "mean"
        return self._mean

    def _twice(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """Returns the gradients of two equal clients: (2, parameters)."""
        leaf = self._anchor().repeat(2, 1).requires_grad_()
        rows = [part.expand(2, *part.shape) for part in (x, y, weights)]
        gradients: Tensor = torch.autograd.grad(self._losses(leaf, *rows).sum(), leaf)[0]
        return gradients


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
