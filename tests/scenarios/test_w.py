"""Scenarios W: workers."""

import os
import time

import psutil
import pytest
import torch

import fedproc as fp
from tests.scenarios.toy import counts


def test_w1_a_new_worker_is_empty_named_and_alive():
    with fp.Cluster(["bob"]) as cluster:
        bob = cluster["bob"]
        assert len(bob.objects) == 0
        assert "bob" in repr(bob)
        assert bob.pid != os.getpid()
        assert psutil.pid_exists(bob.pid)


def test_w2_a_worker_owns_data_the_parent_never_sent(cluster, bob):
    data = fp.FederatedDataset.from_factories(
        {"bob": lambda: (torch.ones(2, 3), torch.zeros(2))}, cluster
    )
    home = data.worker_of("bob")
    assert len(home.objects) >= 1
    features, targets = data["bob"]
    assert features.worker is home
    assert features.tolist() == [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    assert targets.tolist() == [0.0, 0.0]


def test_w3_a_second_bob_is_an_error_or_another_worker(transport, x):
    with pytest.raises(ValueError, match="bob"):
        fp.Cluster(["bob", "bob"], transport=transport)
    with fp.Cluster(["bob"], transport=transport) as first:
        p = first["bob"].send(x)
        with fp.Cluster(["bob"], transport=transport) as second:
            assert second["bob"] is not first["bob"]
            assert len(second["bob"].objects) == 0
        assert first["bob"].alive is True
        assert (p + p).tolist() == [2.0, 4.0]


def test_w4_an_unknown_name_is_worker_not_found(cluster):
    with pytest.raises(fp.WorkerNotFoundError, match="dave"):
        cluster["dave"]


def test_w5_clear_returns_the_empty_worker_and_forgets_tags(bob, x):
    held = [bob.send(x, tags="old"), bob.send(x)]
    bob = bob.clear()
    assert counts(bob) == (0,)
    assert list(bob.search("old")) == []
    again = bob.send(x)
    assert counts(bob) == (1,)
    del held, again


def test_w6_a_slow_link_can_be_played(bob, x):
    def late(tensor):
        time.sleep(0.1)
        return tensor

    start = time.monotonic()
    p = bob.run(late, x)
    assert p.get().tolist() == [1.0, 2.0]
    assert time.monotonic() - start >= 0.1
