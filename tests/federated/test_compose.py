"""Secure aggregation and differential privacy together: clipped in, summed, noise added after."""

import os
import signal
from pathlib import Path

import pytest
import torch

from fedproc.cluster.cluster import Cluster
from fedproc.errors import NotPermittedError
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset
from fedproc.federated.privacy import DifferentialPrivacy
from fedproc.federated.secure_aggregation import SecureAggregation
from tests.federated.test_secure import LOCAL, SIZES, close
from tests.federated.worlds import linear, shards


@pytest.mark.filterwarnings("ignore:delta:UserWarning")
@pytest.mark.parametrize("clip_norm", [0.05, 100.0])
@pytest.mark.parametrize("adaptive", [False, True])
def test_without_noise_both_give_what_privacy_alone_gives(cluster, clip_norm, adaptive):
    """With q = 1 and no noise a private run is deterministic."""
    privacy = DifferentialPrivacy(clip_norm, 0.0, 1e-5, adaptive=adaptive)
    made = [
        Aggregator(
            linear(), FederatedDataset(shards(SIZES), cluster), LOCAL, clients_per_round=1.0,
            weighting="uniform", privacy=privacy, secure=secure,
        )
        for secure in (None, SecureAggregation())
    ]  # fmt: skip
    alone, both = made
    alone.run(3), both.run(3)
    assert close(both.model, alone.model, rounds=3)
    assert [r.clip_norm for r in both.history] == [r.clip_norm for r in alone.history]
    assert [r.epsilon for r in both.history] == [r.epsilon for r in alone.history]


@pytest.mark.filterwarnings("ignore:delta:UserWarning")
def test_private_data_secure_sum_noise_and_a_killed_worker_in_one_run():
    with Cluster(3, restart=True) as cluster:
        data = FederatedDataset(shards(SIZES), cluster, private=True)
        run = Aggregator(
            linear(), data, LOCAL, clients_per_round=1.0, weighting="uniform",
            privacy=DifferentialPrivacy(1.0, 1.0, 1e-5), secure=SecureAggregation(),
        )  # fmt: skip
        run.run(1)
        cluster["worker-1"].kill()
        run.run(1)
        first, second = run.history
        assert second.accepted == tuple("abcdef")
        assert 0 < first.epsilon < second.epsilon


NOISE, CLIP = 0.001, 0.05


def dies_once(flag):
    """A train function, sent by value: its process is killed while client "c" trains."""

    def train(model, x, y, ctx):
        if ctx.client == "c" and not Path(flag).exists():
            Path(flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        return {"loss": 1.0, "row": x[0, 0].item()}

    return train


def private_run(cluster, train, noise, rows, **options):
    return Aggregator(
        linear(), rows(cluster), train, clients_per_round=1.0, weighting="uniform",
        privacy=DifferentialPrivacy(CLIP, noise, 1e-5), **options,
    )  # fmt: skip


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:delta:UserWarning")
def test_a_death_while_training_private_rows_changes_the_model_by_noise_alone(tmp_path):
    """The noise of 21 values over 6 clients is N(0, (z C / 6)^2) a round: five rounds, 6 sigma."""
    train = dies_once(str(tmp_path / "died"))
    with Cluster(2, restart=True) as cluster:
        first_pid = {worker.name: worker.pid for worker in cluster}
        data = FederatedDataset(shards(SIZES), cluster, private=True)
        run = private_run(cluster, train, NOISE, lambda _: data, secure=SecureAggregation())
        history = run.run(5, progress=False)
        assert (tmp_path / "died").exists()
        assert sum(worker.pid != first_pid[worker.name] for worker in cluster) == 1
        assert [(r.accepted, r.failures, r.skipped) for r in history] == [
            (tuple("abcdef"), {}, ())
        ] * 5
        assert all(set(record.metrics) <= {"loss", "steps"} for record in history)
        for pointer in data["c"]:
            with pytest.raises(NotPermittedError):
                pointer.fetch()
        spent = [record.epsilon for record in history]
    with Cluster(1, transport="inline") as cluster:
        plain = private_run(cluster, train, 0.0, lambda one: FederatedDataset(shards(SIZES), one))
        plain.run(5)
        undisturbed = private_run(
            cluster, train, NOISE, lambda one: FederatedDataset(shards(SIZES), one)
        )
        undisturbed.run(5)
    assert spent == [record.epsilon for record in undisturbed.history]
    assert spent == sorted(set(spent))
    noise = torch.cat([
        (a.double() - b.double()).flatten()
        for a, b in zip(run.model.parameters(), plain.model.parameters(), strict=True)
    ])  # fmt: skip
    sigma = NOISE * CLIP / 6 * 5**0.5
    assert noise.isfinite().all()
    assert 0.3 * sigma < noise.square().mean().sqrt() < 2 * sigma
    assert noise.abs().max() < 8 * sigma
