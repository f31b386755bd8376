"""Scenarios TG: tags and search."""

import pytest
import torch

import fedproc as fp
from tests.scenarios.toy import counts


def test_tg1_search_is_and(bob, x):
    tags = [("fun", "mnist"), ("fun", "cifar"), ("target", "boston"), ("target", "train")]
    held = [bob.send(x, tags=pair) for pair in tags]
    found = [len(list(bob.search(tag))) for tag in ("fun", "mnist", "boston", "target")]
    assert found == [2, 1, 1, 2]
    assert [p.id for p in bob.search("fun", "mnist")] == [held[0].id]


# trap: PySyft ignored a first term that nothing carried.
def test_tg2_no_term_is_ignored(bob, x):
    p = bob.send(x, tags=("a", "b"))
    assert list(bob.search("unknown", "a")) == []
    assert list(bob.search("a", "unknown")) == []
    with pytest.raises(ValueError, match="tag"):
        bob.search()
    assert torch.equal(p.get(), x)


def test_tg3_found_handles_point_and_do_not_own(bob, x):
    p = bob.send(x, tags="a")
    for _ in range(2):
        (found,) = bob.search("a")
        assert found.worker is bob
        assert found.id == p.id
        del found
    assert counts(bob) == (1,)
    (found,) = bob.search("a")
    assert torch.equal(found.get(), x)
    assert counts(bob) == (0,)
    with pytest.raises(fp.ObjectGoneError):
        p.get()


def test_tg4_the_whole_cluster_is_searched(cluster, alice, bob, carol, x):
    held = [bob.send(x, tags=("x", "train")), alice.send(x + 1, tags=("x", "train"))]
    held.append(carol.send(x, tags="x"))
    found = cluster.search("x", "train")
    assert set(found) == {"alice", "bob"}
    assert [p.tolist() for p in found["bob"]] == [[1.0, 2.0]]
    assert [p.tolist() for p in found["alice"]] == [[2.0, 3.0]]
