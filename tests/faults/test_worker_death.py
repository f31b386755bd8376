"""A worker dies, at every moment at which it can: cases 1 to 13."""

import os
import signal
import subprocess
import threading

import psutil
import pytest
import torch

import fedproc as fp
from fedproc.memory import pages
from fedproc.remote import ending
from tests.faults.things import (
    CODES,
    DEATHS,
    DiesWhenLoaded,
    cross_entropy,
    ended,
    eventually,
    gradient_step,
    hold,
    make,
    make_garbage,
)
from tests.federated.worlds import bits, dropout_net, sgd, shards

pytestmark = pytest.mark.faults

SIZES = [12, 9, 6, 15, 8, 10]


def test_case_01_killed_while_idle(alice, bob):
    p = bob.send(torch.ones(3))
    p.wait()
    bob.link.process.kill()  # nobody waits for its end, as worker.kill() would
    with pytest.raises(fp.WorkerLostError, match="bob"):
        p.get()
    with pytest.raises(fp.WorkerLostError, match="bob"):
        bob.run(abs, -1)
    assert alice.run(abs, -2).get() == 2


def test_case_02_killed_with_five_hundred_commands_queued(transport, bob, alice, tmp_path):
    gate = tmp_path / "gate"
    bob.run(hold, str(gate))
    # inline workers go in step with the parent: each command waits 50 ms for the one before it
    pending = [bob.run(abs, -n) for n in range(500 if transport == "process" else 5)]
    bob.kill()
    gate.touch()
    outcomes = []
    for pointer in pending:
        with pytest.raises(fp.WorkerLostError) as caught:
            pointer.get()
        outcomes.append(caught.value.last_command)
    assert set(outcomes) == {"hold"}
    assert alice.run(abs, -2).get() == 2


@pytest.mark.parametrize("do", ["kill bytes=7", "kill bytes=23", "cut bytes=7", "eof", "kill"])
def test_case_03_ended_in_the_middle_of_a_reply(transport, fault, do):
    fault(f"in=worker worker=bob on=write frame=Value do={do}")
    with fp.Cluster(["alice", "bob"], transport=transport) as cluster:
        p = cluster["bob"].send(torch.ones(3))
        with pytest.raises(fp.WorkerLostError) as caught:
            p.fetch()
        if transport == "process":
            assert caught.value.exitcode == (-9 if do.startswith("kill") else 0)
        assert "fetch" in str(caught.value.last_command)
        assert cluster["alice"].run(abs, -2).get() == 2


def test_case_04_killed_while_it_reads_a_large_command(transport, fault):
    """The parent has more to write than the socket takes, and nobody reads it."""
    fault("in=worker worker=bob on=read n=2 do=kill")
    with fp.Cluster(["alice", "bob"], transport=transport) as cluster:
        large = bytes(24 << 20)
        with pytest.raises(fp.WorkerLostError):  # in submitting already, or in waiting
            fp.gather([cluster["bob"].run(len, large) for _ in range(3)])
        assert cluster["alice"].run(len, large).get() == len(large)


MOMENTS = {
    "call": lambda bob, how: bob.run(DEATHS[how]),
    "arguments": lambda bob, how: bob.run(id, DiesWhenLoaded(how)),
    "result": lambda bob, how: bob.run(make, "DiesWhenPickled", how),
    "__del__": lambda bob, how: bob.run(make, "DiesWhenFreed", how),
    "collector": lambda bob, how: bob.run(make_garbage, how),
}


@pytest.mark.parametrize("how", DEATHS)
def test_case_05_every_way_to_end_in_every_moment(how, capfd):
    wrong = {}
    with fp.Cluster(["alice", *MOMENTS]) as cluster:
        for moment, act in MOMENTS.items():
            worker = cluster[moment]
            try:
                pointer = act(worker, how)
                if moment == "result":
                    pointer.fetch()
                elif moment == "__del__":
                    del pointer
                    worker.objects  # noqa: B018 - takes the free along
                pointer.wait() if moment not in {"result", "__del__"} else worker.run(abs, -1).get()
                wrong[moment] = "lives"
            except fp.WorkerLostError as error:
                if error.exitcode != CODES[how]:
                    wrong[moment] = error.exitcode
        assert cluster["alice"].run(abs, -2).get() == 2
    assert wrong == {}
    printed = capfd.readouterr().err  # faulthandler tells of a crash; nobody else says anything
    assert "Fatal Python error" in printed if how in {"SIGSEGV", "SIGABRT"} else printed == ""


