"""What a model gives away: attacks that its owner runs before somebody else does.

Runs in the parent, or anywhere else; needs torch only. Nothing of the package imports it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_ROWS = 256
"""Rows that go through the model at once."""
NORMAL_975 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution, for an interval of 95 %."""

Loss = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True, slots=True)
class Membership:
    """How well the loss tells who was trained on from who was not.

    Attributes:
        auc: Area under the ROC curve: the probability that a member has a smaller loss than a
            non-member, equal losses counted half. 0.5 gives nothing away, 1 everything.
        interval: 95 % confidence interval of ``auc``, (low, high), within [0, 1].
        members: Rows that the model was trained on.
        non_members: Rows that it was not.
    """

    auc: float
    interval: tuple[float, float]
    members: int
    non_members: int


def membership(
    model: nn.Module, members: Any, non_members: Any, loss: Loss | None = None
) -> Membership:
    """Tries to tell members from non-members by their loss, as a threshold on it would.

    Yeom et al., "Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting", CSF
    2018. All thresholds are taken together, as the area under the ROC curve. It is a lower bound:
    other attacks find more, and some rows are given away more than the average one (Carlini et al.,
    "Membership Inference Attacks From First Principles", S&P 2022).

    The interval is DeLong's (DeLong et al., Biometrics 44, 1988, by the ranks of Sun and Xu, IEEE
    Signal Processing Letters 21, 2014). Its variance is zero where every pair of a member and a
    non-member compares alike; with k disjoint pairs, that has a probability of at least
    0.025^(1/k), which bounds the interval then.

    Args:
        model: In eval mode while it is attacked; its modes are restored.
        members: (x, y) of rows it was trained on: tensors or arrays of shapes (m, ...).
        non_members: (x, y) of rows of the same kind that it has not seen, shapes (n, ...).
        loss: ``loss(outputs, targets)`` -> one number; called with one row at a time, so a mean
            does as well as a sum. None: cross entropy of outputs (rows, classes) and integer
            targets (rows,).

    Raises:
        ValueError: Not a module, fewer than two rows, shapes that do not fit, or a loss that is
            not one finite number per row.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model must be a local torch.nn.Module, got {type(model).__name__}; get() brings a "
            "remote one home"
        )
    inside, outside = _pair("members", members), _pair("non_members", non_members)
    _require_alike(inside, outside)
    low = _losses(model, "members", inside, loss)
    high = _losses(model, "non_members", outside, loss)
    auc, interval = area(low, high)
    return Membership(auc, interval, len(low), len(high))


def area(smaller: Tensor, larger: Tensor) -> tuple[float, tuple[float, float]]:
    """The probability that a value of ``smaller`` is below one of ``larger``, ties counted half.

    Args:
        smaller: Shape (m,), finite, m >= 2.
        larger: Shape (n,), finite, n >= 2.

    Returns:
        The area under the ROC curve and its 95 % confidence interval, see :func:`membership`.
    """
    below, above = _wins(smaller, larger), 1 - _wins(larger, smaller)
    auc = below.mean().item()
    variance = (below.var() / len(below) + above.var() / len(above)).item()
    if variance > 0:
        reach = NORMAL_975 * math.sqrt(variance)
        return auc, (max(0.0, auc - reach), min(1.0, auc + reach))
    certain = 0.025 ** (1 / min(len(smaller), len(larger)))
    return auc, (auc * certain, 1 - (1 - auc) * certain)


def _wins(values: Tensor, others: Tensor) -> Tensor:
    """For each value the part of ``others`` that is larger, equal ones counted half; float64."""
    ordered = others.sort().values
    below = torch.searchsorted(ordered, values, right=False)
    up_to = torch.searchsorted(ordered, values, right=True)
    return 1 - (below + up_to).double() / (2 * len(others))


def _pair(name: str, rows: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(rows, tuple | list) or len(rows) != 2:
        raise ValueError(f"{name} must be a pair (x, y), got {type(rows).__name__}")
    x, y = (torch.as_tensor(part) for part in rows)
    if x.dim() == 0 or y.dim() == 0 or len(x) != len(y):
        raise ValueError(f"{name} needs one target for each row of x, got {_shapes((x, y))}")
    if len(x) < 2:
        raise ValueError(f"{name} needs at least two rows for an interval, got {len(x)}")
    return x, y


def _require_alike(inside: tuple[Tensor, Tensor], outside: tuple[Tensor, Tensor]) -> None:
    if any(one.shape[1:] != other.shape[1:] for one, other in zip(inside, outside, strict=True)):
        raise ValueError(
            f"members and non_members must be rows of the same kind, got {_shapes(inside)} and "
            f"{_shapes(outside)}"
        )


def _shapes(rows: tuple[Tensor, Tensor]) -> str:
    return f"x {tuple(rows[0].shape)} and y {tuple(rows[1].shape)}"


def _losses(model: nn.Module, name: str, rows: tuple[Tensor, Tensor], loss: Loss | None) -> Tensor:
    """The loss of each row, shape (rows,), float64, on the CPU."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            chunks = [
                _chunk_losses(model(x.to(device)), y.to(device), loss)
                for x, y in zip(*(torch.split(part, CHUNK_ROWS) for part in rows), strict=True)
            ]
    finally:
        for module, mode in modes:
            module.training = mode
    found = torch.cat(chunks).double().cpu()
    wrong = int((~found.isfinite()).sum())
    if wrong:
        raise ValueError(f"the loss of {wrong} of {len(found)} rows of {name} is not finite")
    return found


def _chunk_losses(outputs: Tensor, targets: Tensor, loss: Loss | None) -> Tensor:
    if len(outputs) != len(targets):
        raise ValueError(
            f"model returned {len(outputs)} outputs for {len(targets)} rows; it must return one "
            "output per row"
        )
    if loss is None:
        if outputs.dim() != 2 or targets.dim() != 1 or targets.is_floating_point():
            raise ValueError(
                "without a loss, outputs must be (rows, classes) and targets integers (rows,), got "
                f"{tuple(outputs.shape)} and {tuple(targets.shape)} of {targets.dtype}; give loss="
            )
        return nn.functional.cross_entropy(outputs, targets.long(), reduction="none")
    each = [loss(outputs[n : n + 1], targets[n : n + 1]) for n in range(len(targets))]
    for value in each:
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"loss must return one number for one row, got {value!r:.80}")
    return torch.stack([value.reshape(()) for value in each])
