"""One thread at a time takes an object away: with get, with move, with a group."""

import os
import threading
from pathlib import Path

import pytest
import torch

import fedproc as fp


def _at_once(*actions):
    """What each action raised, of all that were started together."""
    start, errors = threading.Barrier(len(actions)), []

    def act(action):
        start.wait()
        try:
            action()
        except fp.FedprocError as error:
            errors.append(error)

    threads = [threading.Thread(target=act, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_two_threads_that_move_an_object_leave_one_copy(cluster, alice, bob, carol):
    for number in range(20):
        p = alice.send(torch.full((1000,), float(number)))
        assert _at_once(lambda p=p: p.move(bob), lambda p=p: p.move(carol)) == []
        assert sum(len(worker.objects) for worker in cluster) == 1
        assert p.worker in (bob, carol)
        assert p.get()[0] == number


def test_an_object_is_brought_home_or_moved_and_then_brought_home(cluster, alice, bob):
    for number in range(20):
        p, values = alice.send(torch.full((1000,), float(number))), []
        errors = _at_once(lambda p=p, v=values: v.append(p.get()), lambda p=p: p.move(bob))
        assert values[0][0] == number
        assert {type(error) for error in errors} <= {fp.ObjectGoneError}
        assert not any(worker.objects for worker in cluster)


def test_a_group_brings_home_all_or_none(cluster, alice, bob, gate):
    held = bob.run(gate.hold)
    there = fp.group(alice.send(torch.ones(2)), bob.send(torch.zeros(2)))
    there[1].mul_(2)
    with pytest.raises(fp.CommandTimeoutError):
        there.get(timeout=0.1)
    gate.open()
    held.wait()
    assert [value.tolist() for value in there.get()] == [[1.0, 1.0], [0.0, 0.0]]
    assert not alice.objects


def test_a_member_that_failed_costs_the_others_nothing(cluster, alice, bob):
    there = fp.group(alice.send(torch.ones(2)), bob.run(divmod, 1, 0))
    with pytest.raises(ZeroDivisionError):
        there.get()
    assert there[0].get().tolist() == [1.0, 1.0]


def _inheritable():
    numbers = [int(path.name) for path in Path("/proc/self/fd").iterdir()]
    return [fd for fd in numbers if fd > 2 and _is_inheritable(fd)]


def _is_inheritable(fd):
    try:
        return os.get_inheritable(fd)
    except OSError:  # that of the listing itself
        return False


def test_a_program_that_a_worker_executes_inherits_no_descriptor():
    with fp.Cluster(2) as cluster:
        one, two = cluster
        one.send(torch.ones(9000)).move(two)
        assert one.run(_inheritable).get() == two.run(_inheritable).get() == []


@pytest.mark.parametrize("count", [3, 300_000])
def test_a_default_device_is_for_the_users_own_tensors(cluster, alice, bob, count):
    x = torch.arange(count, dtype=torch.float32)
    torch.set_default_device("meta")  # as "cuda" would
    try:
        there = alice.send(x)
        assert torch.equal(there.fetch(), x)
        assert torch.equal(there.move(bob).get(), x)
    finally:
        torch.set_default_device(None)
