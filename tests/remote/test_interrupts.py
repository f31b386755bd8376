"""Ctrl-C at any point: the next command works, nothing is out of step, nothing waits for ever."""

import random
import signal
import time

import pytest
import torch

import fedproc as fp

ROUNDS = 120


@pytest.fixture
def interrupting():
    """Makes SIGALRM raise KeyboardInterrupt, as Ctrl-C does, after a random moment."""

    def handler(_signal, _frame):
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, handler)
    yield lambda moment: signal.setitimer(signal.ITIMER_REAL, moment)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)


def _get(bob, x, count):
    (count + 1).get()


def _fetch(bob, x, count):
    x.fetch()


def _submit(bob, x, count):
    count.add_(1)


def _borrow(bob, x, count):
    with x.borrow():
        count.add_(1)


def _run(bob, x, count):
    bob.run(lambda: 1).get()


def _gather(bob, x, count):
    fp.gather([x, count, x])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("work", [_get, _fetch, _submit, _borrow, _run, _gather])
def test_the_next_command_works(work, interrupting):
    moments = random.Random(work.__name__)
    with fp.Cluster(["bob"]) as cluster:
        bob = cluster["bob"]
        x, count = bob.send(torch.zeros(50_000)), bob.send(torch.zeros(1))
        interrupted = 0
        end = time.monotonic() + 20
        while interrupted < ROUNDS and time.monotonic() < end:
            try:
                interrupting(moments.uniform(0.0002, 0.003))
                while True:
                    work(bob, x, count)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            cluster.wait(timeout=20)
            before = count.fetch(timeout=20).item()
            count.add_(1)
            assert count.fetch(timeout=20).item() == before + 1
        assert interrupted > 10


def test_starting_can_be_interrupted(interrupting):
    moments = random.Random(7)
    for _ in range(25):
        try:
            interrupting(moments.uniform(0.001, 0.03))
            cluster = fp.Cluster(["a", "b"])
        except KeyboardInterrupt:
            continue
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        with cluster:
            assert [worker.run(abs, -1).get() for worker in cluster] == [1, 1]
    with fp.Cluster(["a", "b"]) as cluster:
        pids = [worker.run(_pid).get() for worker in cluster]
        assert pids == [worker.pid for worker in cluster]


def _pid():
    import os

    return os.getpid()
