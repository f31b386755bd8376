"""The weighted mean of whole models.

Runs in the parent for local models, and in a worker for models that are there. Plain torch: it
knows nothing of pointers or processes. All models must be of one architecture.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import operator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedproc.client import compiled
from fedproc.client.weighing import add_weighted, exact_product
from fedproc.memory.copying import fresh, side_by_side

if TYPE_CHECKING:
    from collections.abc import Sequence

# Sums are formed in pieces that stay in the cache, so a mean needs two float64 buffers of this
# many elements for each thread, however large the parameter is. Threads that share the pieces take
# what torch leaves to one thread: it would wake its own for each operation on a larger one, which
# was up to 50 times slower where all cores are busy.
_PIECE: Final = 1 << 17
_SHARED_PIECE: Final = 1 << 15
_UNCOMPARABLE: Final = (torch.uint16, torch.uint32)


def average_modules(
    models: Sequence[nn.Module], weights: Sequence[float] | None = None
) -> nn.Module:
    """Averages models: Σ wᵢ·yᵢ / Σ wᵢ for each parameter and floating buffer.

    Sums are formed in float64 (complex128 for complex tensors), in the order of the models, and
    cast once to the tensor's dtype. Integer and bool buffers become the largest value. A model of
    weight 0 contributes nothing, not even NaN.

    Args:
        models: At least one; they stay as they are and share no memory with the result.
        weights: One per model, finite and not negative, not all zero. None: all equal.

    Returns:
        A copy of the first model with averaged values: its class, mode and frozen parameters are
        kept, what is tied stays tied, and there are no gradients.

    Raises:
        ValueError: There are no models, the weights do not fit, or the models differ in
            architecture; the text names the first difference.
        TypeError: One of the models is not a module.
    """
    models = list(models)
    factors = _checked_weights(len(models), weights)
    tensors = [_named_tensors(model, place) for place, model in enumerate(models)]
    for place in range(1, len(models)):
        _check_same_architecture(tensors[0], tensors[place], place)
    used = [(named, factor) for named, factor in zip(tensors, factors, strict=True) if factor]
    with torch.no_grad():
        # The copy takes what it finds here in place of the first model's own tensors. Tied ones
        # are found under one key, so they stay tied.
        memo = _detached_results(models[0])
        for name, first in tensors[0].items():
            if id(first) not in memo:
                values = [(named[name].detach(), factor) for named, factor in used]
                memo[id(first)] = _like(first, _combine(first, values))
        return copy.deepcopy(models[0], memo)


# ---------------------------------------------------------------- checks


def _checked_weights(count: int, weights: Sequence[float] | None) -> list[float]:
    if count == 0:
        raise ValueError("no models to average: give at least one")
    if weights is None:
        return [1.0] * count
    factors = [float(weight) for weight in weights]
    if len(factors) != count:
        raise ValueError(f"{count} models but {len(factors)} weights: give one weight per model")
    for place, factor in enumerate(factors):
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(f"weights[{place}] is {factor}: weights must be finite and not < 0")
    if not 0 < _sum(factors) < math.inf:
        raise ValueError(f"the sum of the weights is {_sum(factors)}: there is no mean")
    return factors


def _sum(numbers: Sequence[float]) -> float:
    """One after the other; what ``sum`` does with floats depends on the version of Python."""
    return functools.reduce(operator.add, numbers)


def _named_tensors(model: nn.Module, place: int) -> dict[str, Tensor]:
    """All parameters and buffers, non-persistent ones and second names of tied ones included."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"models[{place}] is not a torch.nn.Module but {type(model).__name__}")
    parameters = model.named_parameters(remove_duplicate=False)
    named = dict(itertools.chain(parameters, model.named_buffers(remove_duplicate=False)))
    for name, tensor in named.items():
        if is_lazy(tensor):
            raise ValueError(f"{name!r} of models[{place}] has no values yet: run a batch first")
    return named


def _check_same_architecture(
    first: dict[str, Tensor], other: dict[str, Tensor], place: int
) -> None:
    """Raises for the first name, kind, shape, dtype or tie that differs."""
    for name, tensor in first.items():
        if name not in other:
            raise ValueError(f"models[{place}] has no {name!r}, which models[0] has")
        here, there = _description(tensor), _description(other[name])
        if here != there:
            raise ValueError(f"{name!r} is {here} in models[0] but {there} in models[{place}]")
    for name in other:
        if name not in first:
            raise ValueError(f"models[{place}] has {name!r}, which models[0] has not")
    here_tied, there_tied = _ties(first), _ties(other)
    for name in first:
        if here_tied[name] != there_tied[name]:
            raise ValueError(
                f"{name!r} is the same tensor as {here_tied[name]!r} in models[0] but as "
                f"{there_tied[name]!r} in models[{place}]"
            )


