"""What the loss of a batch was divided by, so that the losses of batches can be added up.

Runs in workers, and in the parent for what can be refused early. Most losses are a mean over the
rows. Of torch's, some leave targets out of that mean or weigh them; those that are a sum say so.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from torch import nn
from torch.nn._reduction import legacy_get_string

if TYPE_CHECKING:
    from torch import Tensor

    from fedproc.client.gradients import Loss

    Terms = Callable[[Tensor, Tensor], tuple[float, float]]

_FORWARDS: Final = (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward)  # also of subclasses
_FUNCTIONS: Final = (nn.functional.cross_entropy, nn.functional.nll_loss)
_IGNORED: Final = -100  # by default


def told(loss: Loss, name: str) -> Any:
    """Returns what a loss says of itself, or None: what a partial sets, or an attribute."""
    if not isinstance(loss, functools.partial):
        return getattr(loss, name, None)
    if name in loss.keywords:
        return loss.keywords[name]
    own = vars(loss).get(name)
    return told(loss.func, name) if own is None else own


def told_reduction(loss: Loss) -> str | None:
    """Returns how a loss says that it reduces the rows, or None; also in torch's former words."""
    former = told(loss, "size_average"), told(loss, "reduce")
    if isinstance(loss, functools.partial) and former != (None, None):
        return legacy_get_string(*former, emit_warning=False)
    said: str | None = told(loss, "reduction")
    return said


def is_sum(loss: Loss) -> bool:
    """Tells whether a loss says that it is the sum over the rows."""
    return told_reduction(loss) == "sum"


def ignored_target(loss: Loss) -> int | None:
    """Returns the target that a loss of torch's leaves out of its mean, or None."""
    called = loss.func if isinstance(loss, functools.partial) else loss
    if called not in _FUNCTIONS and getattr(type(loss), "forward", None) not in _FORWARDS:
        return None
    ignored = told(loss, "ignore_index")
    return _IGNORED if ignored is None else int(ignored)


def labelled_rows(loss: Loss | None, targets: Tensor) -> int:
    """Counts the rows that the loss says something of: not those without a label that counts."""
    ignored = None if loss is None else ignored_target(loss)
    if loss is None or ignored is None or targets.is_floating_point():
        return len(targets)
    counts = _counts(targets, ignored, told(loss, "weight")) != 0
    return int(counts.reshape(len(targets), -1).any(1).sum()) if len(targets) else 0


def terms_of(loss: Loss) -> Terms:
    """Makes a function of outputs and targets -> a term of a sum over batches, what it counts.

    The sum of the terms divided by the sum of what they count is the loss of all rows at once. Of a
    function of a user's that is the mean over the rows, unless it says that it is their sum.
    """
    if is_sum(loss):
        return lambda outputs, targets: (float(loss(outputs, targets)), float(len(targets)))

    def of_rows(outputs: Tensor, targets: Tensor) -> tuple[float, float]:
        rows = float(len(targets))
        return float(loss(outputs, targets)) * rows, rows

    ignored, weight = ignored_target(loss), told(loss, "weight")
    if ignored is None or told_reduction(loss) not in (None, "mean"):
        return of_rows

    def of_labels(outputs: Tensor, targets: Tensor) -> tuple[float, float]:
        if targets.is_floating_point():  # probabilities of the classes
            return of_rows(outputs, targets)
        counted = float(_counts(targets, ignored, weight).sum())
        if counted:
            return float(loss(outputs, targets)) * counted, counted
        return float(_summing(loss)(outputs, targets)), 0.0  # the mean would be something / 0

    return of_labels


def _summing(loss: Loss) -> Loss:
    if isinstance(loss, nn.Module):
        made = copy.copy(loss)
        made.reduction = "sum"  # type: ignore[assignment]
        return made
    return functools.partial(loss, reduction="sum", size_average=None, reduce=None)  # type: ignore[call-arg]


def _counts(targets: Tensor, ignored: int, weight: Tensor | None) -> Tensor:
    """Returns what each target counts in a mean of torch's: 0, 1, or the weight of its class.

    float64, of the shape of the targets.
    """
    is_label = targets != ignored
    counts = is_label.double()
    if weight is not None:
        counts[is_label] = weight[targets[is_label].long()].double()
    return counts
