"""Epsilon against published and independently computed numbers."""

import logging
import math
import subprocess
import sys

import pytest

pytest.importorskip("dp_accounting")

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent, pld

from fedproc.federated.accountant import Accountant, _divergence

# q, z, rounds, delta -> the classic bound (Mironov 2017) and that of Canonne et al. 2020, each
# minimised over the orders 2-64, 128, 256. Abadi et al. 2016 report 1.26 for the first.
VECTORS = [
    ((0.01, 4.0, 10_000, 1e-5), 1.2586, 1.0355),
    ((256 / 60_000, 1.1, 14_062, 1e-5), 3.0091, 2.5970),
    ((0.05, 1.0, 1_000, 1e-6), 14.169, 13.214),
    ((0.05, 0.8, 1_500, 1e-6), 27.890, 26.503),
]


def classic(rate, noise, rounds, delta):
    """The bound of Mironov 2017, written down once more from the formulas."""

    def divergence(order):
        terms = [
            math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
            + (order - k) * math.log1p(-rate) + k * math.log(rate) + (k * k - k) / (2 * noise**2)
            for k in range(order + 1)
        ]  # fmt: skip
        most = max(terms)
        return (most + math.log(math.fsum(math.exp(t - most) for t in terms))) / (order - 1)

    orders = [*range(2, 65), 128, 256]
    return min(rounds * divergence(a) + math.log(1 / delta) / (a - 1) for a in orders)


@pytest.mark.parametrize(("facts", "upper", "expected"), VECTORS)
def test_epsilon_agrees_with_the_vectors(facts, upper, expected):
    rate, noise, rounds, delta = facts
    found = Accountant(rate, noise, delta).epsilon(rounds)
    assert found == pytest.approx(expected, rel=0.01)
    assert classic(*facts) == pytest.approx(upper, rel=1e-3)


@pytest.mark.parametrize("facts", [*(v[0] for v in VECTORS[:2]), (0.2, 1.0, 20, 1e-3)])
def test_epsilon_lies_between_the_truth_and_the_classic_bound(facts):
    rate, noise, rounds, delta = facts
    truth = pld.PLDAccountant()
    event = PoissonSampledDpEvent(rate, GaussianDpEvent(noise))
    truth.compose(SelfComposedDpEvent(event, rounds))
    found = Accountant(rate, noise, delta).epsilon(rounds)
    assert truth.get_epsilon(delta) <= found <= classic(*facts)


def test_every_client_in_every_round_is_the_plain_gaussian():
    # order a costs a / (2 z^2) a round
    rounds, noise, delta = 3, 2.0, 1e-5
    orders = [1 + step / 1000 for step in range(100, 100_000)]
    exact = min(
        rounds * a / (2 * noise**2) + math.log1p(-1 / a) - math.log(delta * a) / (a - 1)
        for a in orders
    )
    assert Accountant(1.0, noise, delta).epsilon(rounds) == pytest.approx(exact, rel=1e-3)


def test_epsilon_grows_with_rounds_and_starts_at_nothing():
    accountant = Accountant(0.1, 1.0, 1e-5)
    found = [accountant.epsilon(rounds) for rounds in range(5)]
    assert found[0] == 0
    assert sorted(set(found)) == found


def test_without_noise_epsilon_is_infinite():
    assert Accountant(0.1, 0.0, 1e-5).epsilon(1) == math.inf
    assert Accountant(0.1, 0.0, 1e-5).epsilon(0) == 0


def test_the_library_says_nothing(caplog):
    _divergence.cache_clear()
    with caplog.at_level(logging.DEBUG):
        Accountant(0.05, 0.8, 1e-6)  # three orders do not converge
    assert caplog.records == []


def test_without_the_library_the_error_names_the_extra():
    code = """
import sys
sys.modules["dp_accounting"] = None  # as if it were not installed
import fedproc as fp
try:
    fp.DifferentialPrivacy(1.0, 1.0, 1e-5)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'fedproc[dp]'" in done.stdout
