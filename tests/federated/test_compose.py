"""Secure aggregation and differential privacy together: clipped in, summed, noise added after."""

import pytest

from fedproc.cluster.cluster import Cluster
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
