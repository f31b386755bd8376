"""Memory of many clients: counted exactly, in blocks and bytes of the arenas."""

import gc
import time
from typing import ClassVar

import pytest
import torch
from torch import nn

from fedproc.client.update import Update
from fedproc.cluster.cluster import Cluster
from fedproc.federated import holding, supply
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset, federate
from fedproc.federated.lane import Lane, Pace
from fedproc.federated.strategies import FedAvg
from fedproc.memory.arena import Arena
from tests.federated.worlds import blobs

ROW_BYTES = 16 << 10
BLOCK_BYTES = 8 * ROW_BYTES


def wide(rows, start=0):
    """Rows so wide that every block goes through shared memory."""
    x = torch.arange(start, start + rows, dtype=torch.float32)[:, None].repeat(1, ROW_BYTES // 4)
    return x, torch.arange(start, start + rows)


def test_rows_on_their_way_to_the_workers_take_two_blocks_however_many_clients(
    cluster, monkeypatch
):
    monkeypatch.setattr(holding, "_BLOCK_BYTES", BLOCK_BYTES)
    arena, used, send = cluster["alice"].link.arena, [], holding._send_block

    def counting(*args, **options):
        block = send(*args, **options)
        used.append(arena.used_bytes)
        return block

    monkeypatch.setattr(holding, "_send_block", counting)
    data = federate(wide(480), cluster, clients=240)
    assert len(used) >= 240 // 4
    assert max(used) <= 2 * BLOCK_BYTES
    assert arena.used_bytes == 0
    x, y = data["client-239"]
    assert x.fetch()[:, 0].tolist() == y.fetch().tolist()


def test_a_client_with_more_rows_than_a_block_has_one_of_its_own(cluster, monkeypatch):
    monkeypatch.setattr(holding, "_BLOCK_BYTES", BLOCK_BYTES)
    pairs = {"a": wide(2), "b": wide(20, 2), "c": wide(1, 22), "d": wide(2, 23)}
    sources = {client: holding.RowsSource(*pair) for client, pair in pairs.items()}
    blocks = holding.hold(cluster["bob"], sources, private=False)
    assert [dict(block.spans) for block in blocks] == [
        {"a": (0, 2)},
        {"b": (0, 20)},
        {"c": (0, 1), "d": (1, 3)},
    ]
    for block in blocks:
        for client, (start, stop) in block.spans.items():
            x, y = pairs[client]
            assert torch.equal(block.x[start:stop].fetch(), x)
            assert torch.equal(block.y[start:stop].fetch(), y)


WINDOW, BATCH = 8, 3
# A worker gets a batch whenever fewer than WINDOW of its clients are on their way.
AHEAD = 9
FEATURES = 64
SLOT_BYTES = 20 << 10  # the size class of a model of FEATURES * FEATURES + FEATURES floats


def touched_bytes():
    """Bytes of the worker's shared memory that were ever handed out; runs in the worker."""
    (arena,) = [each for each in gc.get_objects() if type(each) is Arena]
    return arena._heap.touched_bytes


class Counting(FedAvg):
    """Notes how many updates exist in the parent while they are folded."""

    alive: ClassVar[list[int]] = []

    def mean_weight(self, weight, update, first):
        self.alive.append(sum(type(each) is Update for each in gc.get_objects()))
        return super().mean_weight(weight, update, first)


@pytest.fixture
def ahead(monkeypatch):
    """Small bounds; returns how far each worker was ahead of the fold after each submission."""
    monkeypatch.setattr(supply, "_WINDOW_MOST", WINDOW)
    monkeypatch.setattr(Pace, "batch_size", lambda self, nbytes: BATCH)
    seen, submit = [], Lane.submit

    def counting(lane, batch):
        submit(lane, batch)
        seen.append(lane.on_the_way)

    monkeypatch.setattr(Lane, "submit", counting)
    Counting.alive.clear()
    return seen


@pytest.mark.parametrize("clients", [24, 96])
def test_a_round_takes_so_many_slots_however_many_clients_also_if_the_first_is_the_slowest(
    clients, ahead, tmp_path
):
    counter = tmp_path / "trained"
    counter.touch()

    def train(model, x, y, ctx):
        if ctx.client == "c000":
            # It trains until the other worker has done all that it got.
            until = time.monotonic() + 60
            while counter.stat().st_size < AHEAD:
                assert time.monotonic() < until, f"{counter.stat().st_size} trained elsewhere"
        elif int(ctx.client[1:]) % 2:
            with counter.open("ab") as file:
                file.write(b".")

    x, y = blobs(clients, features=FEATURES)
    shards = {f"c{n:03d}": (x[n : n + 1], y[n : n + 1]) for n in range(clients)}
    with Cluster(2, transport="process") as cluster:
        data = FederatedDataset(shards, cluster)
        homes = data.homes(data.clients)
        assert len({homes[client] for client in data.clients[::2]}) == 1  # even ones in one place
        before = {worker.name: worker.run(touched_bytes).get() for worker in cluster}
        model = nn.Linear(FEATURES, FEATURES)
        record = Aggregator(model, data, train, strategy=Counting()).run_round()
        assert len(record.accepted) == clients
        assert max(ahead) == AHEAD
        for worker in cluster:
            grown = worker.run(touched_bytes).get() - before[worker.name]
            # slots, the model, and what is left of the last chunk of blocks
            assert grown <= (AHEAD + BATCH + 4) * 2 * SLOT_BYTES
    # those of two batches that were taken, and the first of the round
    assert max(Counting.alive) <= 2 * BATCH + 1
