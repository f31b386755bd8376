"""Workers that die or are late in rounds that any worker may train, and what is left of them."""

import gc
from pathlib import Path

import pytest

from fedproc.cluster.cluster import Cluster
from fedproc.errors import CommandTimeoutError, WorkerLostError
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset
from tests.federated import sharing_worlds as there
from tests.federated.worlds import bits, cross_entropy, dropout_net, shards

pytestmark = pytest.mark.faults

SIZES = list(range(20, 8, -1))  # of twelve clients
PLAIN = there.whole(cross_entropy)


def make(cluster, local, sizes=SIZES, **options):
    data = FederatedDataset(shards(sizes), cluster)
    return Aggregator(dropout_net(), data, local, seed=7, **options)


# ---------------------------------------------------------------- losses in a round


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("rows", [20, 15, 9])
@pytest.mark.parametrize("cores", [1, 3])
def test_a_worker_that_dies_of_a_client_changes_no_bit(tmp_path, monkeypatch, restart, rows, cores):
    there.many_cores(monkeypatch, cores)
    loss = there.Killing(there.noting(tmp_path / "noted").folder, rows)
    with Cluster(3, restart=restart) as cluster:
        aggregator = make(cluster, there.whole(loss))
        history = aggregator.run(3)
        assert Path(f"{loss.folder}-killed").exists()
        assert [record.failures for record in history] == [{}] * 3
        assert sum(worker.alive for worker in cluster) == (3 if restart else 2)
        assert all(aggregator.data.worker_of(c).alive for c in aggregator.data.clients)
    assert bits(aggregator.model) == there.alone(PLAIN, 3, SIZES)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("retries", [0, 1])
def test_the_worker_that_holds_the_rows_dies_while_another_reads_them(
    tmp_path, monkeypatch, restart, retries
):
    """Nobody trains there, so nobody is to blame: even without retries all clients count."""
    there.many_cores(monkeypatch, 1)
    folder = there.noting(tmp_path / "noted").folder
    with Cluster(2, restart=restart) as cluster:
        holder = cluster.workers[1]
        loss = there.Killing(folder, 15, holder.pid)
        aggregator = make(cluster, there.whole(loss), retries=retries)
        history = aggregator.run(2)
        assert holder.exitcode == -9
        assert [record.failures for record in history] == [{}, {}]
    assert bits(aggregator.model) == there.alone(PLAIN, 2, SIZES)


@pytest.mark.parametrize("cores", [1, 3])
def test_without_retries_the_failure_names_the_client(tmp_path, monkeypatch, cores):
    there.many_cores(monkeypatch, cores)
    loss = there.Killing(there.noting(tmp_path / "noted").folder, 15, again=True)
    with Cluster(3) as cluster:
        record = make(cluster, there.whole(loss), retries=0).run_round()
        assert list(record.failures) == ["f"]
        assert isinstance(record.failures["f"], WorkerLostError)
        assert record.accepted == tuple("abcdeghijkl")
        assert sum(worker.alive for worker in cluster) == 2


# ---------------------------------------------------------------- losses between rounds


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("cores", [1, 3])
def test_workers_killed_between_rounds(transport, monkeypatch, restart, cores):
    there.many_cores(monkeypatch, cores)
    with Cluster(3, transport=transport, restart=restart) as cluster:
        aggregator = make(cluster, PLAIN)
        for place in (0, 2):
            aggregator.run(1)
            cluster.workers[place].kill()
        aggregator.run(1)
        assert [record.failures for record in aggregator.history] == [{}] * 3
        found = aggregator.evaluate_clients()
        assert [one.examples for one in found.values()] == SIZES
    assert bits(aggregator.model) == there.alone(PLAIN, 3, SIZES)


