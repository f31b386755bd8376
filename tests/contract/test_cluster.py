"""Cluster life: names, order, run, map, wait, close."""

import os
import time
from pathlib import Path

import psutil
import pytest
import torch

import fedproc as fp
from tests.contract.things import fill


def test_iterates_in_the_order_given(cluster, alice, bob, carol):
    assert list(cluster) == [alice, bob, carol]
    assert [worker.name for worker in cluster] == ["alice", "bob", "carol"]


def test_workers_is_a_tuple(cluster, alice, bob, carol):
    assert cluster.workers == (alice, bob, carol)
    assert type(cluster.workers) is tuple


def test_looks_up_by_name(cluster, bob):
    assert cluster["bob"] is bob
    assert len(cluster) == 3
    assert "bob" in cluster
    assert "nobody" not in cluster


def test_unknown_worker_is_named(cluster):
    with pytest.raises(fp.WorkerNotFoundError, match="nobody") as caught:
        cluster["nobody"]
    assert isinstance(caught.value, KeyError)


def test_a_number_names_the_workers(transport):
    with fp.Cluster(2, transport=transport) as cluster:
        assert [worker.name for worker in cluster] == ["worker-0", "worker-1"]


def test_default_is_one_worker_per_usable_core():
    with fp.Cluster(transport="inline") as cluster:
        assert len(cluster) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("workers", [[], 0, -1, ["bob", "bob"]], ids=str)
def test_impossible_workers_are_refused(workers, transport):
    with pytest.raises(ValueError, match=r"\w{3}"):
        fp.Cluster(workers, transport=transport)


def test_usable_without_with(transport, x):
    cluster = fp.Cluster(["bob"], transport=transport)
    try:
        assert torch.equal(cluster["bob"].send(x).get(), x)
    finally:
        cluster.close()


def test_close_twice_is_fine(transport):
    cluster = fp.Cluster(["bob"], transport=transport)
    cluster.close()
    cluster.close()
    assert cluster.workers[0].alive is False


def test_processes_are_gone_after_close():
    with fp.Cluster(2) as cluster:
        pids = [worker.pid for worker in cluster]
        assert all(psutil.pid_exists(pid) for pid in pids)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_run_gives_one_pointer_per_worker(cluster):
    pointers = cluster.run(fill, 2, 7)
    assert isinstance(pointers, list)
    assert [p.worker for p in pointers] == list(cluster)
    assert [p.get().tolist() for p in pointers] == [[7.0, 7.0]] * 3


def test_run_reaches_every_process():
    with fp.Cluster(2) as cluster:
        pids = [p.get() for p in cluster.run(os.getpid)]
        assert pids == [worker.pid for worker in cluster]
        assert len({*pids, os.getpid()}) == 3


def test_map_keeps_the_order_of_items(cluster):
    assert cluster.map(lambda n: n * n, range(10)) == [0, 1, 4, 9, 16, 25, 36, 49, 64, 81]


def test_map_gives_values_and_leaves_nothing(cluster):
    results = cluster.map(torch.zeros, [1, 2])
    assert isinstance(results, list)
    assert [type(r) for r in results] == [torch.Tensor] * 2
    assert [len(r) for r in results] == [1, 2]
    assert [len(worker.objects) for worker in cluster] == [0, 0, 0]


def test_map_of_nothing_is_empty(cluster):
    assert cluster.map(abs, []) == []


def test_map_deals_to_idle_workers(gate):
    hold = gate.hold

    def job(item):
        if item == 0:
            hold()
        if item == 8:
            Path(release).touch()
        return os.getpid()

    release = str(gate._path)
    with fp.Cluster(2) as cluster:
        pids = cluster.map(job, range(9))
    assert pids.count(pids[0]) == 1


def test_map_raises_the_error_of_an_item(cluster):
    with pytest.raises(ZeroDivisionError):
        cluster.map(lambda n: 1 / n, [1, 0, 2])
    assert cluster.map(abs, [-1]) == [1]


def test_wait_means_all_work_is_done(cluster, bob, alice, tmp_path):
    def leave_a_mark(path):
        time.sleep(0.1)
        Path(path).touch()

    marks = [tmp_path / "bob", tmp_path / "alice"]
    held = [bob.run(leave_a_mark, str(marks[0])), alice.run(leave_a_mark, str(marks[1]))]
    cluster.wait()
    assert all(mark.exists() for mark in marks)
    assert all(p.done() for p in held)


def test_wait_with_nothing_to_do_returns(cluster):
    cluster.wait()


def test_wait_with_a_timeout_can_be_repeated(cluster, bob, gate):
    held = bob.run(gate.hold, 5)
    with pytest.raises(fp.CommandTimeoutError):
        cluster.wait(timeout=0.05)
    gate.open()
    cluster.wait()
    assert held.get() == 5


def _submit_slowly(worker, mark):
    """About six seconds of work; the mark is its very end."""
    held = [worker.run(time.sleep, 0.3) for _ in range(20)]
    return [*held, worker.run(Path.touch, mark)]


def test_normal_exit_waits_for_submitted_work(transport, tmp_path):
    mark = tmp_path / "mark"
    with fp.Cluster(["bob"], transport=transport) as cluster:
        slow = cluster["bob"].run(time.sleep, 0.2)
        late = cluster["bob"].run(Path.touch, mark)
    assert mark.exists()
    del slow, late


def test_close_does_not_wait_for_submitted_work(transport, tmp_path):
    mark = tmp_path / "mark"
    cluster = fp.Cluster(["bob"], transport=transport)
    held = _submit_slowly(cluster["bob"], mark)
    cluster.close()
    assert not mark.exists()
    del held


def test_exit_by_exception_does_not_wait(transport, tmp_path):
    mark = tmp_path / "mark"
    held = []

    def body():
        with fp.Cluster(["bob"], transport=transport) as cluster:
            held.extend(_submit_slowly(cluster["bob"], mark))
            raise KeyError("body")

    with pytest.raises(KeyError, match="body"):
        body()
    assert not mark.exists()


def test_messages_counts_command_frames(cluster, bob, x):
    p = bob.send(x)
    before = cluster.messages
    q = p + 1
    assert cluster.messages == before + 1
    q.get()
    with pytest.raises(AttributeError):
        cluster.messages = 0


def test_transports_are_equal_to_the_last_bit():
    def work(worker):
        torch_result = worker.run(torch.rand, 5)
        return (torch_result @ torch_result.exp()).get()

    results = []
    for transport in ("process", "inline"):
        with fp.Cluster(["bob"], transport=transport) as cluster:
            results.append(work(cluster["bob"]))
    assert torch.equal(*results)
