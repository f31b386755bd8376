"""Signals to the parent, at any moment: cases 22 to 25. Calls: tests/remote/test_interrupts.py."""

import contextlib
import random
import signal

import pytest
import torch

import fedproc as fp
from tests.faults.things import cross_entropy
from tests.federated.worlds import bits, dropout_net, sgd, shards

pytestmark = [
    pytest.mark.faults,
    # an interrupt inside a finalizer is swallowed by the interpreter, and shown
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SIZES = [12, 9, 6, 15]
LOCAL = fp.LocalTraining(cross_entropy, sgd)


def models(rounds):
    """The bits of the model after each whole round, undisturbed."""
    with fp.Cluster(1, transport="inline") as cluster:
        data = fp.FederatedDataset(shards(SIZES), cluster)
        aggregator = fp.Aggregator(dropout_net(), data, LOCAL)
        found = [bits(aggregator.model)]
        for _ in range(rounds):
            aggregator.run(1)
            found.append(bits(aggregator.model))
    return found


def test_case_22_the_model_is_that_of_the_last_whole_round(transport, interrupts):
    wanted = models(12)
    moments = random.Random(transport)
    interrupted = 0
    with fp.Cluster(2, transport=transport) as cluster:
        data = fp.FederatedDataset(shards(SIZES), cluster)
        aggregator = fp.Aggregator(dropout_net(), data, LOCAL)
        while (done := len(aggregator.history)) < 12:
            assert bits(aggregator.model) == wanted[done]
            # a moment within a round, however long a round takes here
            seconds = aggregator.history[-1].seconds if done else 0.01
            moment = max(0.0005, moments.uniform(0, 1) * seconds)
            interrupted += interrupts.interrupt(moment, lambda: aggregator.run(1))
            if len(aggregator.history) == done:  # nor may it depend on luck to get ahead
                assert bits(aggregator.model) == wanted[done]
                aggregator.run(1)
        assert bits(aggregator.model) == wanted[12]
        cluster.wait()
    assert interrupted >= 3


def test_case_22_close_can_be_interrupted_and_repeated(interrupts):
    moments = random.Random(22)
    for _ in range(15):
        cluster = fp.Cluster(["alice", "bob"])
        cluster["bob"].run(signal.pause)
        interrupts.interrupt(moments.uniform(0.0001, 0.01), cluster.close)
        cluster.close()
        assert cluster.closed
        assert not any(worker.alive for worker in cluster._workers.values())


def test_case_23_two_interrupts_while_it_closes(interrupts):
    moments = random.Random(23)
    for _ in range(10):
        cluster = fp.Cluster(["alice", "bob"])
        cluster["bob"].run(signal.pause)

        def stubbornly(cluster=cluster):
            with contextlib.suppress(KeyboardInterrupt):
                cluster.close()
            cluster.close()

        interrupts.interrupt(moments.uniform(0.0001, 0.01), stubbornly, again=0.003)
        cluster.close()
        assert cluster.closed


def test_case_25_a_storm_of_signals_changes_nothing(transport):
    """A handler that does nothing: every call of the system is interrupted, none gives up."""
    caught = []
    old = signal.signal(signal.SIGALRM, lambda *_: caught.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        with fp.Cluster(["alice", "bob"], transport=transport) as cluster:
            alice, bob = cluster
            p = bob.send(torch.arange(50_000.0))
            for _ in range(30):
                q = (p + 1).move(alice)
                with q.borrow() as t:
                    assert t[7].item() == 8.0
                assert q.get()[49_999].item() == 50_000.0
            assert cluster.map(abs, range(-50, 0)) == list(range(50, 0, -1))
            data = fp.FederatedDataset(shards(SIZES), cluster)
            aggregator = fp.Aggregator(dropout_net(), data, LOCAL)
            aggregator.run(1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert bits(aggregator.model) == models(1)[1]
    assert len(caught) > 50
