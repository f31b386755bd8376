import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedproc.client.training import LocalTraining
from fedproc.errors import NotPermittedError, QuorumError, RemoteError
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset, federate
from fedproc.federated.history import Evaluation
from fedproc.federated.holding import deal
from fedproc.federated.loader import FederatedDataLoader
from fedproc.federated.partition import IID, ByKey, Dirichlet
from fedproc.federated.rows import as_rows
from tests.federated.worlds import bits, blobs, cross_entropy, linear, sgd, shards


def rows_of(data, client):
    x, y = data[client]
    return x.fetch(), y.fetch()


def test_every_row_is_with_exactly_one_client(cluster):
    x, y = torch.arange(50.0).reshape(50, 1), torch.arange(50) % 4
    data = federate((x, y), cluster, clients=7, partition=Dirichlet(0.5))
    found = [rows_of(data, client) for client in data.clients]
    values = torch.cat([part for part, _ in found]).flatten()
    assert sorted(values.tolist()) == x.flatten().tolist()
    assert all(torch.equal(part[:, 0].long() % 4, labels) for part, labels in found)
    assert all(part.flatten().tolist() == sorted(part.flatten().tolist()) for part, _ in found)
    assert [len(part) for part, _ in found] == list(data.sizes.values())
    assert len(data) == 50


def test_names_are_padded_and_ordered(cluster):
    data = federate(blobs(20), cluster, clients=11)
    assert data.clients == tuple(f"client-{n:03d}" for n in range(11))


def test_the_partition_does_not_depend_on_the_workers(cluster):
    from fedproc.cluster.cluster import Cluster

    with Cluster(1, transport="inline") as other:
        for seed in (0, 5):
            one, two = (federate(blobs(40), c, clients=6, seed=seed) for c in (cluster, other))
            for client in one.clients:
                assert torch.equal(rows_of(one, client)[0], rows_of(two, client)[0])


def test_by_key_names_the_clients(cluster):
    data = federate(blobs(5), cluster, partition=ByKey(["x", "y", "x", "z", "y"]))
    assert data.sizes == {"x": 2, "y": 2, "z": 1}


def test_a_client_named_as_a_worker_lives_there_and_others_are_balanced(cluster):
    data = FederatedDataset({"bob": blobs(9), "p": blobs(5), "q": blobs(4), "r": blobs(1)}, cluster)
    homes = {client: data.worker_of(client).name for client in data.clients}
    assert homes == {"bob": "bob", "p": "alice", "q": "carol", "r": "carol"}


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 6))
def test_dealing_gives_everybody_a_home_and_no_worker_far_too_much(sizes, workers):
    names = [f"w{n}" for n in range(workers)]
    homes = deal({str(n): size for n, size in enumerate(sizes)}, names, {})
    loads = [sum(s for n, s in enumerate(sizes) if homes[str(n)] == name) for name in names]
    assert sorted(homes) == sorted(str(n) for n in range(len(sizes)))
    assert max(loads) - min(loads) <= max(sizes) + len(sizes)


def test_views_of_a_client_are_its_rows_in_the_worker(cluster):
    data = FederatedDataset(shards([3, 4]), cluster)
    x, _ = data["b"]
    assert x.worker is data.worker_of("b")
    assert tuple(x.shape) == (4, 6)
    x.zero_()
    assert rows_of(data, "b")[0].abs().sum() == 0
    assert torch.equal(rows_of(data, "a")[0], shards([3, 4])["a"][0])


def test_shards_of_unlike_shapes_and_dtypes_live_side_by_side(cluster):
    one = (torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))
    two = (torch.ones(4, 5, dtype=torch.float64), torch.zeros(4, 2))
    data = FederatedDataset({"alice": one, "a": two, "b": one, "c": two}, cluster)
    for client, given_rows in {"alice": one, "a": two, "b": one, "c": two}.items():
        for found, expected in zip(rows_of(data, client), given_rows, strict=True):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


def test_factories_run_in_the_worker(cluster):
    def factory(value):
        return lambda: (np.full((3, 2), value), np.arange(3))

    data = FederatedDataset.from_factories({"a": factory(1.0), "b": factory(2.0)}, cluster)
    assert data.sizes == {"a": 3, "b": 3}
    assert rows_of(data, "b")[0].tolist() == [[2.0, 2.0]] * 3
    assert rows_of(data, "a")[1].tolist() == [0, 1, 2]


