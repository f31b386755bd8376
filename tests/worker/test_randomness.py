"""Turns of inline workers: whoever ends first, everybody has their own streams afterwards."""

import contextlib
import random
import time

import numpy as np
import pytest
import torch
from torch import nn

import fedproc as fp
from fedproc.cluster import supervision
from fedproc.worker import randomness
from fedproc.worker.randomness import Turns


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """An ordinary command borrows the generators at once, and nobody waits for its end."""
    monkeypatch.setattr(supervision, "LOCKSTEP_SECONDS", 1e-4)
    monkeypatch.setattr(randomness, "PATIENCE_SECONDS", 0.0)


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def alone(seed, times):
    turns = Turns(seed, 1)
    found = []
    for _ in range(times):
        with turns.turn():
            found.append(draw())
    return found


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_turns_that_overlap_do_not_mix_streams(first_to_leave):
    torch.manual_seed(7)
    expected, torch_threads = torch.get_rng_state(), torch.get_num_threads()
    python = random.getstate()
    workers = [Turns(1, 1), Turns(2, 1)]
    stacks = [contextlib.ExitStack() for _ in workers]
    found = [[], []]
    for place, (turns, stack) in enumerate(zip(workers, stacks, strict=True)):
        stack.enter_context(turns.turn())
        found[place].append(draw())
    stacks[first_to_leave].close()
    stacks[1 - first_to_leave].close()
    assert torch.equal(torch.get_rng_state(), expected)
    assert random.getstate() == python
    assert torch.get_num_threads() == torch_threads
    for place, turns in enumerate(workers):
        with turns.turn():
            found[place].append(draw())
        assert found[place] == alone(place + 1, 2)


def slow_client(model, x, y, ctx):
    first = torch.rand(1).item()
    time.sleep(0.002)  # so that another inline worker could come between
    return {"a": first, "b": torch.rand(1).item()}


MODEL = nn.Linear(4, 3)


def numbers(workers):
    data = torch.zeros(40, 4), torch.zeros(40, dtype=torch.long)
    with fp.Cluster(workers, transport="inline") as cluster:
        federated = fp.federate(data, cluster, clients=10)
        history = fp.Aggregator(MODEL, federated, slow_client, seed=0).run(3)
        return [dict(record.metrics) for record in history]


def test_nobody_borrows_from_clients_that_train():
    torch.manual_seed(7)
    expected = torch.get_rng_state()
    assert numbers(3) == numbers(1)
    assert torch.equal(torch.get_rng_state(), expected)
