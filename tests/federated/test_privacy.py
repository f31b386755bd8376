"""Differential privacy by clients, from end to end, on processes and inline."""

import csv
import json
import math
import warnings

import pytest
import torch
from torch import nn

import fedproc as fp
from tests.federated.worlds import batchnorm_net, bits, cross_entropy, linear, sgd, shards

pytest.importorskip("dp_accounting")

SIZES = [12, 7, 9, 4]
# delta is below 1/4, the clients being 4
PRIVACY = {"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-3}


@pytest.fixture
def data(cluster):
    return fp.FederatedDataset(shards(SIZES), cluster)


def aggregator(data, model=None, local=None, privacy=None, **keywords):
    return fp.Aggregator(
        model or linear(),
        data,
        local or fp.LocalTraining(cross_entropy, sgd, batch_size=4),
        **{"weighting": "uniform", "privacy": fp.DifferentialPrivacy(**PRIVACY | (privacy or {}))}
        | keywords,
    )


def push(model, x, y, ctx):
    """Adds 1 to every parameter; client "b" fails, "c" sends NaN, both where it is asked for."""
    if ctx.client == "b" and ctx.round == 2:
        raise RuntimeError("not today")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(math.nan if ctx.client == "c" and ctx.round == 3 else 1.0)
    return {"loss": 0.5}


def change(aggregator, before):
    after = nn.utils.parameters_to_vector(aggregator.model.parameters())
    return (after - nn.utils.parameters_to_vector(before.parameters())).detach().double()


# ---------------------------------------------------------------- without noise and clipping


@pytest.mark.parametrize("strategy", [fp.FedAvg(), fp.FedProx(0.1), fp.FedAdam(), fp.FedAvgM()])
def test_without_noise_and_clipping_it_is_the_uniform_mean(data, strategy):
    quiet = {"clip_norm": 1e6, "noise_multiplier": 0.0}
    private = aggregator(data, privacy=quiet, strategy=strategy)
    local = private.local
    plain = fp.Aggregator(linear(), data, local, strategy=strategy, weighting="uniform")
    for _ in range(3):
        private.run_round(), plain.run_round()
    for mine, theirs in zip(private.model.parameters(), plain.model.parameters(), strict=True):
        # a change is rounded to float32 once, the rest of the way is the same
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    assert private.history[-1].epsilon == math.inf
    assert plain.history[-1].epsilon is None


def test_inline_and_processes_give_the_same_bits_without_noise():
    found = []
    for transport in ("process", "inline"):
        with fp.Cluster(2, transport=transport) as cluster:
            data = fp.FederatedDataset(shards(SIZES), cluster)
            private = aggregator(data, privacy={"clip_norm": 0.05, "noise_multiplier": 0.0})
            private.run(2)
            found.append(bits(private.model))
    assert found[0] == found[1]


# ---------------------------------------------------------------- clipping and the denominator


def test_every_update_is_clipped_and_the_denominator_is_qn(data):
    model = linear()  # 21 parameters: the norm of the change is sqrt(21)
    private = aggregator(data, model, push, {"clip_norm": 2.0, "noise_multiplier": 0.0})
    expected = 2.0 / math.sqrt(21)
    for number, counted in [(1, 4), (2, 3), (3, 3)]:
        before = linear()
        before.load_state_dict(private.model.state_dict())
        record = private.run_round()
        assert len(record.accepted) == counted
        found = change(private, before)
        assert found.tolist() == pytest.approx([expected * counted / 4] * 21, rel=1e-5), number
        assert record.clip_norm == 2.0
    assert "not today" in str(private.history[1].failures["b"])
    assert isinstance(private.history[2].failures["c"], FloatingPointError)
    assert torch.isfinite(private.model.weight).all()


def test_with_a_low_rate_the_denominator_stays(data):
    private = aggregator(data, None, push, {"noise_multiplier": 0.0}, clients_per_round=0.5)
    sizes = set()
    for _ in range(12):
        before = linear()
        before.load_state_dict(private.model.state_dict())
        record = private.run_round()
        failed = len(record.failures)
        expected = (len(record.clients) - failed) / math.sqrt(21) / 2
        found = change(private, before)
        assert found.tolist() == pytest.approx([expected] * 21, rel=1e-5, abs=1e-6)
        sizes.add(len(record.clients))
    assert len(sizes) > 1  # all twelve alike: once in 10^6 runs


def test_small_changes_of_half_precision_parameters_add_up():
    def step(model, x, y, ctx):
        with torch.no_grad():
            model.weight.add_(1.0)  # clipped to 2^-10, an eighth of a step of bfloat16 at 1

    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    with fp.Cluster(1, transport="inline") as cluster:
        data = fp.FederatedDataset(shards([4, 4], features=1), cluster)
        quiet = {"clip_norm": 2.0**-10, "noise_multiplier": 0.0}
        private = aggregator(data, model, step, quiet)
        private.run(64)
    assert private.model.weight.item() == pytest.approx(1 + 64 * 2.0**-10, abs=2.0**-8)


# ---------------------------------------------------------------- noise


def test_an_empty_round_releases_noise_and_min_clients_does_not_apply(data):
    private = aggregator(data, clients_per_round=1e-9, min_clients=4)
    before, record = linear(), private.run_round()
    assert (record.clients, record.loss, record.examples) == ((), None, 0)
    assert (change(private, before) != 0).all()


def test_the_noise_is_as_loud_as_it_is_accounted(cluster):
    data = fp.FederatedDataset(shards([2] * 8, features=2000), cluster)
    model = linear(features=2000)
    quiet = fp.LocalTraining(cross_entropy, sgd)
    settings = {"clip_norm": 3.0, "noise_multiplier": 5.0, "delta": 1e-3}
    private = aggregator(data, model, quiet, settings, clients_per_round=0.25)
    private.run_round()
    noise = change(private, model)
    # 5 * 3 / (0.25 * 8); clients add at most 3 * 8 / 2 to the norm of 6,003 coordinates
    expected = 7.5
    assert noise.std().item() == pytest.approx(expected, rel=6 / math.sqrt(2 * len(noise)))
    assert abs(noise.mean().item()) < 6 * expected / math.sqrt(len(noise))


def test_equal_runs_have_other_noise(data):
    first, second = aggregator(data, seed=3), aggregator(data, seed=3)
    first.run(1), second.run(1)
    assert (first.model.weight != second.model.weight).all()


# ---------------------------------------------------------------- adaptive clipping


def test_adaptive_clipping_follows_the_norms(data):
    settings = {"clip_norm": 0.01, "noise_multiplier": 0.0, "adaptive": True}
    private = aggregator(data, None, push, settings)
    history = private.run(5)
    # nobody is within 0.01: b = 0 as long as all four return
    assert history[1].clip_norm == pytest.approx(0.01 * math.exp(0.1))
    # rounds 2 and 3 have three of four clients: b = 1/2 - (3/2)/4
    assert history[2].clip_norm == pytest.approx(history[1].clip_norm * math.exp(0.2 * 0.375))
    assert history[4].clip_norm == pytest.approx(history[3].clip_norm * math.exp(0.1))
    assert history[4].clip_norm < math.sqrt(21)


def test_the_bits_of_clients_that_share_a_command_arrive(data):
    settings = {"clip_norm": 100.0, "noise_multiplier": 0.0, "adaptive": True}
    norms = [record.clip_norm for record in aggregator(data, privacy=settings).run(5)]
    # all are within: b = 1; from the second round on several clients go in one command
    assert norms == pytest.approx([100 * math.exp(-0.1 * number) for number in range(5)])


# ---------------------------------------------------------------- epsilon and the budget


def test_epsilon_is_cumulative_and_in_every_form_of_the_history(data, tmp_path):
    private = aggregator(data, clients_per_round=0.5)
    history = private.run(3)
    found = [record.epsilon for record in history]
    assert 0 < found[0] < found[1] < found[2] < math.inf
    history.to_json(tmp_path / "h.json")
    read = json.loads((tmp_path / "h.json").read_text())
    assert [record["epsilon"] for record in read["rounds"]] == found
    assert [record["epsilon"] for record in history.to_dict()["rounds"]] == found
    history.to_csv(tmp_path / "h.csv")
    rows = list(csv.DictReader((tmp_path / "h.csv").read_text().splitlines()))
    assert [float(row["epsilon"]) for row in rows] == found
    assert [float(row["clip_norm"]) for row in rows] == [1.0] * 3


def test_a_failed_round_of_the_strategy_costs_nothing(data):
    class Moody(fp.strategies.Strategy):
        def step(self, x, received, state):
            raise fp.QuorumError("not today")

    private = aggregator(data, strategy=Moody())
    with pytest.raises(fp.QuorumError):
        private.run_round()
    assert private._course.ledger.rounds == 0


def test_a_strategy_sees_nothing_but_the_noisy_mean(data):
    class Curious(fp.strategies.Strategy):
        def step(self, x, received, state):
            assert (received.weights, received.step_norms, received.rows) == ((), (), None)
            return received.mean, state

    aggregator(data, None, push, strategy=Curious()).run(3)


def test_the_budget_ends_the_run_and_says_so(data):
    free = aggregator(data, clients_per_round=0.5)
    free.run(3)
    budget = {"max_epsilon": free.history[-1].epsilon}
    private = aggregator(data, privacy=budget, clients_per_round=0.5)
    with pytest.warns(UserWarning, match=r"budget is spent.* after 3 rounds"):
        history = private.run(10)
    assert len(history) == 3
    before = bits(private.model)
    with pytest.raises(fp.PrivacyBudgetError, match="max_epsilon"):
        private.run_round()
    assert bits(private.model) == before
    assert history[-1].round == 3


# ---------------------------------------------------------------- buffers


def test_buffers_stay_and_a_warning_says_so(data):
    with pytest.warns(UserWarning, match=r"^1: running statistics .* GroupNorm"):
        private = aggregator(data, batchnorm_net())
    private.run(1)
    assert private.model[1].running_mean.tolist() == [0.0] * 8
    assert private.model[1].running_var.tolist() == [1.0] * 8
    assert private.model[1].num_batches_tracked.item() == 0


# ---------------------------------------------------------------- save and load


def resumed(path, data, privacy=None, **keywords):
    keywords = {"weighting": "uniform", "clients_per_round": 0.5} | keywords
    if privacy is not None:
        keywords["privacy"] = fp.DifferentialPrivacy(**PRIVACY | privacy)
    local = fp.LocalTraining(cross_entropy, sgd, batch_size=4)
    return fp.Aggregator.load(path, linear(), data, local, **keywords)


def test_the_cost_survives_saving(data, tmp_path):
    private = aggregator(data, privacy={"adaptive": True}, clients_per_round=0.5)
    private.run(3)  # an odd number: two steps of the clip norm may cancel each other
    private.save(tmp_path / "a")
    again = resumed(tmp_path / "a", data, privacy={"adaptive": True})
    assert again._course.ledger.rounds == 3
    assert again._course.ledger.clip_norm == private._course.ledger.clip_norm != 1.0
    expected = aggregator(data, privacy={"adaptive": True}, clients_per_round=0.5)
    assert again.run(1)[-1].epsilon == expected.run(4)[-1].epsilon
    # another budget is no other mechanism
    resumed(tmp_path / "a", data, privacy={"adaptive": True, "max_epsilon": 99.0})


@pytest.mark.parametrize(
    "other",
    [
        {"privacy": {"noise_multiplier": 0.5}},
        {"privacy": {"clip_norm": 2.0}},
        {"privacy": {"delta": 1e-4}},
        {"privacy": {"adaptive": True}},
        {"clients_per_round": 0.25, "privacy": {}},
        {"privacy": None},
    ],
)
def test_a_checkpoint_of_another_mechanism_is_refused(data, tmp_path, other):
    aggregator(data, clients_per_round=0.5).save(tmp_path / "a")
    with pytest.raises(ValueError, match="another run: its privacy"):
        resumed(tmp_path / "a", data, **other)


def test_a_checkpoint_without_privacy_is_refused(data, tmp_path):
    local = fp.LocalTraining(cross_entropy, sgd)
    fp.Aggregator(linear(), data, local).save(tmp_path / "a")
    with pytest.raises(ValueError, match="another run: its privacy None"):
        resumed(tmp_path / "a", data, privacy={})


# ---------------------------------------------------------------- with private data, and losses


def test_private_data(cluster):
    data = fp.FederatedDataset(shards(SIZES), cluster, private=True)
    record = aggregator(data).run_round()
    assert record.accepted == ("a", "b", "c", "d")
    assert record.epsilon is not None


@pytest.mark.faults
def test_a_client_whose_worker_dies_is_clipped_once():
    with fp.Cluster(2) as cluster:
        data = fp.FederatedDataset(shards(SIZES), cluster)
        first = data.worker_of("a")

        def once(model, x, y, ctx, pid=first.pid, directory=str(first.pid)):
            import os
            import signal

            if os.getpid() == pid:
                os.kill(pid, signal.SIGKILL)
            return push(model, x, y, ctx)

        private = aggregator(data, None, once, {"clip_norm": 2.0, "noise_multiplier": 0.0})
        before, record = linear(), private.run_round()
        assert record.failures == {}
        found = change(private, before)
        assert found.tolist() == pytest.approx([2.0 / math.sqrt(21)] * 21, rel=1e-5)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("keywords", "why"),
    [
        ({"weighting": "examples"}, "weighting='uniform'"),
        ({"clients_per_round": 2}, "give a float"),
        ({"strategy": fp.Median()}, "every update by itself"),
        ({"strategy": fp.TrimmedMean(0.2)}, "every update by itself"),
        ({"strategy": fp.Krum(0)}, "every update by itself"),
        ({"strategy": fp.GeometricMedian()}, "every update by itself"),
        ({"strategy": fp.Scaffold()}, "would leave without noise"),
        ({"strategy": fp.FedNova()}, "would leave without noise"),
    ],
    ids=str,
)
def test_wrong_pairings(keywords, why):
    with fp.Cluster(1, transport="inline") as cluster:
        data = fp.FederatedDataset(shards(SIZES), cluster)
        with pytest.raises(ValueError, match=why):
            aggregator(data, **keywords)


def test_only_a_differential_privacy_will_do():
    with fp.Cluster(1, transport="inline") as cluster:
        data = fp.FederatedDataset(shards(SIZES), cluster)
        local = fp.LocalTraining(cross_entropy, sgd)
        with pytest.raises(ValueError, match="must be a DifferentialPrivacy"):
            fp.Aggregator(linear(), data, local, weighting="uniform", privacy=(1.0, 1.0, 1e-3))


def test_a_large_delta_is_warned_of_where_the_aggregator_is_made():
    with fp.Cluster(1, transport="inline") as cluster:
        data = fp.FederatedDataset(shards(SIZES), cluster)
        with pytest.warns(UserWarning, match="not below 1/4") as found:
            aggregator(data, privacy={"delta": 0.25})
        assert found[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            aggregator(data, privacy={"delta": 0.24})
