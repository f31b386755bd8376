"""The mean of many clients that take one step of plain SGD each: one step by their mean gradient.

Runs in workers. FedSGD (McMahan et al. 2017, section 2): all clients start from the same model, and
a step of SGD is an affine map of the gradient, so the mean of their steps is the step by the mean
of their gradients. That mean is the gradient of one weighted sum over the rows of all: the model is
read once for many clients, and no copy of it is made.

It holds where the backward pass is linear. Code of users could clip what flows back, so this is for
models and losses whose code is known to compute only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from fedproc.client.stepping import is_observed, step_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from fedproc.client.row_loss import RowLosses
    from fedproc.client.rules import LocalRule
    from fedproc.client.training import LocalTraining, OptimizerFactory

# Rows of one pass, as long as no client has more: products of matrices have reached the speed of
# the processor by then, and what the backward pass keeps stays small.
_ROWS: Final = 256


def is_affine(
    local: LocalTraining, rule: LocalRule | None, optimizer: torch.optim.Optimizer
) -> bool:
    """Tells whether the first step of a client is an affine map of its gradient.

    Args:
        local: What a client does.
        rule: The gradient correction of the strategy, or None.
        optimizer: What ``local.optimizer`` made; it has taken no step.
    """
    return (
        rule is None
        and local.clip_grad_norm is None
        and type(optimizer) is torch.optim.SGD
        and not any(optimizer.state.values())
        and not is_observed(optimizer)
    )


class SharedStep:
    """One step for many clients, from the values of a model, which stays as it is."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        row_losses: RowLosses,
        *,
        mean: bool,
    ) -> None:
        """Keeps the parts; computes nothing.

        Args:
            model: At the values that all clients start from, in train mode, without gradients.
            parameters: Those that are trained.
            row_losses: Outputs, targets -> the loss of each row.
            mean: The loss of a batch is the mean of its rows, not their sum.
        """
        self._model = model
        self._parameters = parameters
        self._row_losses = row_losses
        self._mean = mean

    def gradient(
        self, rows: tuple[Tensor, Tensor], batches: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        """Leaves the weighted mean of the gradients in ``.grad`` of the parameters.

        A client whose loss is not finite is left out.

        Args:
            rows: Inputs (rows, ...) and targets (rows, ...) of all clients.
            batches: The rows of the batch of each client.
            weights: One per client, above 0.

        Returns:
            The loss of each client: float64, shape (clients,).
        """
        # What flows back is at least as large as for each client alone: none loses digits (half
        # precision inside of a model), and one that overflows alone does so here.
        factors = torch.tensor(weights, dtype=torch.float64, device="cpu") / min(weights)
        losses = torch.empty(len(batches), dtype=torch.float64, device="cpu")
        for part in _passes(batches):
            losses[part] = self._add(rows, batches[part], factors[part])
        finite = torch.isfinite(losses)
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.div_(float(factors[finite].sum()))
        return losses

    def _add(
        self, rows: tuple[Tensor, Tensor], batches: Sequence[Tensor], factors: Tensor
    ) -> Tensor:
        """Adds the gradients of some clients, each times its factor; returns their losses."""
        x, y = rows
        counts = torch.tensor([len(batch) for batch in batches], device="cpu")
        index = torch.cat(list(batches)).to(x.device)
        outputs = self._model(x.index_select(0, index))
        of_rows = self._row_losses(outputs, y.index_select(0, index))
        if self._mean:
            of_rows = of_rows / counts.repeat_interleave(counts).to(of_rows)
        client = torch.arange(len(batches), device="cpu").repeat_interleave(counts)
        losses = torch.zeros(len(batches), dtype=torch.float64, device="cpu")
        losses.index_add_(0, client, of_rows.detach().cpu().double())
        finite = torch.isfinite(losses)
        if bool(finite.all()):
            weighted = of_rows * factors.repeat_interleave(counts).to(of_rows)
            weighted.sum().backward()  # type: ignore[no-untyped-call]
        elif bool(finite.any()):
            # the rows of the others would spoil all gradients, also with weight 0
            left = torch.nonzero(finite).flatten().tolist()
            losses[finite] = self._add(rows, [batches[n] for n in left], factors[finite])
        return losses

    def take(self, values: Tensor, factory: OptimizerFactory) -> torch.optim.Optimizer:
        """Takes the step of the gradients in ``values`` (parameters,); forgets the gradients.

        Returns:
            The optimizer that took it.
        """
        pieces = torch.split(values, [parameter.numel() for parameter in self._parameters])
        stepping = []
        for parameter, piece in zip(self._parameters, pieces, strict=True):
            stepping.append(torch.nn.Parameter(piece.view(parameter.shape)))
            if parameter.grad is not None:  # fused kernels go along both as they lie
                stepping[-1].grad = parameter.grad.contiguous()
            parameter.grad = None
        optimizer = factory(stepping)
        step_of(optimizer)()
        return optimizer


def is_sound(values: Tensor, weights: Sequence[float]) -> bool:
    """Tells whether no client's part of a mean (parameters,) can have been out of range."""
    most = torch.finfo(values.dtype).max * min(weights) / sum(weights)
    low, high = torch.aminmax(values)
    return bool(low > -most) and bool(high < most)  # of NaN neither


def _passes(batches: Sequence[Tensor]) -> Iterator[slice]:
    """Cuts clients into runs of at most so many rows, or of one client."""
    start = rows = 0
    for place, batch in enumerate(batches):
        if place > start and rows + len(batch) > _ROWS:
            yield slice(start, place)
            start, rows = place, 0
        rows += len(batch)
    yield slice(start, len(batches))
