"""move: exactly one copy, on the other worker; every handle follows."""

import contextlib
import threading
import warnings

import pytest
import torch
from torch import nn

import fedproc as fp


def test_move_returns_the_same_handle(bob, alice, x):
    p = bob.send(x)
    assert p.move(alice) is p
    assert p.worker is alice
    assert torch.equal(p.get(), x)


def test_exactly_one_copy_is_left(bob, alice, x):
    p = bob.send(x)
    p.move(alice)
    assert (len(bob.objects), len(alice.objects)) == (0, 1)
    del p
    assert (len(bob.objects), len(alice.objects)) == (0, 0)


def test_other_handles_follow(bob, alice, x):
    p = bob.send(x, tags="a")
    same = bob.run(lambda t: t, p)
    (found,) = bob.search("a")
    same.wait()
    p.move(alice)
    for handle in (same, found):
        assert handle.worker is alice
        assert torch.equal(handle.fetch(), x)
    del p, found
    assert len(alice.objects) == 1
    del same
    assert len(alice.objects) == 0


def test_moving_to_where_it_is_does_nothing(bob, x):
    p = bob.send(x)
    before = p.id
    assert p.move(bob) is p
    assert (p.worker, p.id) == (bob, before)
    assert len(bob.objects) == 1
    assert torch.equal(p.get(), x)


def test_results_move(bob, alice, x):
    p = bob.send(x)
    y = (p + p).move(alice)
    assert torch.equal(y.get(), 2 * x)
    assert torch.equal(p.get(), x)


def test_a_moved_tensor_works_with_its_new_neighbours(bob, alice, x):
    p, q = bob.send(x), alice.send(x)
    p.move(alice)
    assert torch.equal((p + q).get(), 2 * x)
    p.add_(1)
    assert torch.equal(p.get(), x + 1)


def test_there_and_back_again(bob, alice, carol, x):
    p = bob.send(x)
    for worker in (alice, carol, bob, alice, bob):
        p.move(worker)
    assert [len(w.objects) for w in (alice, carol, bob)] == [0, 0, 1]
    assert torch.equal(p.get(), x)


def test_large_tensors_move_exactly(bob, alice):
    p = bob.run(torch.arange, 1_000_000)
    assert torch.equal(p.move(alice).get(), torch.arange(1_000_000))


def test_any_object_moves(bob, alice):
    p = bob.send({"a": [1, 2]})
    p.move(alice)
    assert (len(bob.objects), len(alice.objects)) == (0, 1)
    assert p.get() == {"a": [1, 2]}


def test_tags_travel(bob, alice, x):
    p = bob.send(x, tags="a", description="wandering")
    p.move(alice)
    assert len(list(bob.search("a"))) == 0
    assert len(list(alice.search("a"))) == 1
    assert alice.objects[p.id].description == "wandering"


def test_a_leaf_moves_with_its_gradient_without_warning(bob, alice):
    p = bob.send(torch.ones(2, requires_grad=True))
    (p * 3).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p.move(alice)
    assert (p.is_leaf, p.requires_grad) == (True, True)
    assert p.grad.fetch().tolist() == [3.0, 3.0]
    back = p.get()
    assert back.requires_grad
    assert back.grad.tolist() == [3.0, 3.0]


def test_moving_a_non_leaf_warns_that_the_graph_is_cut(bob, alice):
    p = bob.send(torch.ones(2, requires_grad=True))
    y = p * 2
    with pytest.warns(UserWarning, match="graph|history"):
        y.move(alice)
    assert y.fetch().tolist() == [2.0, 2.0]
    assert y.is_leaf is True


def test_modules_move(bob, alice):
    local = nn.Linear(2, 1)
    m = bob.send(local)
    m.move(alice)
    x = alice.send(torch.ones(1, 2))
    assert torch.equal(m(x).get(), local(torch.ones(1, 2)).detach())
    assert len(bob.objects) == 0


def test_moving_a_failed_result_raises_its_error(bob, alice, x):
    bad = bob.send(x).view(7)
    with pytest.raises(RuntimeError):
        bad.move(alice).get()
    assert len(alice.objects) == 0


def test_moving_a_gone_object_is_an_error(bob, alice, x):
    p = bob.send(x)
    p.get()
    with pytest.raises(fp.ObjectGoneError):
        p.move(alice)


def test_a_move_refused_in_a_borrow_leaves_nothing_behind(bob, alice, x):
    p, lent = bob.send(x), alice.send(x)
    with lent.borrow():
        lent.add_(1)  # waits for the end of the block, and so would the move
        with pytest.raises(fp.FedprocError, match="for ever"):
            p.move(alice)
    assert (len(bob.objects), len(alice.objects)) == (1, 1)
    assert torch.equal(p.move(alice).get(), x)


def test_no_write_of_another_thread_is_lost_silently(bob, alice):
    """It is done before the move or after it, or fails: what stayed behind is not written to."""
    p, accepted = bob.send(torch.zeros(1)), []

    def add():
        for _ in range(2000):
            with contextlib.suppress(fp.ObjectGoneError):
                p.add_(1)
                accepted.append(1)

    thread = threading.Thread(target=add)
    thread.start()
    while thread.is_alive():
        p.move(alice if p.worker is bob else bob)
    thread.join()
    value, failed = p.item(), 0  # asked first: all that was issued is done by then
    for worker in (bob, alice):
        worker.run(abs, 1).wait()
        for _, raise_it in list(worker.link.unseen()):
            with pytest.raises(fp.ObjectGoneError):
                raise_it()
            failed += 1
    assert value + failed == len(accepted)
