"""What can be trained stacked, and what is refused with the reason and a way out.

Runs in the parent, where a look at the model is enough, and in workers before the first stack,
where the model and the loss are tried on real rows.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from fedproc.client.gradients import non_finite_loss
from fedproc.client.layout import Layout
from fedproc.client.row_loss import (
    NotVectorizableError,
    checked_loss,
    is_close,
    knows_rows,
    reduction_of,
    require_counted,
)
from fedproc.client.rules import ControlVariates, Proximal
from fedproc.client.training import LocalTraining
from fedproc.client.unlike_rows import unlike_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from fedproc.client.gradients import Loss
    from fedproc.client.row_loss import Reduction, RowLosses
    from fedproc.client.rules import LocalRule
    from fedproc.client.training import TrainFunction

    Rows = tuple[Tensor, Tensor]  # inputs and targets, or outputs and targets

_DTYPES: Final = (torch.float32, torch.float64)
# A stack keeps a few copies of its models (values, gradients, momenta) near the caches; more
# clients than this gain nothing, because torch's cost of an operation is spread enough.
MOST_CLIENTS: Final = 128
_MOST_BYTES: Final = 32 << 20


def stack_size(nbytes: int) -> int:
    """Returns how many clients train at once whose blocks have ``nbytes``.

    It depends on the model only, so that equal runs have equal stacks.
    """
    return max(1, min(MOST_CLIENTS, _MOST_BYTES // max(1, nbytes)))


def require_vectorizable(
    model: nn.Module, local: LocalTraining | TrainFunction, rule: LocalRule | None
) -> None:
    """Checks what can be seen without rows.

    Raises:
        NotVectorizableError: The clients cannot be trained stacked; the text says why, and what
            would help.
    """
    if not isinstance(local, LocalTraining):
        raise NotVectorizableError(
            "vectorize needs LocalTraining: what a train function does for one client cannot be "
            "done for many at once; use vectorize=False"
        )
    if rule is not None and type(rule) not in (Proximal, ControlVariates):
        raise NotVectorizableError(
            f"vectorize knows the corrections of FedProx and Scaffold, not {type(rule).__name__}; "
            "use vectorize=False"
        )
    for path, module in model.named_modules():
        for reason in _refusals(module):
            name = f"{path or 'model'} ({type(module).__name__})"
            raise NotVectorizableError(f"{name} cannot be vectorized: {reason}")
    dtypes = [section.dtype for section in Layout.of(model).of_kind("trained")]
    if len(dtypes) > 1 or dtypes[0] not in _DTYPES:
        raise NotVectorizableError(
            f"vectorize needs all trained parameters in float32, or all in float64, got {dtypes}: "
            "convert the model, or use vectorize=False"
        )
    checked_loss(local.loss)


def _refusals(module: nn.Module) -> Iterator[str]:
    """Yields why a module cannot be part of a stacked model."""
    drawn = "its random stream cannot be the one of each client"
    if isinstance(module, _BatchNorm) or (
        isinstance(module, _InstanceNorm) and module.track_running_stats
    ):
        yield (
            "it mixes the rows of a batch and writes running statistics; "
            "use GroupNorm or LayerNorm, or vectorize=False"
        )
    if module._backward_hooks or module._backward_pre_hooks:
        yield "its backward hooks would see all clients at once; remove them, or vectorize=False"
    if isinstance(module, _DropoutNd) and module.p > 0:
        yield f"{drawn}; set p=0, or use vectorize=False"
    if isinstance(module, nn.RReLU | nn.FractionalMaxPool2d | nn.FractionalMaxPool3d):
        yield f"{drawn}; use vectorize=False"
    if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
        yield f"{drawn}; set dropout=0, or use vectorize=False"
    if isinstance(module, nn.RNNBase):
        yield "torch.func has no rule for its kernels; use cells in a loop, or vectorize=False"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        if module.sparse or module.max_norm is not None:
            yield "sparse gradients, max_norm write rows in place; use neither, or vectorize=False"
        if module.scale_grad_by_freq:
            yield "scale_grad_by_freq counts the rows of a batch; leave it out, or vectorize=False"


def try_rows(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    losses: tuple[Loss, RowLosses],
    rows: tuple[Rows, Sequence[Rows]],
    twice: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Reduction:
    """Compares what a stack computes on real rows with what plain torch computes.

    Args:
        model: The resident model, in train mode, at its global values.
        parameters: Its trained parameters, in the order of the columns of a stack.
        losses: The loss as given, and row by row.
        rows: A few inputs and targets; and all there are, some of which the loss is tried on.
        twice: Inputs, targets, weights -> gradients of two equal clients: (2, parameters).

    Returns:
        Whether the loss is the mean or the sum over the rows.

    Raises:
        NotVectorizableError: They differ, or torch cannot compute the stack.
        Exception: What plain torch raises on these rows, or that their loss is not finite.
    """
    (x, y), blocks = rows
    for _, targets in blocks:
        require_counted(losses[0], targets)
    outputs, plain = _plain(model, losses[0], (x, y), parameters)
    _require_independent_rows(model, x, outputs)
    try:
        unlike = () if knows_rows(losses[0]) else unlike_rows(blocks)
        reduction = _reduction(losses, outputs, y, _computed(model, losses[0], unlike))
        weight = 1.0 / len(x) if reduction == "mean" else 1.0
        found = twice(x, y, torch.full((len(x),), weight, device="cpu").to(plain))
    except NotVectorizableError:
        raise
    except Exception as error:
        raise NotVectorizableError(_torch_says(error)) from error
    for gradient in found:
        _require_close(gradient, plain)
    return reduction


def _reduction(
    losses: tuple[Loss, RowLosses], outputs: Tensor, y: Tensor, others: Iterable[Rows]
) -> Reduction:
    """Finds out whether a loss is the mean or the sum over some rows, and the same over others."""
    reduction = reduction_of(losses, outputs, y)
    fewer = [(outputs[:n], y[:n]) for n in (2, 3)]  # a loss may ask how many rows there are
    for some in chain(fewer, others):
        reduction_of(losses, *some, wanted=reduction)
    return reduction


def _computed(model: nn.Module, loss: Loss, rows: Iterable[Rows]) -> Iterator[Rows]:
    """Yields outputs and targets of rows that tell something; others make their clients fail."""
    for x, y in rows:
        try:
            with torch.no_grad():
                outputs = model(x)
                is_finite = bool(loss(outputs, y).isfinite())
        except Exception:  # noqa: BLE001
            continue
        if is_finite:
            yield outputs, y


def _require_close(gradient: Tensor, plain: Tensor) -> None:
    if not is_close(gradient, plain):
        raise NotVectorizableError(
            "the gradient of a stack differs from the plain one by "
            f"{float((gradient - plain).abs().max()):.2g}: the model or the loss does not do "
            "the same thing twice, or not row by row; use vectorize=False"
        )


def _torch_says(error: Exception) -> str:
    cause = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return (
        "torch.func.vmap cannot run this model or loss for many clients at once; avoid what it "
        f"names, or use vectorize=False. It says: {cause}"
    )


def _plain(
    model: nn.Module,
    loss: Loss,
    rows: Rows,
    parameters: Sequence[nn.Parameter],
) -> tuple[Tensor, Tensor]:
    """Returns outputs and gradient (parameters,) as local epochs compute them."""
    before = [buffer._version for buffer in model.buffers()]
    outputs = model(rows[0])
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != rows[0].shape[:1]:
        raise NotVectorizableError(
            "vectorize needs a model that returns one tensor with one entry a row; "
            "use vectorize=False"
        )
    value = loss(outputs, rows[1])
    if not bool(value.isfinite().all()):  # of the losses of the rows it tells nothing
        raise non_finite_loss(float(value), 0)
    found: Sequence[Tensor | None] = torch.autograd.grad(value, parameters, allow_unused=True)
    if [buffer._version for buffer in model.buffers()] != before:
        raise NotVectorizableError(
            "the model writes to its buffers while it trains, and stacked clients share them; "
            "use vectorize=False"
        )
    missing = [p for p, gradient in zip(parameters, found, strict=True) if gradient is None]
    if missing:
        raise NotVectorizableError(
            f"{len(missing)} trained parameters get no gradient, and optimizers leave those alone: "
            "freeze them with requires_grad_(False), or use vectorize=False"
        )
    flat = [gradient.reshape(-1) for gradient in found if gradient is not None]
    return outputs.detach(), torch.cat(flat)


def _require_independent_rows(model: nn.Module, x: Tensor, outputs: Tensor) -> None:
    """Raises unless an output depends on its own row only: padding must not reach the others.

    Tried with fewer rows, even and odd numbers of them, and with the rows turned round: where a row
    stands must not matter either, since rows of several clients may be one batch.
    """
    with torch.no_grad():
        tried = [(model(x[:rows]), outputs[:rows]) for rows in (1, 2, 3)]
        tried.append((model(x.flip(0)), outputs.flip(0)))
    if not all(is_close(found, expected.detach()) for found, expected in tried):
        raise NotVectorizableError(
            "the output for a row depends on the other rows of its batch, or is drawn at random: "
            "it is another one with fewer rows, or in another order. Clients with unlike numbers "
            "of rows cannot share a padded batch; use vectorize=False"
        )
