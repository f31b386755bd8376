"""Losses of chunks, and that they add up to the loss of all rows at once."""

import functools
import math

import pytest
import torch
from torch import nn

from fedproc.client.evaluation import evaluate_chunks, merged
from fedproc.federated.evaluation import combine

CE, F = nn.CrossEntropyLoss, nn.functional
WEIGHT = torch.tensor([0.5, 3.0, 0.0, 1.0], dtype=torch.float64)


def squares(outputs, targets):
    return ((outputs.sum(1) - targets) ** 2).sum()


squares.reduction = "sum"


class Named(CE):
    """A subclass that computes what its base does."""


class Doubled(nn.NLLLoss):
    """A subclass with a mean of its own: over the rows."""

    def forward(self, outputs, targets):
        return 2 * F.nll_loss(outputs, targets, reduction="sum") / len(outputs)


def world(*inner, rows=23):
    """A model of doubles with outputs (rows, 4, *inner), and rows; those from 4 to 8 are 2."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 5, generator=draw, dtype=torch.float64)
    y = torch.randint(4, (rows, *inner), generator=draw)
    y[4:8] = 2
    torch.manual_seed(0)
    layer = nn.Linear(5, 4 * math.prod(inner)).double()
    return nn.Sequential(layer, nn.Unflatten(1, (4, *inner))), x, y


def evaluated(model, rows, loss):
    return combine(evaluate_chunks(model, rows, loss, 4), len(rows[0])).loss


former_words = pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning")


@former_words
@pytest.mark.parametrize("inner", [(), (3,)], ids=["labels", "sequences"])
@pytest.mark.parametrize(
    "loss",
    [
        CE(),
        CE(ignore_index=2),
        CE(weight=WEIGHT),
        CE(weight=WEIGHT, ignore_index=1, label_smoothing=0.1),
        nn.NLLLoss(weight=WEIGHT, ignore_index=0),
        Named(weight=WEIGHT, ignore_index=2),
        functools.partial(F.cross_entropy, size_average=True, ignore_index=2),
        F.cross_entropy,
        functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=2),
        functools.partial(F.nll_loss, ignore_index=2),
        lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="mean"),
    ],
    ids=str,
)
def test_chunks_add_up_to_the_loss_of_all_rows(loss, inner):
    model, x, y = world(*inner)
    expected = loss(model(x), y).item()
    assert evaluated(model, (x, y), loss) == pytest.approx(expected, rel=1e-14)


@former_words
@pytest.mark.parametrize(
    "loss",
    [
        CE(reduction="sum"),
        CE(reduction="sum", weight=WEIGHT, ignore_index=2),
        functools.partial(F.cross_entropy, reduction="sum"),
        functools.partial(F.cross_entropy, size_average=False, ignore_index=2),
        functools.partial(F.mse_loss, size_average=False, reduce=True),
        squares,
    ],
    ids=str,
)
def test_a_loss_that_is_a_sum_becomes_the_mean_of_the_rows(loss):
    model, x, y = world()
    if getattr(loss, "func", None) is F.mse_loss:
        y = F.one_hot(y, 4).double()
    expected = loss(model(x), y).item() / 23
    assert evaluated(model, (x, y), loss) == pytest.approx(expected, rel=1e-14)


def test_a_subclass_with_a_forward_of_its_own_is_a_mean_over_the_rows():
    model, x, y = world()
    loss = Doubled(ignore_index=2)
    expected = loss(model(x), y).item()
    assert evaluated(model, (x, y), loss) == pytest.approx(expected, rel=1e-14)


def test_probabilities_are_no_labels():
    model, x, y = world()
    targets, loss = F.one_hot(y, 4).double(), CE(weight=WEIGHT)
    expected = loss(model(x), targets).item()
    assert evaluated(model, (x, targets), loss) == pytest.approx(expected, rel=1e-14)


def test_labels_that_are_bytes_are_no_mask():
    model, x, y = world()
    expected = CE(weight=WEIGHT)(model(x), y).item()
    assert evaluated(model, (x, y.byte()), CE(weight=WEIGHT)) == pytest.approx(expected, rel=1e-14)


def test_a_chunk_without_a_label_counts_nothing_and_without_any_there_is_no_loss():
    model, x, _ = world()
    y = torch.full((23,), -100)
    assert math.isnan(evaluated(model, (x, y), CE()))
    y[9] = 3
    expected = CE()(model(x), y).item()
    assert evaluated(model, (x, y), CE()) == pytest.approx(expected, rel=1e-14)


def test_the_chunks_of_a_client_count_what_they_counted():
    model, x, y = world()
    loss = CE(ignore_index=2)
    expected = loss(model(x), y).item()
    one = merged(evaluate_chunks(model, (x, y), loss, 4), 0)
    assert (one.rows, one.counted) == (23, (y != 2).sum().item())
    assert combine([one], 23).loss == pytest.approx(expected, rel=1e-14)
    few = merged(evaluate_chunks(model, (x, y), loss, 4), 24)
    assert (few.loss_sum, few.counted, few.correct) == (None, 0.0, None)
    assert combine([few], 23).loss is None


def say_sum(loss):
    loss.reduction = "sum"
    return loss


def summed(outputs, targets, scale=1.0):
    return scale * nn.functional.cross_entropy(outputs, targets, reduction="sum")


@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(
            say_sum(lambda outputs, targets, scale: summed(outputs, targets)), scale=1
        ),
        say_sum(functools.partial(summed, scale=1.0)),
        functools.partial(nn.CrossEntropyLoss(reduction="sum")),
    ],
    ids=["of a function", "itself", "of a module"],
)
def test_a_partial_says_that_it_is_a_sum_by_what_it_calls_or_by_itself(loss):
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(20, 4), torch.randint(3, (20,))
    sums = evaluate_chunks(model, (x, y), loss, 8)
    found = sum(part.loss_sum for part in sums) / sum(part.counted for part in sums)
    assert found == pytest.approx(nn.functional.cross_entropy(model(x), y).item())
