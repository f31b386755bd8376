"""The membership attack: exact areas and intervals, models that remember, and bad input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn

import fedproc as fp
from fedproc.audit import area
from fedproc.client.seeding import torch_threads


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: on a busy machine torch's threads wait for each other for seconds a step."""
    with torch_threads(1):
        yield


SMALL = st.lists(st.integers(0, 6), min_size=2, max_size=12)


def delong(smaller, larger):
    """Area and interval as in DeLong et al. (1988), by the kernel of every pair."""
    kernel = torch.tensor([[(a < b) + 0.5 * (a == b) for b in larger] for a in smaller]).double()
    auc = kernel.mean().item()
    of_smaller, of_larger = kernel.mean(1), kernel.mean(0)
    variance = of_smaller.var() / len(smaller) + of_larger.var() / len(larger)
    reach = 1.959963984540054 * variance.sqrt().item()
    return auc, (max(0.0, auc - reach), min(1.0, auc + reach)), reach > 0


class Losses(nn.Module):
    """A "model" that returns its input, so that rows are losses."""

    def forward(self, x):
        return x


def taken(outputs, targets):
    return outputs.sum()


def of(members, non_members):
    rows = [(torch.tensor(v).float()[:, None], torch.zeros(len(v))) for v in (members, non_members)]
    return fp.audit.membership(Losses(), *rows, loss=taken)


# ---------------------------------------------------------------- the area and its interval


@given(SMALL, SMALL)
def test_area_and_interval_are_those_of_all_pairs(members, non_members):
    found = of(members, non_members)
    labels = [1] * len(members) + [0] * len(non_members)
    assert found.auc == pytest.approx(roc_auc_score(labels, [-v for v in members + non_members]))
    auc, interval, spread = delong(members, non_members)
    assert found.auc == pytest.approx(auc, abs=1e-12)
    if spread:
        assert found.interval == pytest.approx(interval, abs=1e-12)
    assert 0 <= found.interval[0] <= found.auc <= found.interval[1] <= 1


def test_a_published_interval():
    """The example in the documentation of the package pauc (DeLong): 0.708, (0.378, 1.000)."""
    truth = np.array([0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1])
    score = np.array([0.1, 0.35, 0.24, 0.8, 0.2, 0.85, 0.13, 0.85, 0.74, 0.58, 0.71, 0.25])
    auc, (low, high) = area(torch.tensor(-score[truth == 1]), torch.tensor(-score[truth == 0]))
    assert (round(auc, 3), round(low, 3), round(high, 3)) == (0.708, 0.378, 1.0)


@pytest.mark.parametrize(
    ("members", "non_members", "auc", "interval"),
    [
        ([1, 2, 3, 4], [5, 6, 7], 1.0, (0.025 ** (1 / 3), 1.0)),
        ([5, 6, 7], [1, 2, 3, 4], 0.0, (0.0, 1 - 0.025 ** (1 / 3))),
        ([2, 2, 2], [2, 2, 2], 0.5, (0.5 * 0.025 ** (1 / 3), 1 - 0.5 * 0.025 ** (1 / 3))),
    ],
)
def test_where_all_pairs_agree_the_interval_is_no_point(members, non_members, auc, interval):
    found = of(members, non_members)
    assert (found.auc, found.interval) == (auc, pytest.approx(interval, abs=1e-15))
    assert (found.members, found.non_members) == (len(members), len(non_members))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator, inside = torch.Generator().manual_seed(0), 0
    truth = 0.5 * (1 + math.erf(0.5))  # two normals that are sqrt(1/2) of their spread apart
    for _ in range(400):
        members, others = torch.randn(2, 60, generator=generator, dtype=torch.float64)
        _, (low, high) = area(members, others + 1.0)
        inside += low <= truth <= high
    assert 0.92 <= inside / 400 <= 0.98


# ---------------------------------------------------------------- models


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.Tanh(), nn.Linear(128, 10))


def halves():
    """Digits whose labels are drawn at random: there is nothing to learn but by heart."""
    x = torch.tensor(load_digits().data[:200] / 16).float()
    y = torch.randint(10, (200,), generator=torch.Generator().manual_seed(1))
    return (x[:100], y[:100]), (x[100:], y[100:])


