import itertools
import sys

import pytest
import torch

from fedproc.cluster.cluster import Cluster
from fedproc.federated.data import FederatedDataset, federate
from fedproc.federated.partition import Dirichlet
from fedproc.federated.summary import ClientSummary, Summary, count_labels
from tests.federated.worlds import blobs, shards

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module", autouse=True)
def fonts(tmp_path_factory):
    """Lets matplotlib open its fonts, which stay open."""
    summary = Summary((ClientSummary("a", "w", 1, None),))
    summary.plot(tmp_path_factory.mktemp("plots") / "first.png")


def with_labels(labels):
    return torch.zeros(len(labels), 2), torch.tensor(labels)


def test_rows_and_labels_of_every_client(cluster):
    data = FederatedDataset(
        {"alice": with_labels([0, 2, 2]), "bob": with_labels([2]), "p": with_labels([7, 0])},
        cluster,
    )
    assert data.summary() == Summary(
        (
            ClientSummary("alice", "alice", 3, {0: 1, 2: 2, 7: 0}),
            ClientSummary("bob", "bob", 1, {0: 0, 2: 1, 7: 0}),
            ClientSummary("p", "carol", 2, {0: 1, 2: 0, 7: 1}),
        )
    )


def test_the_counts_are_those_of_the_split_on_any_cluster(cluster):
    x, y = blobs(200)
    with Cluster(1, transport="inline") as other:
        for where in (cluster, other):
            data = federate((x, y), where, clients=7, partition=Dirichlet(0.3))
            summary = data.summary()
            for client, record in zip(data.clients, summary, strict=True):
                expected = data[client][1].fetch().bincount(minlength=3).tolist()
                assert list(record.labels.values()) == expected
                assert record.rows == sum(expected) == data.sizes[client]
            assert (summary.rows, len(summary), summary.labels) == (200, 7, (0, 1, 2))


def test_records_are_found_by_place_name_and_slice(cluster):
    summary = FederatedDataset(shards([3, 4]), cluster).summary()
    assert summary[0].client == "a"
    assert summary["b"].rows == 4
    assert [record.client for record in summary[1:]] == ["b"]
    with pytest.raises(KeyError, match="'z'"):
        summary["z"]
    with pytest.raises(AttributeError):
        summary.clients = ()


def test_only_counts_travel(cluster):
    x, y = torch.zeros(60_000, 1), torch.arange(60_000) % 3
    data = FederatedDataset({"p": (x, y)}, cluster)
    before = cluster.message_bytes
    data.summary()
    assert cluster.message_bytes - before < 20_000


def test_factories_are_counted_where_they_ran(cluster):
    def born():
        return with_labels([1, 1, 3])

    summary = FederatedDataset.from_factories({"a": born, "b": born}, cluster).summary()
    assert [record.labels for record in summary] == [{1: 2, 3: 1}] * 2


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (torch.tensor([1, 0, 1]), {0: 1, 1: 2}),
        (torch.tensor([[1], [0], [1]]), {0: 1, 1: 2}),
        (torch.tensor([True, False, True]), {0: 1, 1: 2}),
        (torch.tensor([-1, 255, -1], dtype=torch.int16), {-1: 2, 255: 1}),
        (torch.tensor([], dtype=torch.int64), {}),
        (torch.tensor([1.0, 0.0]), None),
        (torch.tensor([[1, 0], [0, 1]]), None),
        (torch.tensor([1j]), None),
    ],
)
def test_labels_are_one_integer_per_row(targets, expected):
    assert count_labels(targets) == expected


def test_targets_without_classes_have_rows_only(cluster):
    data = FederatedDataset({"a": (torch.zeros(3, 1), torch.zeros(3))}, cluster)
    summary = data.summary()
    assert (summary["a"].rows, summary["a"].labels, summary.labels) == (3, None, None)
    assert str(summary) == "client  worker  rows\na       alice      3\nall                3"


def test_private_labels_are_counted_only_over_enough_rows(transport, tmp_path):
    with Cluster(2, transport=transport, min_rows=5) as cluster:
        given = {"few": with_labels([0] * 4), "enough": with_labels([0, 0, 1, 1, 1])}
        data = FederatedDataset(given, cluster, private=True)
        summary = data.summary()
        summary.plot(tmp_path / "private.png")
    assert summary["few"].rows == 4
    assert summary["few"].labels is None
    assert summary["enough"].labels == {0: 2, 1: 3}
    assert str(summary).splitlines()[1].split() == ["few", "worker-1", "4", "-", "-"]


def test_a_lost_worker_is_noticed(cluster, alice):
    data = FederatedDataset(shards([4, 5, 6]), cluster)
    before = data.summary()
    alice.kill()
    after = data.summary()
    assert [record.labels for record in after] == [record.labels for record in before]
    assert "alice" not in {record.worker for record in after}


def test_the_table():
    first = ClientSummary("client-000", "alice", 12, {0: 10, 1: 0, 2: 2})
    second = ClientSummary("client-001", "worker-1", 3, {0: 0, 1: 3, 2: 0})
    assert str(Summary((first, second))) == (
        "client      worker    rows   0  1  2\n"
        "client-000  alice       12  10  .  2\n"
        "client-001  worker-1     3   .  3  .\n"
        "all                     15  10  3  2"
    )
    assert repr(Summary((first, second))) == "<Summary: 15 rows of 2 clients>"


def test_a_large_table_says_what_it_leaves_out():
    many = dict.fromkeys(range(30), 1)
    text = str(Summary(tuple(ClientSummary(f"c{n}", "w", 30, many) for n in range(100))))
    lines = text.splitlines()
    assert len(lines) == 1 + 40 + 1 + 1
    assert lines[-2] == "… and 60 more clients"
    assert lines[-1].split() == ["all", "3000", *["100"] * 20, "…"]
    assert {line[-1] for line in itertools.chain(lines[:-2], lines[-1:])} == {"…"}


@pytest.mark.parametrize("clients", [1, 3, 60])
def test_the_picture(cluster, tmp_path, clients):
    data = federate(blobs(120), cluster, clients=clients)
    data.summary().plot(tmp_path / "who.png")
    assert (tmp_path / "who.png").read_bytes().startswith(PNG)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "fedproc.federated.plotting", raising=False)
    summary = Summary((ClientSummary("a", "w", 1, None),))
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'fedproc\[plot\]'"):
        summary.plot(tmp_path / "who.png")
