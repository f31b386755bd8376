"""The mean of many clients that take one step of plain SGD each: one step by their mean gradient.

Runs in workers. FedSGD (McMahan et al. 2017, section 2): all clients start from the same model, and
a step of SGD is an affine map of the gradient, so the mean of their steps is the step by the mean
of their gradients. That mean is the gradient of one weighted sum over the rows of all: the model is
read once for many clients, and no copy of it is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from fedproc.client.stepping import is_observed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from fedproc.client.orders import Step
    from fedproc.client.row_loss import RowLosses
    from fedproc.client.rules import LocalRule
    from fedproc.client.training import LocalTraining

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


class MeanGradient:
    """Adds the gradients of clients up in ``.grad`` of a model's parameters, each with a weight."""

    def __init__(
        self, model: nn.Module, row_losses: RowLosses, rows: tuple[Tensor, Tensor]
    ) -> None:
        """Keeps the parts; computes nothing.

        Args:
            model: At the values that all clients start from, in train mode, without gradients.
            row_losses: Outputs, targets -> the loss of each row.
            rows: Inputs (rows, ...) and targets (rows, ...) of all clients.
        """
        self._model = model
        self._row_losses = row_losses
        self._x, self._y = rows

    def of(self, step: Step, weights: Sequence[float]) -> Tensor:
        """Leaves the weighted mean of the gradients in ``.grad``.

        A client whose loss is not finite is left out.

        Args:
            step: The only batch of each client.
            weights: One per client.

        Returns:
            The loss of each client: float64, shape (clients,).
        """
        shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        index = step.index.view(step.clients, step.width)
        each = max(1, _ROWS // step.width)
        losses = torch.empty(step.clients, dtype=torch.float64)
        for start in range(0, step.clients, each):
            part = slice(start, start + each)
            losses[part] = self._add(index[part], step.weights[part], shares[part])
        finite = torch.isfinite(losses)
        if bool(finite.any()) and not bool(finite.all()):  # the others are all there is
            for parameter in self._model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(float(shares[finite].sum()))
        return losses

    def _add(self, index: Tensor, weights: Tensor, shares: Tensor) -> Tensor:
        """Adds the gradients of some clients; returns their losses.

        Args:
            index: Rows of each batch, padded: (clients, width).
            weights: What the loss of each row counts in that of its batch, padding 0: the same.
            shares: Of the clients in the mean: float64, (clients,).
        """
        counts = weights > 0
        place = torch.arange(len(index), device=index.device)[:, None].expand_as(index)[counts]
        chosen, of_row = index[counts], weights[counts]
        outputs = self._model(self._x.index_select(0, chosen))
        of_loss = self._row_losses(outputs, self._y.index_select(0, chosen)) * of_row
        losses = torch.zeros(len(index), dtype=torch.float64)
        losses.index_add_(0, place.cpu(), of_loss.detach().cpu().double())
        finite = torch.isfinite(losses)
        if not bool(finite.all()):
            # their rows would spoil the gradients of the others, also with weight 0
            if bool(finite.any()):
                here = finite.to(index.device)
                losses[finite] = self._add(index[here], weights[here], shares[finite])
            return losses
        (of_loss * shares.to(of_loss)[place]).sum().backward()  # type: ignore[no-untyped-call]
        return losses
