"""What goes wrong in the middle of a compiled call is what is raised, and leaves nothing behind."""

import sys

import pytest
import torch

import fedproc as fp
from fedproc.remote.flat import COMPILED

pytestmark = pytest.mark.skipif(not COMPILED, reason="there was no C compiler")


@pytest.fixture
def cluster():
    with fp.Cluster(["bob"]) as cluster:
        yield cluster


def test_an_error_under_the_lock_is_raised_and_the_lock_is_free(cluster):
    bob = cluster["bob"]
    outbox = bob.link.outbox
    bob.run(abs, -1).wait()  # its name is known from now on, and nobody reads
    writes, outbox.writes = outbox.writes, "no number"
    with pytest.raises(TypeError, match="integer"):
        bob.run(abs, -1)
    assert outbox.writes == "no number"
    outbox.writes = writes
    assert bob.run(abs, -1).get() == 1


def test_calls_do_not_count_references_to_none(cluster):
    x = cluster["bob"].send(torch.ones(2))
    cluster.wait()
    before = sys.getrefcount(None)
    for _ in range(1000):
        x + 1
    assert sys.getrefcount(None) < before + 500
