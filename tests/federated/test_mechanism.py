"""Cohorts, noise, adaptive clipping and the budget, without a cluster."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import fedproc as fp
from fedproc.client.layout import Layout
from fedproc.federated.fold import Weighted
from fedproc.federated.mechanism import Ledger, Mechanism, count_noise, update_noise
from fedproc.federated.noise import SecretStream

pytest.importorskip("dp_accounting")

CLIENTS = [f"client-{number}" for number in range(1000)]


def ledger(rate=0.1, population=1000, **settings):
    wanted = {"clip_norm": 2.0, "noise_multiplier": 1.0, "delta": 1e-5} | settings
    stream = SecretStream(bytes(32))
    mechanism = Mechanism(fp.DifferentialPrivacy(**wanted), rate, population, stream)
    return Ledger(mechanism, 0, wanted["clip_norm"])


# ---------------------------------------------------------------- who takes part


def test_every_client_is_drawn_by_itself():
    drawn = ledger()
    cohorts = [drawn.draw(CLIENTS) for _ in range(200)]
    sizes = torch.tensor([float(len(cohort)) for cohort in cohorts])
    # binomial: mean 100, variance 90; five standard errors of 200 draws
    assert sizes.mean().item() == pytest.approx(100, abs=5 * math.sqrt(90 / 200))
    assert sizes.var().item() == pytest.approx(90, abs=5 * 90 * math.sqrt(2 / 199))
    assert all(cohort == tuple(sorted(cohort, key=CLIENTS.index)) for cohort in cohorts[:3])
    counts = torch.tensor([sum(name in c for c in map(set, cohorts)) for name in CLIENTS[:50]])
    assert counts.min() > 0


def test_rate_1_draws_everybody_and_a_low_rate_sometimes_nobody():
    assert ledger(rate=1.0).draw(CLIENTS) == tuple(CLIENTS)
    assert () in [ledger(rate=0.1).draw(CLIENTS[:2])] + [
        m.draw(CLIENTS[:2]) for m in [ledger()] for _ in range(50)
    ]


# ---------------------------------------------------------------- the sum


def folded(drawn, start, changes):
    layout = Layout.of(start)
    block = layout.pack(layout.tensors(start), layout.new_block())
    fold = drawn.fold(layout, block)
    for change in changes:
        clipped = layout.new_block()
        for section in layout.of_kind("trained"):
            section.view(clipped).fill_(change)
        fold.add([Weighted(clipped, 1.0, 1.0)])
    trained, rows = fold.trained()
    assert rows is None
    return trained, layout.flat_trained(fold.write(trained)), layout.flat_trained(block)


def test_the_denominator_is_fixed_whoever_took_part():
    drawn = ledger(rate=0.5, population=8, noise_multiplier=0.0)
    trained, written, start = folded(drawn, nn.Linear(3, 2), [0.5, 0.25])
    assert torch.equal(trained, start + 0.75 / 4)
    assert torch.equal(written, trained.float().double())


def test_the_noise_has_the_standard_deviation_it_is_accounted_with():
    drawn = ledger(rate=0.5, population=40, noise_multiplier=3.0, clip_norm=2.0)
    trained, _, start = folded(drawn, nn.Linear(400, 500), [0.5] * 10)
    noise = trained - start - 5.0 / 20
    expected, count = 3.0 * 2.0 / 20, len(noise)
    assert noise.mean().item() == pytest.approx(0, abs=5 * expected / math.sqrt(count))
    assert noise.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * count))


def test_an_empty_round_releases_noise_and_no_two_are_alike():
    drawn, model = ledger(), nn.Linear(3, 2)
    first, second = folded(drawn, model, [])[0], folded(drawn, model, [])[0]
    assert not torch.equal(first, second)
    assert (first != folded(ledger(noise_multiplier=0.0), model, [])[0]).all()


def test_buffers_stay_as_they_are():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    nn.init.constant_(model[1].running_mean, 7.0)
    layout = Layout.of(model)
    block = layout.pack(layout.tensors(model), layout.new_block())
    fold = ledger().fold(layout, block)
    fold.add([Weighted(layout.new_block(), 1.0, 1.0)])
    layout.unpack(fold.write(fold.trained()[0]), layout.tensors(model))
    assert model[1].running_mean.tolist() == [7.0, 7.0]
    assert model[1].running_var.tolist() == [1.0, 1.0]
    assert model[1].weight.tolist() != [1.0, 1.0]


# ---------------------------------------------------------------- adaptive clipping


def test_noise_is_split_between_updates_and_count():
    assert update_noise(1.0, 2.5) == pytest.approx(1.02062, abs=5e-6)
    assert count_noise(1.0, 50.0) == 2.5
    assert update_noise(0.7, 0.0) == 0.7
    assert count_noise(0.0, 50.0) == 0.0
    for noise, expected in [(1.0, 1.0), (30.0, 10.0), (0.1, 1000.0)]:
        count = count_noise(noise, expected)
        total = (update_noise(noise, count) ** -2 + (2 * count) ** -2) ** -0.5
        assert total == pytest.approx(noise)


def test_the_norm_follows_the_quantile_exactly_without_noise():
    drawn = ledger(rate=1.0, population=4, noise_multiplier=0.0, adaptive=True)
    after = drawn.after([True, True, True, False])
    assert after.rounds == 1
    assert after.clip_norm == pytest.approx(2.0 * math.exp(-0.2 * (0.75 - 0.5)))
    settings = {"adaptive": True, "target_quantile": 0.9, "clip_learning_rate": 1.0}
    drawn = ledger(rate=1.0, population=4, noise_multiplier=0.0, **settings)
    assert replace(drawn, rounds=5, clip_norm=1.0).after([False] * 4).clip_norm == pytest.approx(
        math.exp(0.9)
    )


def test_the_norm_settles_where_the_quantile_is():
    drawn = ledger(rate=1.0, population=100, clip_norm=0.01, adaptive=True, target_quantile=0.7)
    norms = [number / 10 for number in range(100)]
    for _ in range(120):
        drawn = drawn.after([norm <= drawn.clip_norm for norm in norms])
    assert drawn.clip_norm == pytest.approx(7.0, rel=0.15)


def test_noise_on_a_count_of_few_moves_the_norm_no_further_than_a_count_could():
    drawn = ledger(rate=1e-9, population=4, adaptive=True)
    steps = {round(math.log(drawn.after([]).clip_norm / 2.0), 9) for _ in range(20)}
    assert steps == {-0.1, 0.1}


def test_a_fixed_norm_stays():
    after = ledger().after([False] * 50)
    assert (after.rounds, after.clip_norm) == (1, 2.0)


# ---------------------------------------------------------------- the budget


def test_the_budget_ends_before_it_is_exceeded():
    limit = replace(ledger(), rounds=3).epsilon
    spent = ledger(max_epsilon=limit)
    for _ in range(3):
        spent.draw(CLIENTS)
        spent = spent.after([])
    assert spent.epsilon == limit
    with pytest.raises(fp.PrivacyBudgetError, match=r"after 3 rounds, one more would make it"):
        spent.draw(CLIENTS)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"clip_norm": 0}, "clip_norm"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"clip_norm": math.inf}, "clip_norm"),
        ({"clip_norm": math.nan}, "clip_norm"),
        ({"noise_multiplier": -0.1}, "noise_multiplier"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"delta": "1e-5"}, "delta"),
        ({"adaptive": 1}, "adaptive"),
        ({"target_quantile": 1.0}, "target_quantile"),
        ({"clip_learning_rate": 0.0}, "clip_learning_rate"),
        ({"max_epsilon": 0.0}, "max_epsilon"),
        ({"max_epsilon": 1.0, "noise_multiplier": 0.0}, "needs noise"),
    ],
)
def test_values_out_of_range(settings, named):
    wanted = {"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5} | settings
    with pytest.raises(ValueError, match=named):
        fp.DifferentialPrivacy(**wanted)


def test_the_record_is_frozen():
    with pytest.raises(AttributeError):
        fp.DifferentialPrivacy(1.0, 1.0, 1e-5).delta = 0.5
