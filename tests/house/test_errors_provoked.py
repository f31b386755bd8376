"""Every class of error, as a user meets it: who, which operation, and what to do next.

The table provokes each class of ``fedproc.errors``. Read the messages with ``pytest -rP``.
"""

import os
import pickle
import threading

import pytest
import torch
from torch import nn

import fedproc as fp
from fedproc import errors

X, Y = torch.ones(4, 2), torch.zeros(4, dtype=torch.long)


def fail():
    raise ValueError("no such row")


def never_trains(model, x, y, ctx):
    raise RuntimeError("diverged")


def gone(cluster, tmp_path):
    pointer = cluster["bob"].send(X)
    pointer.get()
    pointer.sum()


def lost(cluster, tmp_path):
    pointer = cluster["bob"].send(X)
    cluster["bob"].kill()
    pointer.get()


def late(cluster, tmp_path):
    with fp.Cluster(["bob"]) as other:
        pointer = other["bob"].run(_hold, str(tmp_path / "open"))
        try:
            pointer.get(timeout=0.02)
        finally:
            (tmp_path / "open").touch()


def _hold(path):
    import time

    deadline = time.monotonic() + 10
    while not os.path.exists(path) and time.monotonic() < deadline:  # noqa: PTH110
        time.sleep(0.002)


def closed(cluster, tmp_path):
    pointer = cluster["bob"].send(X)
    cluster.close()
    pointer.get()


def full(cluster, tmp_path):
    with fp.Cluster(["bob"], memory_limit=1 << 20) as small:
        small["bob"].run(torch.ones, 1 << 20).get()


def quorum(cluster, tmp_path):
    data = fp.federate((X, Y), cluster, clients=2)
    fp.Aggregator(nn.Linear(2, 2), data, never_trains).run(1)


def damaged(cluster, tmp_path):
    (tmp_path / "saved").write_bytes(b"not a checkpoint")
    data = fp.federate((X, Y), cluster, clients=2)
    fp.Aggregator.load(tmp_path / "saved", nn.Linear(2, 2), data, never_trains)


def spent(cluster, tmp_path):
    data = fp.federate((X, Y), cluster, clients=2)
    privacy = fp.DifferentialPrivacy(1.0, 1.0, 1e-5, max_epsilon=5.0)
    aggregator = fp.Aggregator(
        nn.Linear(2, 2), data, never_trains, weighting="uniform", privacy=privacy
    )
    aggregator.run_round()  # costs 4.7
    aggregator.run_round()


PROVOKED = {
    # class: (what provokes it, what the message says: who, which operation, what to do)
    "PlacementError": (
        lambda cluster, _: cluster["bob"].send(X) + cluster["alice"].send(X),
        ("'bob'", "'alice'", "+", "move"),
    ),
    "ObjectGoneError": (gone, ("'bob'", "get()", "fetch()")),
    "WorkerNotFoundError": (lambda cluster, _: cluster["nobody"], ("'nobody'", "'alice'", "'bob'")),
    "NotPermittedError": (
        lambda cluster, _: cluster["bob"].send(X, private=True).get(),
        ("'bob'", "get", "private"),
    ),
    "NotShippableError": (
        lambda cluster, _: cluster["bob"].run(abs, threading.Lock()),
        ("abs", "'bob'", "lock", "nothing was sent", "worker.run"),
    ),
    "ClosedError": (closed, ("'bob'", "closed", "before the end")),
    "WorkerStartError": (
        lambda cluster, _: fp.Cluster(["bob"], preload=["no_such_module"]),
        ("no_such_module", "preload", "Check"),
    ),
    "WorkerLostError": (lost, ("'bob'", "SIGKILL", "send them again")),
    "CommandTimeoutError": (late, ("'bob'", "get", "0.02 s", "ask again", "kill()")),
    "ArenaFullError": (full, ("'bob'", "MiB", "memory_limit")),
    "RemoteError": (
        lambda cluster, _: cluster["bob"].run(fail).get(),
        ("'bob'", "no such row", "test_errors_provoked.py", "in fail"),
    ),
    "QuorumError": (quorum, ("client-000", "'alice'", "diverged", "unchanged")),
    "CheckpointError": (damaged, ("saved", "checkpoint")),
    "PrivacyBudgetError": (spent, ("epsilon", "one more", "max_epsilon=5", "after the last round")),
}


def test_the_table_names_every_class():
    every = {name for name in vars(errors) if name.endswith("Error")}
    assert set(PROVOKED) == every - {"FedprocError"}


@pytest.mark.parametrize("name", PROVOKED)
def test_it_is_raised_pickles_and_says_what_to_do(name, tmp_path):
    provoke, said = PROVOKED[name]
    cluster = fp.Cluster(["alice", "bob"])
    try:
        with pytest.raises(getattr(errors, name)) as caught:
            provoke(cluster, tmp_path)
    finally:
        cluster.close()
    error = caught.value
    print(f"{name}: {error}")
    missing = [word for word in said if word.lower() not in str(error).lower()]
    assert missing == [], str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy).__name__, str(copy)) == (type(error).__name__, str(error))
    assert set(vars(copy)) == set(vars(error))