def _description(tensor: Tensor) -> str:
    kind = "a parameter" if isinstance(tensor, nn.Parameter) else "a buffer"
    return f"{kind} of shape {tuple(tensor.shape)} and {tensor.dtype}"


def _ties(named: dict[str, Tensor]) -> dict[str, str]:
    """The first name of each tensor, under all its names."""
    first_names: dict[int, str] = {}
    ordered = sorted(named)  # models may define the same names in another order
    return {name: first_names.setdefault(id(named[name]), name) for name in ordered}


# ---------------------------------------------------------------- values


def _combine(first: Tensor, values: list[tuple[Tensor, float]]) -> Tensor:
    """One tensor out of those of all models, in the layout and on the device of ``first``."""
    if not (first.is_floating_point() or first.is_complex()):
        largest = _largest([value.to(first.device) for value, _ in values])
        return torch.empty_like(first).copy_(largest)
    flat = _mean([(_real(value).reshape(-1), factor) for value, factor in values], first.device)
    real = flat.view(_real(first).shape)
    mean = torch.view_as_complex(real) if first.is_complex() else real
    same = mean.stride() == first.stride()
    return mean if same else torch.empty_like(first).copy_(mean)


def _like(first: Tensor, value: Tensor) -> Tensor:
    if isinstance(first, nn.Parameter):
        return type(first)(value, first.requires_grad)
    return value


def _detached_results(model: nn.Module) -> dict[int, Any]:
    """Copies of tensors that earlier calls left as attributes, by the id of the original.

    ``deepcopy`` refuses tensors that are part of a graph; the copy needs their values only.
    """
    attributes = (value for module in model.modules() for value in vars(module).values())
    return {
        id(value): value.detach().clone()
        for value in attributes
        if isinstance(value, Tensor) and not value.is_leaf
    }


def _real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers.

    A weight is real, so both parts are sums of their own. A product of complex numbers would
    turn an infinite part into NaN in the other one.
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _mean(values: list[tuple[Tensor, float]], device: torch.device) -> Tensor:
    """The mean of flat tensors, in pieces that as many threads share as torch has."""
    flat = values[0][0]
    if device.type == "cpu":
        threads, mean = torch.get_num_threads(), fresh(flat.nbytes).view(flat.dtype)
    else:
        threads, mean = 1, torch.empty_like(flat, device=device)
    if compiled.fits(mean) and all(compiled.fits(value) for value, _ in values):
        _fill_compiled(mean, values, threads)
    else:
        _fill_in_torch(mean, values, threads)
    return mean


def _fill_compiled(mean: Tensor, values: list[tuple[Tensor, float]], threads: int) -> None:
    """The mean by compiled code; a thread that has time takes the next piece."""
    vectors, weights = zip(*values, strict=True)
    task, pieces = (mean, vectors, weights, _sum(weights)), compiled.pieces(len(mean))
    side_by_side(compiled.mean_into, [(*task, first, pieces.step) for first in pieces], threads)


def _fill_in_torch(mean: Tensor, values: list[tuple[Tensor, float]], threads: int) -> None:
    """The same mean by torch; each thread has its share of the pieces."""
    size = _SHARED_PIECE if threads > 1 else _PIECE
    pieces = [torch.split(value, size) for value, _ in values]
    weights = [weight for _, weight in values]
    parts = torch.split(mean, size)
    places = range(len(parts))
    shares = [places[thread::threads] for thread in range(min(threads, len(places)))]
    side_by_side(_fill, [(parts, pieces, weights, share) for share in shares], threads)


def _fill(
    mean: Sequence[Tensor],
    values: Sequence[Sequence[Tensor]],
    weights: Sequence[float],
    places: Sequence[int],
) -> None:
    """The pieces of the mean at these places."""
    total = torch.empty(len(mean[places[0]]), dtype=torch.float64, device=mean[0].device)
    room = torch.empty_like(total)
    whole = _sum(weights)
    exact = [exact_product(weight, mean[0].dtype) for weight in weights]
    for place in places:
        if len(mean[place]) < len(total):
            total, room = total[: len(mean[place])], room[: len(mean[place])]
        total.fill_(-0.0)  # which leaves the first product its sign
        for pieces, weight, is_exact in zip(values, weights, exact, strict=True):
            add_weighted(total, pieces[place], weight, room, exact=is_exact)
        mean[place].copy_(total.div_(whole))


def _largest(values: list[Tensor]) -> Tensor:
    """Element by element; of bools: whether any is true."""
    largest = values[0]
    for value in values[1:]:
        largest = torch.where(_order(value) > _order(largest), value, largest)
    return largest


def _order(tensor: Tensor) -> Tensor:
    """Values of the same order that torch can compare: it compares no wide unsigned integers."""
    if tensor.dtype is torch.uint64:
        return tensor.view(torch.int64) ^ torch.iinfo(torch.int64).min
    return tensor.to(torch.int64) if tensor.dtype in _UNCOMPARABLE else tensor
