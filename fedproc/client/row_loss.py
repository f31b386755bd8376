"""The loss of every row by itself, out of a loss that reduces a batch to one number.

Runs in workers inside ``torch.func.vmap``, and in the parent for what can be refused early. A
padded batch needs the rows apart: its loss is their sum with weights, where padding weighs 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Final, Literal

import torch
from torch import Tensor, nn

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
    nn.L1Loss,
    nn.MSELoss,
    nn.MultiLabelSoftMarginLoss,
    nn.PoissonNLLLoss,
    nn.SmoothL1Loss,
    nn.SoftMarginLoss,
)
_NORMALISED: Final = (nn.CrossEntropyLoss, nn.NLLLoss)


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
    if getattr(loss, "reduction", "mean") not in ("mean", "sum"):
        raise NotVectorizableError(
            f"the loss has reduction={loss.reduction!r}: vectorize needs 'mean' or 'sum'"  # type: ignore[attr-defined]
        )


def ignored_target(loss: Loss) -> int | None:
    """Returns the target that a loss leaves out of its mean, or None."""
    if loss in (nn.functional.cross_entropy, nn.functional.nll_loss):
        return -100  # their default
    return loss.ignore_index if isinstance(loss, _NORMALISED) else None


def require_counted(loss: Loss, y: Tensor) -> None:
    """Raises NotVectorizableError if a loss is known to leave some targets out of its mean."""
    ignored = ignored_target(loss)
    if ignored is not None and not y.is_floating_point() and bool((y == ignored).any()):
        raise NotVectorizableError(
            f"some targets are {ignored}, which {type(loss).__name__} leaves out of its mean: it "
            "is no mean of the losses of the rows; drop those rows, or use vectorize=False"
        )


def unusual_targets(y: Tensor, tried: Collection[int]) -> dict[int, int]:
    """Finds targets that a loss may leave out of its mean, and were not tried yet.

    Returns:
        Negative class -> a row that has it.
    """
    if y.is_floating_point() or y.ndim != 1 or not bool((y < 0).any()):
        return {}
    found = {int(y[row]): row for row in torch.nonzero(y < 0).flatten().tolist()}
    return {target: found[target] for target in sorted(found.keys() - set(tried))}


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
    whole = losses[0](outputs, targets).double()
    each = losses[1](outputs, targets).double()
    if bool(whole.isfinite()) and not bool(each.isfinite().all()):
        raise NotVectorizableError(
            f"the loss of {len(outputs)} rows is {float(whole):.6g}, but that of some rows by "
            "themselves is not finite: it leaves them out of its mean; drop those rows, or use "
            "vectorize=False"
        )
    scale = float(each.abs().sum())
    told = wanted or getattr(losses[0], "reduction", None)
    makes: dict[Reduction, Tensor] = {"mean": each.mean(), "sum": each.sum()}
    for reduction, value in makes.items():
        if told in (None, reduction) and not abs(float(whole - value)) > 1e-5 * scale:
            return reduction
    raise NotVectorizableError(
        f"the loss of {len(outputs)} rows is {float(whole):.6g}, neither the mean nor the sum of "
        f"the losses of the rows ({float(each.mean()):.6g}, {float(each.sum()):.6g}): a padded "
        "batch would change it; use a mean over the rows, or vectorize=False"
    )