def test_case_05_death_while_shipped_code_is_imported(tmp_path, monkeypatch):
    (tmp_path / "fedproc_test_fatal.py").write_text("import os\nos._exit(6)\ndef f(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)

    def imports():
        import fedproc_test_fatal  # noqa: F401

    with fp.Cluster(["bob"]) as cluster:
        with pytest.raises(fp.WorkerLostError) as caught:
            cluster["bob"].run(imports).get()
        assert caught.value.exitcode == 6


def test_case_06_a_stopped_worker_misses_the_deadline_and_is_replaced():
    given = shards(SIZES[:2])
    with fp.Cluster(2, restart=True) as cluster:
        data = fp.FederatedDataset(given, cluster)
        aggregator = fp.Aggregator(
            dropout_net(), data, fp.LocalTraining(cross_entropy, sgd), deadline=8.0
        )
        aggregator.run(1)
        stopped = data.worker_of("b")
        os.kill(stopped.pid, signal.SIGSTOP)
        record = aggregator.run_round()
        assert isinstance(record.failures["b"], fp.CommandTimeoutError)
        assert record.accepted == ("a",)
        eventually(lambda: ended(stopped.pid))
        with pytest.raises(ProcessLookupError):
            os.kill(stopped.pid, signal.SIGCONT)  # too late: it is gone
        assert aggregator.run_round().failures == {}


def test_case_07_a_kill_for_lack_of_memory_is_named(tmp_path, monkeypatch):
    """The kernel's counter is injected: making the machine run out would hurt others."""
    counters = tmp_path / "vmstat"
    counters.write_text("nr_free_pages 5\noom_kill 3\nother 1\n")
    count = pages.oom_kills
    monkeypatch.setattr(pages, "oom_kills", lambda: count(counters))
    with fp.Cluster(["alice", "bob", "carol"]) as cluster:
        pointers = {worker.name: worker.run(torch.ones, 2) for worker in cluster}
        cluster.wait()
        os.kill(cluster["alice"].pid, signal.SIGKILL)
        with pytest.raises(fp.WorkerLostError) as plain:
            pointers["alice"].get()
        assert "by SIGKILL. It" in str(plain.value), "memory had nothing to do with it"
        counters.write_text("nr_free_pages 5\noom_kill 4\nother 1\n")
        os.kill(cluster["bob"].pid, signal.SIGKILL)
        with pytest.raises(fp.WorkerLostError) as short:
            pointers["bob"].get()
        assert "by SIGKILL (the kernel has killed 1 process(es) for lack of memory" in str(
            short.value
        )
        assert "memory_limit" in str(short.value)
        assert pointers["carol"].get().tolist() == [1.0, 1.0]
    assert count(tmp_path / "absent") is None
    assert "dmesg" in ending._how(-9, None)


def close_sockets():
    """Close every socket of this process and go on for ever."""
    import stat

    for fd in range(3, 256):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.close(fd)
        except OSError:
            continue
    threading.Event().wait()


def test_case_08_a_worker_that_hangs_up_and_lives_is_ended():
    with fp.Cluster(["alice", "bob"], restart=True) as cluster:
        bob = cluster["bob"]
        with pytest.raises(fp.WorkerLostError) as caught:
            bob.run(close_sockets).get()
        assert "it closed its stream, and its process was ended by SIGKILL" in str(caught.value)
        assert caught.value.exitcode == -9
        assert ended(bob.pid)
        assert cluster["alice"].run(abs, -2).get() == 2
        assert cluster["bob"].run(abs, -3).get() == 3


def test_case_09_two_die_at_once(transport):
    with fp.Cluster(["alice", "bob", "carol"], transport=transport, restart=True) as cluster:
        old = cluster["alice"], cluster["bob"]
        pointers = [worker.send(torch.ones(2)) for worker in cluster]
        for worker in old:
            worker.link.process.kill()
        for pointer in pointers[:2]:
            with pytest.raises(fp.WorkerLostError):
                pointer.get()
        assert pointers[2].get().tolist() == [1.0, 1.0]
        assert [worker.run(abs, -1).get() for worker in cluster] == [1, 1, 1]


def test_case_09_one_dies_while_the_other_is_replaced():
    with fp.Cluster(["alice", "bob", "carol"], restart=True) as cluster:
        alice, bob, carol = cluster
        carol.send(torch.ones(50_000)).move(bob).move(alice)  # everybody has mapped somebody
        bob.kill()
        os.kill(alice.pid, signal.SIGKILL)
        assert cluster["bob"].run(abs, -1).get() == 1  # its replacement tells alice to forget
        eventually(lambda: ended(alice.pid))  # SIGKILL takes its time where memory is unmapped
        assert cluster["alice"].run(abs, -1).get() == 1
        moved = cluster["carol"].send(torch.ones(50_000)).move(cluster["alice"])
        assert moved.sum().item() == 50_000.0


@pytest.mark.parametrize(("victim", "frame"), [("alice", "Export"), ("bob", "Import")])
def test_case_10_death_of_the_source_or_the_destination_of_a_move(transport, fault, victim, frame):
    fault(f"in=worker worker={victim} on=read frame={frame} do=kill")
    with fp.Cluster(["alice", "bob"], transport=transport) as cluster:
        alice, bob = cluster
        p = alice.send(torch.arange(50_000.0))
        p.wait()
        with pytest.raises(fp.WorkerLostError, match=victim):
            p.move(bob)
        if victim == "bob":
            assert torch.equal(p.get(), torch.arange(50_000.0))
            assert alice.stats().arena_bytes == 0, "the exported block is free again"
        else:
            assert bob.run(abs, -2).get() == 2
            assert len(bob.objects) == 0


def undisturbed(rounds):
    with fp.Cluster(1, transport="inline") as cluster:
        aggregator = fp.Aggregator(dropout_net(), fp.FederatedDataset(shards(SIZES), cluster), step)
        aggregator.run(rounds)
        return bits(aggregator.model)


def step(model, x, y, ctx):
    gradient_step(model, x, y)


def from_factory(client):
    return lambda: shards(SIZES)[client]


ROUND_FAULTS = [
    "on=write frame=Value n=2 do=kill",
    "on=write frame=Value n=3 do=kill bytes=30",
    "on=write frame=Value n=2 do=cut bytes=11",
    "on=read frame=Compute n=2 do=kill",
    "on=read frame=Put n=4 do=eof",
    "on=write n=6 do=garbage",
]


# how rows come back does not depend on the way the worker died
@pytest.mark.parametrize(
    ("rule", "recipe"), [*((rule, "rows") for rule in ROUND_FAULTS), (ROUND_FAULTS[1], "factories")]
)
def test_case_11_a_worker_lost_in_a_round_changes_no_bit(transport, fault, rule, recipe):
    fault(f"in=worker worker=worker-1 {rule}")
    with fp.Cluster(3, transport=transport) as cluster:
        fault(None)
        if recipe == "rows":
            data = fp.FederatedDataset(shards(SIZES), cluster)
        else:
            factories = {client: from_factory(client) for client in shards(SIZES)}
            data = fp.FederatedDataset.from_factories(factories, cluster)
        aggregator = fp.Aggregator(dropout_net(), data, step)
        history = aggregator.run(3)
        assert [record.failures for record in history] == [{}, {}, {}]
        assert not cluster["worker-1"].alive, "the fault has struck"
    assert bits(aggregator.model) == undisturbed(3)


def test_case_12_nothing_of_an_old_incarnation_reaches_the_new_one(transport):
    with fp.Cluster(["bob"], transport=transport, restart=True) as cluster:
        stale = [cluster["bob"].send(torch.ones(2)) for _ in range(20)]
        ids = [pointer.id for pointer in stale]
        cluster["bob"].kill()
        fresh = [cluster["bob"].send(torch.full((2,), float(n))) for n in range(20)]
        assert not set(ids) & {pointer.id for pointer in fresh}
        del stale[:10]  # their frees belong to nobody
        for pointer in stale:
            with pytest.raises(fp.WorkerLostError):
                pointer.get()
        cluster.wait()
        assert [pointer.get()[0].item() for pointer in fresh] == [float(n) for n in range(20)]


def start_child():
    return subprocess.Popen(["sleep", "60"]).pid


@pytest.mark.parametrize(
    ("start", "end"), [("fork", "kill"), ("fork", "exit"), ("fork", "close"), ("exec", "kill")]
)
def test_case_13_children_of_a_worker_end_with_it(monkeypatch, end, start):
    if start == "exec":
        monkeypatch.setenv("FEDPROC_START", "exec")
    with fp.Cluster(["bob"]) as cluster:
        bob = cluster["bob"]
        child = bob.run(start_child).get()
        assert psutil.pid_exists(child)
        if end == "kill":
            bob.kill()
            with pytest.raises(fp.WorkerLostError):
                bob.run(abs, -1)
        elif end == "exit":
            with pytest.raises(fp.WorkerLostError):
                bob.run(os._exit, 1).get()
        else:
            cluster.close()
        eventually(lambda: ended(child))


def start_child_and_detached():
    child = subprocess.Popen(["sleep", "60"])
    detached = subprocess.Popen(["sleep", "60"], start_new_session=True)
    return child.pid, detached.pid


def test_case_13_a_child_in_a_session_of_its_own_outlives_its_worker():
    with fp.Cluster(["bob"]) as cluster:
        child, detached = cluster["bob"].run(start_child_and_detached).get()
        cluster.close()
        eventually(lambda: ended(child))
        assert not ended(detached)
        os.kill(detached, signal.SIGKILL)
