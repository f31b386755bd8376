"""The same operation on several workers at once; gather and as_completed."""

import pytest
import torch
from torch import nn

import fedproc as fp
from tests.contract.things import fail, fail_late


@pytest.fixture
def group(bob, alice):
    return fp.group(bob.send(torch.tensor([1.0, 2.0])), alice.send(torch.tensor([10.0, 20.0])))


def _values(group):
    return [p.tolist() for p in group]


def test_cluster_send_puts_a_copy_on_every_worker(cluster, x):
    g = cluster.send(x)
    assert isinstance(g, fp.PointerGroup)
    assert len(g) == 3
    assert [p.worker for p in g] == list(cluster)
    assert [len(worker.objects) for worker in cluster] == [1, 1, 1]
    values = g.get()
    assert isinstance(values, list)
    assert all(torch.equal(value, x) for value in values)
    assert [len(worker.objects) for worker in cluster] == [0, 0, 0]


def test_members(group, bob, alice):
    assert len(group) == 2
    assert group[0].worker is bob
    assert [p.worker for p in group] == [bob, alice]
    assert isinstance(group[1], fp.TensorPointer)


def test_a_method_stays_a_group(group):
    total = group.sum()
    assert isinstance(total, fp.PointerGroup)
    assert [value.item() for value in total.get()] == [3.0, 30.0]


def test_operators_with_numbers(group):
    assert _values(group + 1) == [[2.0, 3.0], [11.0, 21.0]]
    assert _values(2 * group) == [[2.0, 4.0], [20.0, 40.0]]


def test_group_with_group_goes_worker_by_worker(group, bob, alice):
    other = fp.group(alice.send(torch.tensor([1.0, 1.0])), bob.send(torch.tensor([5.0, 5.0])))
    added = group + other
    assert {p.worker.name: p.tolist() for p in added} == {
        "bob": [6.0, 7.0],
        "alice": [11.0, 21.0],
    }


def test_in_place_methods_change_every_member(group):
    p = group[0]
    group.add_(1)
    assert p.tolist() == [2.0, 3.0]
    assert _values(group) == [[2.0, 3.0], [11.0, 21.0]]


def test_a_group_of_other_workers_is_refused(group, bob, carol, x):
    other = fp.group(bob.send(x), carol.send(x))
    with pytest.raises(fp.PlacementError):
        group + other


def test_a_plain_pointer_or_local_tensor_is_refused(group, bob):
    for stranger in (bob.send(torch.ones(2)), torch.ones(2)):
        with pytest.raises(fp.PlacementError):
            group + stranger
    assert _values(group) == [[1.0, 2.0], [10.0, 20.0]]


def test_the_same_worker_twice_is_a_value_error(bob, x):
    p, q = bob.send(x), bob.send(x)
    with pytest.raises(ValueError, match="bob"):
        fp.group(p, q)
    assert torch.equal((p + q).get(), 2 * x)


def test_modules_in_groups(cluster, x):
    torch.manual_seed(0)
    local = nn.Linear(3, 1)
    out = cluster.send(local)(cluster.send(x))
    assert all(torch.equal(value, local(x).detach()) for value in out.get())


def test_members_work_at_once(transport, gate):
    with fp.Cluster(["alice", "bob"], transport=transport) as cluster:
        alice, bob = cluster
        held = bob.run(gate.hold, 1)
        g = fp.group(bob.run(torch.ones, 1), alice.run(torch.ones, 1)) * 2
        assert g[1].tolist() == [2.0]
        assert not g[0].done()
        gate.open()
        assert g[0].tolist() == [2.0]
        held.wait()


def test_gather_fetches(bob, alice, x):
    pointers = [bob.send(x), alice.send(x + 1), bob.send({"a": 1})]
    values = fp.gather(pointers)
    assert isinstance(values, list)
    assert torch.equal(values[0], x)
    assert torch.equal(values[1], x + 1)
    assert values[2] == {"a": 1}
    assert (len(bob.objects), len(alice.objects)) == (2, 1)


def test_gather_of_nothing_is_empty():
    assert fp.gather([]) == []


def test_gather_takes_a_group(cluster, x):
    assert [value.tolist() for value in fp.gather(cluster.send(x))] == [[1.0, 2.0, 3.0]] * 3


def test_gather_raises_the_first_error_in_argument_order(bob, alice, carol):
    second = alice.run(fail, "second")
    first = bob.run(fail_late, "first")
    with pytest.raises(ValueError, match="first"):
        fp.gather([carol.run(abs, -1), first, second])
    with pytest.raises(ValueError, match="second"):
        second.get()


def test_gather_waits_for_all_before_it_raises(bob, alice, gate, tmp_path):
    bad = bob.run(fail, "bad")
    slow = alice.run(gate.hold, 3)

    import threading

    opener = threading.Timer(0.1, gate.open)
    opener.start()
    with pytest.raises(ValueError, match="bad"):
        fp.gather([bad, slow])
    assert slow.done()
    opener.join()
    assert slow.get() == 3


def test_as_completed_yields_in_order_of_completion(transport, gate):
    with fp.Cluster(["alice", "bob"], transport=transport) as cluster:
        slow, fast = cluster["bob"].run(gate.hold, 1), cluster["alice"].run(abs, -2)
        done = fp.as_completed([slow, fast])
        assert next(done) is fast
        gate.open()
        assert next(done) is slow
        assert list(done) == []
        assert (slow.get(), fast.get()) == (1, 2)


def test_as_completed_yields_failed_ones_too(bob, alice):
    good, bad = bob.run(abs, -1), alice.run(fail, "bad")
    assert {p.id for p in fp.as_completed([good, bad])} == {good.id, bad.id}
    with pytest.raises(ValueError, match="bad"):
        bad.get()
    assert good.get() == 1


def test_as_completed_has_a_timeout(bob, gate):
    slow = bob.run(gate.hold, 1)
    with pytest.raises(fp.CommandTimeoutError):
        list(fp.as_completed([slow], timeout=0.05))
    gate.open()
    assert slow.get() == 1


def test_gather_goes_one_by_one_where_all_at_once_have_no_room(transport):
    with fp.Cluster(["bob"], transport=transport, memory_limit=1 << 20) as cluster:
        bob = cluster["bob"]
        # on bob's heap: only what is on its way home takes shared memory, 400 kB each
        pointers = [bob.run(torch.full, (100_000,), float(n)) for n in range(4)]
        assert [int(value[-1]) for value in fp.gather(pointers)] == [0, 1, 2, 3]
        pointers.append(bob.run(torch.zeros, 300_000))
        with pytest.raises(fp.ArenaFullError):
            fp.gather(pointers)


def test_gather_gives_exceptions_that_are_values(bob):
    (value,) = fp.gather([bob.send(KeyError("a"))])
    assert repr(value) == "KeyError('a')"
