"""Many clients trained at once: their parameters stacked, their gradients by ``torch.func.vmap``.

Runs in workers. A **stack** is a number of clients whose models are the rows of one matrix. Each
step computes the losses of all of them in one go; their sum has the gradient of each client in
its row, because no client's loss depends on another's parameters. Small models are limited by
what Python and torch spend on each operation, and a stack spends it once for all clients.

The sums inside of an operation are formed in another order than for one client alone, so the
last bits differ from the sequential result.
"""

from __future__ import annotations

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
from fedproc.client.stacked_optimizer import StackedOptimizer
from fedproc.client.stacked_rules import stacked_correction
from fedproc.client.update import NO_BLOCK, Task, Update
from fedproc.client.vectorizable import try_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fedproc.client.layout import Layout
    from fedproc.client.resident import Resident
    from fedproc.client.rules import LocalRule
    from fedproc.client.training import LocalTraining

_TRIED_ROWS: Final = 16


@dataclass(frozen=True, slots=True)
class Shards:
    """The rows of the clients of a stack.

    Attributes:
        x: Inputs (rows, ...), of these clients and perhaps of others.
        y: Targets (rows, ...).
        starts, sizes: Rows of each client lie at ``start`` to ``start + size``.
    """

    x: Tensor
    y: Tensor
    starts: Sequence[int]
    sizes: Sequence[int]

    @classmethod
    def of(cls, places: Sequence[tuple[Tensor, Tensor, int, int]]) -> Shards:
        """Finds the rows of clients; those in several blocks are copied side by side.

        Args:
            places: Inputs and targets of the client's block, first row, and the row after its last.
        """
        sizes = [stop - start for _, _, start, stop in places]
        x, y = places[0][:2]
        if all(place[0] is x for place in places):
            return cls(x, y, [start for _, _, start, _ in places], sizes)
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        x = torch.cat([part[start:stop] for part, _, start, stop in places])
        y = torch.cat([part[start:stop] for _, part, start, stop in places])
        return cls(x, y, ends[:-1], sizes)

    def take(self, index: Tensor, clients: int) -> tuple[Tensor, Tensor]:
        """Returns the rows of ``index`` (clients times width): each (clients, width, ...)."""
        x, y = (part.index_select(0, index) for part in (self.x, self.y))
        return x.view(clients, -1, *x.shape[1:]), y.view(clients, -1, *y.shape[1:])

    def some(self, rows: int) -> tuple[Tensor, Tensor]:
        """Returns rows of clients spread over the stack; one may come twice."""
        clients = [place * len(self.sizes) // rows for place in range(rows)]
        places = [self.starts[c] + place % self.sizes[c] for place, c in enumerate(clients)]
        index = torch.tensor(places, device=self.x.device)
        return self.x.index_select(0, index), self.y.index_select(0, index)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a stack made.

    Attributes:
        updates: One per client, without blocks and times.
        values: Trained parameters (clients, parameters).
        failures: Place of a client -> why its update does not count.
    """

    updates: list[Update]
    values: Tensor
    failures: dict[int, FloatingPointError]


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
            tasks: The clients.
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
        values = self._anchor().repeat(len(tasks), 1)
        chosen = self._local.optimizer(list(self._parameters))
        optimizer = StackedOptimizer(chosen, self._parameters, values)
        known = [states[place] for place in orders.sorted]
        correction = stacked_correction(self._rule, self._anchor(), shared, known)
        losses = torch.zeros(orders.counts.shape, dtype=torch.float64)
        replays = self._repeatable.holds()
        for number, step in enumerate(orders.walk(values, mean=mean)):
            training = values[: step.clients]
            inputs = training, *shards.take(step.index, step.clients), step.weights
            gradients, losses[number, : step.clients] = self._gradients(inputs, replays=replays)
            if correction is not None:
                correction.apply(gradients, training)
            optimizer.step(gradients)
        kept = correction.keep(values, orders.steps, chosen) if correction else [{} for _ in tasks]
        updates = self._updates(orders, shards, losses, kept, chosen)
        places = torch.tensor(orders.sorted, device=values.device).argsort()
        return Trained(updates, values.index_select(0, places), _failures(orders, losses))

    def _anchor(self) -> Tensor:
        """Returns the global parameters: (parameters,)."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self._parameters])

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
