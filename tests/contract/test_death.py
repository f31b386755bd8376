"""A worker dies: its pointers say so at once, the others go on."""

import os
import signal
import sys
import time

import psutil
import pytest
import torch

import fedproc as fp
from tests.contract.things import die, eventually, signal_self


def test_kill_makes_a_worker_lost(bob, alice, x):
    p, q = bob.send(x), alice.send(x)
    p.wait()
    bob.kill()
    eventually(lambda: not bob.alive)
    for use in (p.get, p.fetch, lambda: (p + 1).get(), lambda: p.move(alice).get()):
        with pytest.raises(fp.WorkerLostError, match="bob"):
            use()
    assert torch.equal((q + 1).get(), x + 1)
    assert alice.alive is True


def test_new_work_for_a_dead_worker_is_refused(bob, x):
    bob.kill()
    for use in (lambda: bob.send(x).get(), lambda: bob.run(abs, -1).get(), lambda: bob.objects):
        with pytest.raises(fp.WorkerLostError):
            use()


def test_pending_commands_fail_promptly(bob, alice, gate):
    r = bob.run(gate.hold, 1)
    later = bob.run(abs, -1)
    start = time.monotonic()
    bob.kill()
    for pending in (r, later):
        with pytest.raises(fp.WorkerLostError) as caught:
            pending.get()
        assert caught.value.worker == "bob"
    assert time.monotonic() - start < 5
    gate.open()
    assert alice.run(abs, -2).get() == 2


def test_inline_death_has_no_exitcode():
    with fp.Cluster(["bob"], transport="inline") as cluster:
        bob = cluster["bob"]
        bob.kill()
        assert bob.alive is False
        assert bob.exitcode is None


def test_a_killed_process_shows_its_signal():
    with fp.Cluster(["alice", "bob"]) as cluster:
        bob = cluster["bob"]
        p = bob.run(torch.ones, 2)
        p.wait()
        pid = bob.pid
        bob.kill()
        with pytest.raises(fp.WorkerLostError, match="bob") as caught:
            p.get()
        error = caught.value
        assert (error.worker, error.exitcode, error.signal) == ("bob", -9, signal.SIGKILL)
        assert isinstance(error.signal, signal.Signals)
        assert bob.exitcode == -9
        assert bob.pid == pid
        eventually(lambda: not psutil.pid_exists(pid))
        assert cluster["alice"].run(abs, -1).get() == 1


def test_a_process_that_ends_itself_shows_how():
    with fp.Cluster(["alice", "bob"]) as cluster:
        for name, function, argument in (
            ("bob", die, 3),
            ("alice", signal_self, signal.SIGTERM),
        ):
            bad = cluster[name].run(function, argument)
            with pytest.raises(fp.WorkerLostError, match=name) as caught:
                bad.get()
            error = caught.value
            if name == "bob":
                assert (error.exitcode, error.signal) == (3, None)
                assert error.last_command
            else:
                assert (error.exitcode, error.signal) == (-15, signal.SIGTERM)
            assert cluster[name].exitcode == error.exitcode


def test_dropping_handles_of_a_dead_worker_is_silent(bob, x, capfd):
    held = [bob.send(x) for _ in range(3)]
    bob.kill()
    eventually(lambda: not bob.alive)
    del held
    assert capfd.readouterr().err == ""


def test_a_restarted_worker_is_new_and_empty(transport, x):
    with fp.Cluster(["alice", "bob"], transport=transport, restart=True) as cluster:
        old = cluster["bob"]
        p, q = old.send(x), cluster["alice"].send(x)
        p.wait()
        old.kill()
        with pytest.raises(fp.WorkerLostError):
            p.get()
        eventually(lambda: cluster["bob"] is not old)
        new = cluster["bob"]
        assert new.name == "bob"
        assert (new.alive, old.alive) == (True, False)
        assert len(new.objects) == 0
        for use in (p.get, lambda: (p + 1).get(), lambda: old.send(x).get()):
            with pytest.raises(fp.WorkerLostError):
                use()
        r = new.send(x + 1)
        with pytest.raises((fp.WorkerLostError, fp.PlacementError)):
            (r + p).get()
        assert torch.equal(r.get(), x + 1)
        assert torch.equal(q.get(), x)
        assert [worker.name for worker in cluster] == ["alice", "bob"]
        assert cluster.workers[1] is new


def test_without_restart_the_dead_worker_stays(cluster, bob):
    bob.kill()
    eventually(lambda: not bob.alive)
    assert cluster["bob"] is bob


def test_map_raises_when_a_workerdies():
    with (
        fp.Cluster(1) as cluster,
        pytest.raises(fp.WorkerLostError),
    ):
        cluster.map(die, [1, 2])


def test_map_leaves_out_a_worker_that_is_dead(cluster, bob):
    bob.kill()
    assert cluster.map(abs, [-1, 2, -3]) == [1, 2, 3]


def test_map_raises_when_no_worker_is_alive(cluster):
    for worker in cluster:
        worker.kill()
    with pytest.raises(fp.WorkerLostError):
        cluster.map(abs, [1])


def test_gather_raises_for_a_lost_worker(bob, alice, x):
    p, q = alice.send(x), bob.send(x)
    q.wait()
    bob.kill()
    with pytest.raises(fp.WorkerLostError):
        fp.gather([p, q])
    assert torch.equal(p.get(), x)


def exit_at_once():
    os._exit(3)


@pytest.mark.parametrize("before", [0, 1, 5])
def test_what_was_done_but_not_told_is_not_blamed(x, before):
    with fp.Cluster(["bob"]) as cluster:
        bob = cluster["bob"]
        sent = bob.send(x)
        for _ in range(before):
            sent = sent + 1
        with pytest.raises(fp.WorkerLostError) as caught:
            bob.run(exit_at_once).get()
    assert caught.value.last_command == "exit_at_once"
    assert "first `exit_at_once`" in str(caught.value)


def fork_and_come_back():
    if os.fork() == 0:
        return "child"
    os.wait()
    return "parent"


def fork_and_exit():
    if os.fork() == 0:
        sys.exit(3)
    return os.waitstatus_to_exitcode(os.wait()[1])


def test_a_forked_process_that_comes_back_from_a_command_ends(bob):
    assert [bob.run(fork_and_exit).get() for _ in range(3)] == [3, 3, 3]
    assert [bob.run(fork_and_come_back).get() for _ in range(3)] == ["parent"] * 3
    assert [bob.run(pow, n, 2).get() for n in range(100)] == [n * n for n in range(100)]


def fail():
    raise ValueError("nobody looked")


def test_an_error_that_nobody_saw_outlives_its_worker():
    def use():
        with fp.Cluster(["bob"], restart=True) as cluster:
            cluster["bob"].run(fail)
            cluster["bob"].run(abs, -1).wait()
            cluster["bob"].kill()
            assert cluster["bob"].run(abs, -2).get() == 2

    with pytest.raises(ValueError, match="nobody looked"):
        use()


def test_an_error_that_somebody_saw_is_not_raised_again_after_a_replacement():
    with fp.Cluster(["bob"], restart=True) as cluster:
        with pytest.raises(ValueError, match="nobody looked"):
            cluster["bob"].run(fail).get()
        cluster["bob"].run(fail)
        cluster["bob"].run(abs, -1).wait()
        cluster["bob"].kill()
        cluster["bob"].run(abs, -2).wait()
        with pytest.raises(ValueError, match="nobody looked"):
            cluster.wait()
        cluster.wait()