def born(count):
    return torch.ones(count, 2), torch.zeros(count)


def test_private_rows_of_factories_are_counted_and_stay(cluster):
    makers = {name: functools.partial(born, n) for name, n in (("a", 3), ("b", 5))}
    data = FederatedDataset.from_factories(makers, cluster, private=True)
    assert data.sizes == {"a": 3, "b": 5}
    for client in data.clients:
        with pytest.raises(NotPermittedError):
            data[client][0].fetch()


def test_a_factory_of_unlike_lengths_is_refused(cluster):
    with pytest.raises(RemoteError, match="one row each"):
        FederatedDataset.from_factories({"a": lambda: (np.ones(3), np.ones(2))}, cluster)


def test_private_rows_stay_where_they_are(cluster):
    data = federate(blobs(30), cluster, private=True)
    x, _ = data["bob"]
    assert tuple(x.shape) == (10, 6)
    with pytest.raises(NotPermittedError):
        x.get()


def test_private_rows_train_and_evaluate_but_only_means_over_enough_rows_leave(cluster):
    data = FederatedDataset(shards([30, 12, 4]), cluster, private=True)
    local = LocalTraining(cross_entropy, sgd)
    open_data = FederatedDataset(shards([30, 12, 4]), cluster)
    private, public = (Aggregator(linear(), d, local) for d in (data, open_data))
    record, _ = private.run(2, evaluate_on=blobs(20))
    public.run(2)
    assert bits(private.model) == bits(public.model)
    assert record.accepted == ("a", "b", "c")
    assert record.evaluation.accuracy is not None
    own = private.evaluate_clients()
    assert [found.loss is not None for found in own.values()] == [True, True, False]
    assert [found.accuracy is not None for found in own.values()] == [True, True, False]

    small = FederatedDataset(shards([4, 4]), cluster, private=True)
    assert Aggregator(linear(), small, local).run_round().loss is None


def test_a_loss_of_few_labels_of_many_private_rows_does_not_leave(cluster):
    clients = shards([30, 12])
    clients["b"][1][1:] = -100  # one label is left: its loss would be that of one row
    local = LocalTraining(cross_entropy, sgd)
    private, public = (
        Aggregator(linear(), FederatedDataset(clients, cluster, private=kind), local)
        for kind in (True, False)
    )
    own = private.evaluate_clients()
    assert own["a"] == public.evaluate_clients()["a"]
    assert own["b"] == Evaluation(None, None, 12)
    alone = FederatedDataset({"b": clients["b"]}, cluster, private=True)
    assert Aggregator(linear(), alone, local, seed=1).run_round().loss is None


def test_what_a_function_keeps_of_private_rows_does_not_leave(cluster):
    def keep(model, x, y, ctx):
        ctx.state["rows"] = x

    data = FederatedDataset(shards([30]), cluster, private=True)
    with pytest.raises(QuorumError, match="NotPermittedError"):
        Aggregator(linear(), data, keep).run_round()