def test_a_model_that_learned_noise_by_heart_gives_its_members_away():
    (x, y), others = halves()
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fp.audit.membership(model, (x, y), others)
    assert found.auc > 0.95
    assert found.interval[0] > 0.9
    with torch.no_grad():
        own, other = (
            nn.functional.cross_entropy(model.eval()(a), b, reduction="none")
            for a, b in ((x, y), others)
        )
    labels = [1] * 100 + [0] * 100
    assert found.auc == pytest.approx(roc_auc_score(labels, -torch.cat((own, other))), abs=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_untrained_model_gives_nothing_away():
    found = fp.audit.membership(net(), *halves())
    assert found.interval[0] < 0.5 < found.interval[1]


def test_a_model_that_says_the_same_of_all_is_ties():
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    found = fp.audit.membership(model, *halves())
    assert found.auc == 0.5
    assert found.interval[0] < 0.5 < found.interval[1]


def test_modes_come_back_also_after_a_failure():
    model = net()
    model[1].eval()
    fp.audit.membership(model, *halves())
    assert [module.training for module in model] == [True, False, True, True]
    with pytest.raises(RuntimeError, match="no"):
        fp.audit.membership(model, *halves(), loss=fail)
    assert [module.training for module in model] == [True, False, True, True]
    assert model.training


def fail(outputs, targets):
    raise RuntimeError("no")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_any_reduction_of_a_loss_is_the_loss_of_a_row(reduction):
    model, sets = net(), halves()
    loss = nn.CrossEntropyLoss(reduction=reduction)
    assert fp.audit.membership(model, *sets, loss=loss).auc == pytest.approx(
        fp.audit.membership(model, *sets).auc, abs=2e-4
    )


def test_regression_arrays_and_many_rows():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((700, 3)).astype(np.float32)
    model = nn.Linear(3, 2)
    with torch.no_grad():
        y = model(torch.tensor(x)).numpy()
    found = fp.audit.membership(model, (x, y), (x[:600], y[:600] + 1), loss=nn.MSELoss())
    assert (found.auc, found.members, found.non_members) == (1.0, 700, 600)


# ---------------------------------------------------------------- bad input

X, Y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("members", "non_members", "why"),
    [
        ((X[:0], Y[:0]), (X, Y), "members needs at least two rows for an interval, got 0"),
        ((X, Y), (X[:1], Y[:1]), "non_members needs at least two rows for an interval, got 1"),
        ((X, Y[:2]), (X, Y), r"one target for each row of x, got x \(3, 4\) and y \(2,\)"),
        ((X, torch.tensor(1)), (X, Y), "members needs one target for each row"),
        (X, (X, Y), r"members must be a pair \(x, y\), got Tensor"),
        ((X, Y, Y), (X, Y), r"members must be a pair \(x, y\), got tuple"),
        ((X, Y), (X[:, :3], Y), "rows of the same kind, got x .3, 4. and y .3,. and x .3, 3."),
        ((X, Y), (X, Y[:, None]), "rows of the same kind"),
        ((X, Y.float()), (X, Y.float()), "integers .rows,., got .3, 2. and .3,. of torch.float32"),
        ((X * math.nan, Y), (X, Y), "the loss of 3 of 3 rows of members is not finite"),
        ((X, Y), (X / 0, Y), "the loss of 3 of 3 rows of non_members is not finite"),
    ],
)
def test_sets_that_cannot_be_compared(members, non_members, why):
    with pytest.raises(ValueError, match=why):
        fp.audit.membership(nn.Linear(4, 2), members, non_members)


@pytest.mark.parametrize("model", [None, torch.sin, nn.Linear])
def test_what_is_no_model(model):
    with pytest.raises(ValueError, match=r"model must be a local torch\.nn\.Module, got"):
        fp.audit.membership(model, (X, Y), (X, Y))


@pytest.mark.parametrize("wrong", [lambda out, y: out, lambda out, y: 1.0, lambda out, y: None])
def test_a_loss_that_is_not_one_number(wrong):
    with pytest.raises(ValueError, match="loss must return one number for one row"):
        fp.audit.membership(nn.Linear(4, 2), (X, Y), (X, Y), loss=wrong)


def test_a_model_that_returns_too_few_outputs():
    with pytest.raises(ValueError, match="model returned 12 outputs for 3 rows"):
        fp.audit.membership(nn.Flatten(0), (X, Y), (X, Y))


def test_the_record_cannot_be_changed():
    with pytest.raises(AttributeError):
        of([1, 2], [1, 2]).auc = 0.5
