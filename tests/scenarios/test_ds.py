"""Scenarios DS: datasets and loaders."""

from itertools import chain

import pytest
import torch

import fedproc as fp


def _rows(start, stop):
    """Rows that name themselves: (x, y) with x[i] = [i, -i] and y[i] = i."""
    numbers = torch.arange(start, stop)
    return torch.stack([numbers, -numbers], dim=1).float(), numbers


def _sharded(cluster, *sizes):
    """Clients named like the workers, with these sizes, rows numbered through."""
    shards, start = {}, 0
    for worker, size in zip(cluster, sizes, strict=True):
        shards[worker.name] = _rows(start, start + size)
        start += size
    return fp.FederatedDataset(shards, cluster)


def _epoch(loader):
    """The row numbers of each batch."""
    batches = []
    for x, y in loader:
        assert x.worker is y.worker
        numbers = y.tolist()
        assert x[:, 0].tolist() == numbers
        batches.append(numbers)
    return batches


def test_ds1_six_rows_over_two_workers(pair):
    data = fp.federate(_rows(0, 6), pair)
    assert list(data.clients) == ["bob", "alice"]
    assert dict(data.sizes) == {"bob": 3, "alice": 3}
    assert len(data) == 6
    shards = [data[client][1].tolist() for client in data.clients]
    assert [sorted(shard) for shard in shards] == shards
    assert sorted(chain(*shards)) == [0, 1, 2, 3, 4, 5]
    assert [data.worker_of(client).name for client in data.clients] == ["bob", "alice"]


# trap: PySyft gave 2, 2, 1 rows and left the fourth worker without any.
def test_ds2_everybody_gets_a_row(transport):
    with fp.Cluster(4, transport=transport) as cluster:
        data = fp.federate(_rows(0, 5), cluster)
        assert sorted(data.sizes.values()) == [1, 1, 1, 2]
        assert len(data) == 5
        with pytest.raises(ValueError, match=r"\w{3}"):
            fp.federate(_rows(0, 3), cluster)


def test_ds3_a_shard_can_be_looked_at_where_it_is(pair):
    data = _sharded(pair, 2, 4)
    assert len(data) == 6
    x, y = data["alice"]
    assert x.worker is y.worker is data.worker_of("alice")
    assert y.tolist() == [2, 3, 4, 5]
    assert x.fetch().tolist() == [[2.0, -2.0], [3.0, -3.0], [4.0, -4.0], [5.0, -5.0]]
    assert dict(data.sizes) == {"bob": 2, "alice": 4}


# trap: PySyft lost the first dataset.
def test_ds4_two_datasets_on_one_worker_are_both_kept(transport):
    with fp.Cluster(["bob"], transport=transport) as cluster:
        data = fp.FederatedDataset({"first": _rows(0, 2), "second": _rows(2, 5)}, cluster)
        assert dict(data.sizes) == {"first": 2, "second": 3}
        assert data["first"][1].tolist() == [0, 1]
        assert data["second"][1].tolist() == [2, 3, 4]
        assert data.worker_of("first") is data.worker_of("second") is cluster["bob"]


def test_ds5_workers_one_after_another(pair):
    data = _sharded(pair, 2, 4)
    plain = fp.FederatedDataLoader(data, 2)
    shuffled = fp.FederatedDataLoader(data, 2, shuffle=True)
    assert len(plain) == len(shuffled) == 3
    for _ in range(3):
        assert _epoch(plain) == [[0, 1], [2, 3], [4, 5]]
        batches = _epoch(shuffled)
        assert sorted(batches[0]) == [0, 1]
        assert sorted(batches[1] + batches[2]) == [2, 3, 4, 5]
        assert len(batches) == 3


def test_ds5_every_epoch_has_a_new_seeded_order(pair):
    data = _sharded(pair, 2, 30)
    loader, again = (fp.FederatedDataLoader(data, 30, shuffle=True, seed=1) for _ in range(2))
    epochs = [_epoch(loader) for _ in range(3)]
    assert epochs[0][1] != epochs[1][1] != epochs[2][1]
    assert [_epoch(again) for _ in range(3)] == epochs
    other = fp.FederatedDataLoader(data, 30, shuffle=True, seed=2)
    assert _epoch(other)[1] != epochs[0][1]


# trap: PySyft said 2 and yielded 3.
def test_ds6_len_is_what_it_yields(pair):
    data = _sharded(pair, 3, 5)
    for options, batches in (({}, [3, 4, 1]), ({"drop_last": True}, [4])):
        loader = fp.FederatedDataLoader(data, 4, **options)
        assert [len(batch) for batch in _epoch(loader)] == batches
        assert len(loader) == len(batches)


# trap: PySyft stopped at the shortest worker, or repeated data for each iterator.
def test_ds7_every_row_once_per_epoch_and_iterator(cluster):
    data = _sharded(cluster, 2, 4, 4)
    loader = fp.FederatedDataLoader(data, 2, shuffle=True)
    for _ in range(2):
        assert sorted(chain(*_epoch(loader))) == list(range(10))
    first, second = [], []
    for (_, y), (_, other) in zip(loader, loader, strict=True):
        first += y.tolist()
        second += other.tolist()
    assert sorted(first) == sorted(second) == list(range(10))


def test_ds8_a_batch_costs_a_constant_number_of_messages(pair):
    def spent(batch_size):
        features = torch.ones(4 * batch_size, 784), torch.zeros(4 * batch_size)
        batches = iter(fp.FederatedDataLoader(fp.federate(features, pair), batch_size))
        held = [next(batches)]
        before = pair.messages
        held.append(next(batches))
        messages = pair.messages - before
        pair.wait()
        assert held[1][0].shape == (batch_size, 784)
        return messages

    assert spent(1) == spent(64)
    assert spent(64) <= 6