class Pairs:
    """A map-style dataset."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_map_style_datasets():
    x, y = blobs(4)
    for data in (
        Pairs(list(zip(x, y.tolist(), strict=True))),
        Pairs([{"pixels": a.numpy(), "label": b} for a, b in zip(x, y.numpy(), strict=True)]),
        torch.utils.data.TensorDataset(x, y),
        (x.numpy(), y.tolist()),
    ):
        found = as_rows(data)
        assert torch.equal(found[0], x)
        assert torch.equal(found[1], y)


def test_arrays_that_torch_cannot_share_are_copied():
    frozen = np.arange(6.0)[::-1]
    frozen.flags.writeable = False
    big = np.arange(6, dtype=">i4")
    x, y = as_rows((frozen, big))
    assert x.tolist() == [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    assert y.tolist() == list(range(6))


@pytest.mark.parametrize(
    "data",
    [
        (torch.ones(3), torch.ones(2)),
        (torch.ones(3),),
        (torch.tensor(1.0), torch.tensor(1.0)),
        (["a", "b"], [1, 2]),
        torch.ones(3),
        {"x": 1},
        None,
        Pairs([]),
        Pairs([1, 2]),
        Pairs([(torch.ones(2), 1), (torch.ones(3), 1)]),
    ],
)
def test_what_is_no_data_is_a_value_error(data):
    with pytest.raises(ValueError, match=r"data|row|number|dataset"):
        as_rows(data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clients": 0}, "clients"),
        ({"clients": True}, "clients"),
        ({"clients": 31}, "31 clients"),
        ({"partition": "other"}, "other"),
        ({"seed": 1.5}, "seed"),
        ({"clients": 2, "partition": ByKey([0] * 30)}, "leave it out"),
    ],
)
def test_bad_arguments_of_federate(cluster, arguments, message):
    with pytest.raises(ValueError, match=message):
        federate(blobs(30), cluster, **arguments)


def test_more_clients_than_rows_need_min_size_zero(cluster):
    data = federate(blobs(3), cluster, clients=8, partition=Dirichlet(1.0, min_size=0))
    assert sum(data.sizes.values()) == 3
    assert min(data.sizes.values()) == 0


def test_unknown_clients_and_no_clients(cluster):
    data = federate(blobs(6), cluster, clients=2, partition=IID())
    with pytest.raises(KeyError, match="nobody"):
        data["nobody"]
    with pytest.raises(ValueError, match="at least one client"):
        FederatedDataset({}, cluster)
    with pytest.raises(ValueError, match="string"):
        FederatedDataset({3: blobs(2)}, cluster)


# ---------------------------------------------------------------- many clients


def test_sizes_are_copied_once_not_for_every_client(cluster, monkeypatch):
    data = federate(blobs(60), cluster, clients=20)
    aggregator = Aggregator(linear(), data, LocalTraining(cross_entropy, sgd))
    copies, copied = [], FederatedDataset.sizes.fget
    monkeypatch.setattr(
        FederatedDataset, "sizes", property(lambda data: copies.append(1) or copied(data))
    )
    for use in (
        lambda: len(aggregator.evaluate_clients()),
        lambda: len(data.summary()),
        lambda: sum(1 for _ in FederatedDataLoader(data, 3)),
    ):
        copies.clear()
        assert use() == 20
        assert len(copies) == 1


# ---------------------------------------------------------------- loader


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_every_row_once_an_epoch_in_batches_of_one_client(cluster, shuffle, drop_last):
    x = torch.arange(23.0).reshape(23, 1)
    owner = {}
    data = federate((x, x[:, 0].long()), cluster, clients=4)
    for client in data.clients:
        owner.update(dict.fromkeys(rows_of(data, client)[1].tolist(), client))
    loader = FederatedDataLoader(data, 4, shuffle=shuffle, drop_last=drop_last)
    batches = [(bx.get().flatten().tolist(), by.get().tolist()) for bx, by in loader]
    assert len(batches) == len(loader)
    assert all(bx == by and len({owner[row] for row in by}) == 1 for bx, by in batches)
    rows = [row for _, by in batches for row in by]
    assert len(set(rows)) == len(rows)
    if drop_last:
        assert [len(by) for _, by in batches] == [4] * 4  # of 6, 6, 6 and 5 rows
    else:
        assert sorted(rows) == list(range(23))


def test_clients_go_worker_by_worker(cluster):
    data = federate(blobs(60), cluster, clients=9)
    names = [x.worker.name for x, _ in FederatedDataLoader(data, 100)]
    assert names == sorted(names)
    assert len(names) == 9


def test_an_epoch_has_a_new_order_that_the_seed_decides(cluster):
    data = federate((torch.arange(40.0), torch.zeros(40)), cluster)

    def epochs(seed):
        loader = FederatedDataLoader(data, 8, shuffle=True, seed=seed)
        return [[x.get().tolist() for x, _ in loader] for _ in range(2)]

    first, second = epochs(0)
    assert first != second
    assert [first, second] == epochs(0)
    assert first != epochs(1)[0]


@pytest.mark.parametrize("shuffle", [False, True])
def test_messages_of_a_batch_do_not_depend_on_its_size(cluster, shuffle):
    data = federate(blobs(240), cluster)

    def messages_per_batch(size):
        loader = FederatedDataLoader(data, size, shuffle=shuffle)
        before = cluster.messages
        count = sum(1 for _ in loader)
        return (cluster.messages - before) / count

    assert messages_per_batch(4) == messages_per_batch(40) == 2 + shuffle


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None])
def test_bad_batch_sizes(cluster, size):
    with pytest.raises(ValueError, match="batch_size"):
        FederatedDataLoader(federate(blobs(6), cluster), size)