@pytest.mark.parametrize("rounds", [0, 1])
@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("restart", [False, True])
def test_a_worker_whose_clients_are_not_drawn_is_lost(
    transport, monkeypatch, rounds, lost, restart
):
    there.many_cores(monkeypatch, 3)
    with Cluster(3, transport=transport, restart=restart) as cluster:
        aggregator = make(cluster, PLAIN, clients_per_round=1)
        aggregator.run(rounds)
        cluster.workers[lost].kill()
        aggregator.run(3)
        assert [record.failures for record in aggregator.history] == [{}] * (rounds + 3)
    assert bits(aggregator.model) == there.alone(PLAIN, rounds + 3, SIZES, clients_per_round=1)


# ---------------------------------------------------------------- the deadline


@pytest.mark.parametrize("restart", [False, True])
def test_others_train_the_clients_of_a_worker_that_is_late(tmp_path, monkeypatch, restart):
    """Only what was submitted behind the endless client is late with it: half of what was left."""
    there.many_cores(monkeypatch, 2)
    flag = tmp_path / "endless"
    loss = there.Endless(there.noting(tmp_path / "noted").folder, 20, flag)
    with Cluster(2, restart=restart) as cluster:
        aggregator = make(cluster, there.whole(loss), deadline=6.0)
        assert aggregator.run_round().failures == {}
        flag.touch()
        late = aggregator.run_round()
        errors = {client: str(error) for client, error in late.failures.items()}
        assert all(isinstance(error, CommandTimeoutError) for error in late.failures.values())
        assert [client for client, text in errors.items() if "still training" in text] == ["a"]
        assert len(late.accepted) >= 9, "six of the other worker, and half of six"
        assert set(late.accepted) | set(errors) == set("abcdefghijkl")
        flag.unlink()
        assert aggregator.run_round().failures == {}
        assert all(worker.alive for worker in cluster)


# ---------------------------------------------------------------- what is left


@pytest.mark.parametrize("options", [{}, {"clients_per_round": 3}, {"deadline": 50}], ids=str)
def test_nothing_is_held_when_aggregator_and_data_are_gone(monkeypatch, options):
    there.many_cores(monkeypatch, 3)
    with Cluster(3) as cluster:
        before = there.arena_use(cluster)
        for _ in range(2):
            aggregator = make(cluster, PLAIN, [9000, 30, 4000, 200], **options)
            aggregator.run(3)
            assert there.arena_use(cluster) != before
            del aggregator
            assert there.poll(lambda: there.arena_use(cluster) == before)
        assert [worker.stats().objects for worker in cluster] == [0, 0, 0]


def arenas_mapped(worker):
    """Shared memory that a process maps, its own and others', each once."""
    lines = Path(f"/proc/{worker.pid}/maps").read_text().splitlines()
    found = (line.split(maxsplit=5) for line in lines if "memfd:fedproc-" in line)
    return len({inode for *_, inode, path in found if "trail" not in path})


def test_the_memory_of_lost_workers_is_let_go(monkeypatch):
    """Whoever read rows there maps the memory of the replacement instead."""
    there.many_cores(monkeypatch, 3)
    with Cluster(3, restart=True) as cluster:
        aggregator = make(cluster, PLAIN)
        aggregator.run(2)
        before = arenas_mapped(cluster.workers[0])
        for _ in range(3):
            cluster.workers[2].kill()
            aggregator.run(2)
        assert aggregator.history[-1].failures == {}
        gc.collect()
        assert there.poll(lambda: arenas_mapped(cluster.workers[0]) <= before)


def test_rows_stay_readable_when_the_aggregator_is_dropped_first(transport, monkeypatch):
    """Others gave up reading them; their own worker did not."""
    there.many_cores(monkeypatch, 3)
    with Cluster(3, transport=transport) as cluster:
        aggregator = make(cluster, PLAIN)
        aggregator.run(1)
        data = aggregator.data
        del aggregator
        gc.collect()
        again = Aggregator(dropout_net(), data, PLAIN, seed=7)
        again.run(2)
        assert data["b"][0].fetch().tolist() == shards(SIZES)["b"][0].tolist()
    assert bits(again.model) == there.alone(PLAIN, 2, SIZES)
