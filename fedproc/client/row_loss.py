"""The loss of every row by itself, out of a loss that reduces a batch to one number.

Runs in workers inside ``torch.func.vmap``, and in the parent for what can be refused early. A
padded batch needs the rows apart: its loss is their sum with weights, where padding weighs 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn

from fedproc.client.denominators import ignored_target, is_sum, told_reduction

if TYPE_CHECKING:
    from fedproc.client.gradients import Loss

Reduction = Literal["mean", "sum"]
RowLosses = Callable[[Tensor, Tensor], Tensor]

# Losses whose reduction="none" gives at least one number a row, and whose mean over a batch is
# the mean of the means of its rows.
_KNOWN: Final = (
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.CrossEntropyLoss,
    nn.HuberLoss,
    nn.KLDivLoss,
    nn.L1Loss,
    nn.MSELoss,
    nn.MultiLabelSoftMarginLoss,
    nn.NLLLoss,
    nn.PoissonNLLLoss,
    nn.SmoothL1Loss,
    nn.SoftMarginLoss,
)
# Of these, outputs (n, 1) and targets (n,) are broadcast: every row meets every other.
_BROADCASTING: Final = (
    nn.HuberLoss,
    nn.KLDivLoss,
    nn.L1Loss,
    nn.MSELoss,
    nn.MultiLabelSoftMarginLoss,
    nn.PoissonNLLLoss,
    nn.SmoothL1Loss,
    nn.SoftMarginLoss,
)
_NORMALISED: Final = (nn.CrossEntropyLoss, nn.NLLLoss)
_OF_ROWS: Final = "batchmean"  # of KLDivLoss: the mean of the sums of the rows


class NotVectorizableError(ValueError):
    """Clients of this kind cannot be trained at once; the text says why and what would help."""


def checked_loss(loss: Loss) -> None:
    """Looks at a loss without calling it.

    Raises:
        NotVectorizableError: It divides by more than the number of rows, or does not reduce.
    """
    weight = getattr(loss, "weight", None)
    if isinstance(loss, _NORMALISED) and weight is not None and loss.reduction == "mean":
        raise NotVectorizableError(
            f"{type(loss).__name__} with class weights divides by the weights of the batch, so it "
            "is no mean of the losses of the rows; leave the weights out, use reduction='sum', or "
            "vectorize=False"
        )
    reduction = told_reduction(loss)
    if reduction not in (None, "mean", "sum", _OF_ROWS):
        raise NotVectorizableError(
            f"the loss has reduction={reduction!r}: vectorize needs 'mean' or 'sum'"
        )


def require_counted(loss: Loss, y: Tensor) -> None:
    """Raises NotVectorizableError if a loss is known to leave some targets out of its mean."""
    ignored = None if is_sum(loss) else ignored_target(loss)
    if ignored is not None and not y.is_floating_point() and bool((y == ignored).any()):
        raise NotVectorizableError(
            f"some targets are {ignored}, which {type(loss).__name__} leaves out of its mean: it "
            "is no mean of the losses of the rows; drop those rows, or use vectorize=False"
        )


def knows_rows(loss: Loss) -> bool:
    """Tells whether torch itself computes the losses of the rows; else what is tried is known."""
    return type(loss) in _KNOWN or loss is nn.functional.cross_entropy


def row_losses(loss: Loss) -> RowLosses:
    """Makes a function of outputs (rows, ...) and targets (rows, ...) -> losses (rows,).

    Of the losses of torch it is the loss itself with ``reduction="none"``. Of any other it is the
    loss of batches of one row.
    """
    if type(loss) in _KNOWN:
        single = copy.copy(loss)
        mean = single.reduction == "mean"  # type: ignore[attr-defined]
        single.reduction = "none"  # type: ignore[attr-defined]
        broadcasts = type(loss) in _BROADCASTING

        def losses(outputs: Tensor, targets: Tensor) -> Tensor:
            apart = outputs.ndim != targets.ndim or len(outputs) != len(targets)
            if broadcasts and apart:
                raise NotVectorizableError(
                    f"{type(loss).__name__} broadcasts outputs of shape {tuple(outputs.shape)} and "
                    f"targets of shape {tuple(targets.shape)}: padding would get into the loss of "
                    "the other rows; give both as many dimensions, or use vectorize=False"
                )
            return _per_row(single(outputs, targets), mean=mean)

        return losses
    if loss is nn.functional.cross_entropy:
        return lambda outputs, targets: _per_row(
            nn.functional.cross_entropy(outputs, targets, reduction="none"), mean=True
        )
    return torch.func.vmap(lambda output, target: loss(output[None], target[None]).reshape(()))


def _per_row(losses: Tensor, *, mean: bool) -> Tensor:
    if losses.ndim == 1:
        return losses
    flat = losses.flatten(1)
    return flat.mean(1) if mean else flat.sum(1)


def reduction_of(
    losses: tuple[Loss, RowLosses],
    outputs: Tensor,
    targets: Tensor,
    wanted: Reduction | None = None,
) -> Reduction:
    """Finds out whether a loss is the mean or the sum of the losses of its rows.

    Args:
        losses: The loss as given, and what :func:`row_losses` made of it.
        outputs: Of some rows, at least two.
        targets: Of the same rows.
        wanted: What it was for other rows; None: nothing is known yet.

    Raises:
        NotVectorizableError: It is neither, on these rows.
    """
    leaf = outputs.detach().requires_grad_()
    followed = losses[0](leaf, targets).double(), losses[1](leaf, targets).double()
    whole, each = (part.detach() for part in followed)
    if bool(whole.isfinite()) and not bool(each.isfinite().all()):
        raise NotVectorizableError(
            f"the loss of {len(outputs)} rows is {float(whole):.6g}, but that of some rows by "
            "themselves is not finite: it leaves them out of its mean; drop those rows, or use "
            "vectorize=False"
        )
    scale = float(each.abs().sum())
    said: Any = told_reduction(losses[0])
    wanted = wanted or ("mean" if said == _OF_ROWS else said)
    makes: dict[Reduction, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "sum": torch.sum}
    for reduction, make in makes.items():
        if wanted in (None, reduction) and not abs(float(whole - make(each))) > 1e-5 * scale:
            _require_equal_weights(followed[0], make(followed[1]), leaf)
            return reduction
    raise NotVectorizableError(
        f"the loss of {len(outputs)} rows is {float(whole):.6g}, neither the mean nor the sum of "
        f"the losses of the rows ({float(each.mean()):.6g}, {float(each.sum()):.6g}): a padded "
        "batch would change it; use a mean over the rows, or vectorize=False"
    )


def _require_equal_weights(whole: Tensor, made: Tensor, outputs: Tensor) -> None:
    """Raises unless both follow the outputs alike; rows of equal losses are equal in any mean."""
    gradients = [torch.autograd.grad(value, outputs)[0] for value in (whole, made)]
    if not is_close(*gradients):
        raise NotVectorizableError(
            f"the loss of {len(outputs)} rows does not weigh them equally, as a mean or a sum "
            "over the rows would: a padded batch would change it; use a mean over the rows, or "
            "vectorize=False"
        )


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Tells whether two results are equal up to the rounding of sums in another order."""
    finite = expected.detach()[expected.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)
