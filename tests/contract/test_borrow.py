"""borrow: zero-copy reading for the length of a block."""

import os
import time

import psutil
import pytest
import torch

import fedproc as fp
from fedproc.remote.link import Link
from fedproc.remote.outbox import Outbox
from fedproc.remote.reading import start
from tests.contract.things import Adder, Counter, each, outcome

MIB = 1 << 20


def _own_memory():
    info = psutil.Process().memory_info()
    return info.rss - info.shared


def test_borrowed_values_are_the_workers(bob, x):
    p = bob.send(x)
    with p.borrow() as t:
        assert isinstance(t, torch.Tensor)
        assert torch.equal(t, x)
    assert torch.equal(p.get(), x)


def test_borrowing_costs_no_memory_here(bob):
    local = torch.ones(8 * MIB)
    p = bob.send(local)
    p.wait()
    del local
    before = _own_memory()
    with p.borrow() as t:
        assert t.sum().item() == 8 * MIB
        grown = _own_memory() - before
    assert grown < 16 * MIB


def test_a_computed_result_can_be_borrowed(bob, x):
    q = bob.send(x) * 2
    for _ in range(2):
        with q.borrow() as t:
            assert t.tolist() == [2.0, 4.0, 6.0]
    q.add_(1)
    with q.borrow() as t:
        assert t.tolist() == [3.0, 5.0, 7.0]


def test_the_borrowed_tensor_is_detached(bob):
    p = bob.send(torch.ones(2, requires_grad=True))
    with p.borrow() as t:
        assert t.requires_grad is False


WRITES = {
    "in-place method": lambda p, c: p.add_(1),
    "item assignment": lambda p, c: p.__setitem__(0, 5.0),
    "run": lambda p, c: p.worker.run(torch.Tensor.add_, p, 1),
    "method of an object": lambda p, c: c.add(1),
    "module call": lambda p, c: p.worker.send(Adder())(p),
}


def test_a_command_that_may_write_waits(bob, x):
    assert each(WRITES, lambda write: _check_write(bob, x, write)) == {}


def _check_write(bob, x, write):
    p, c = bob.send(x), bob.send(Counter())
    with p.borrow() as t:
        result = write(p, c)
        for _ in range(20):
            assert torch.equal(t, x)
            time.sleep(0.001)
    if result is not None:
        result.wait()
    assert torch.equal(p.get(), x) is (write is WRITES["method of an object"])


def test_what_follows_a_waiting_command_waits_too(bob, x):
    p = bob.send(x)
    with p.borrow():
        p.add_(1)
        q = p * 10
        assert not q.done()
    assert q.get().tolist() == [20.0, 30.0, 40.0]


def test_waiting_for_a_held_command_raises_at_once(bob, x):
    p = bob.send(x)
    with p.borrow():
        r = bob.run(torch.ones, 2)
        start = time.monotonic()
        with pytest.raises(fp.FedprocError):
            r.get()
        assert time.monotonic() - start < 2
    assert r.get().tolist() == [1.0, 1.0]


def test_reading_goes_on_inside_the_block(bob, x):
    p = bob.send(x)
    with p.borrow() as t:
        assert (p + 1).fetch().tolist() == [2.0, 3.0, 4.0]
        assert torch.equal(t, x)


def test_other_workers_go_on_inside_the_block(bob, alice, x):
    p = bob.send(x)
    with p.borrow():
        assert alice.run(torch.ones, 2).get().tolist() == [1.0, 1.0]


def test_the_block_keeps_the_object_alive(bob, x):
    with bob.send(x).borrow() as t:
        assert len(bob.objects) == 1
        assert torch.equal(t, x)
    assert len(bob.objects) == 0


def test_a_failed_borrow_names_the_users_line(bob, x):
    bad = bob.send(x).view(7)
    with pytest.raises(fp.RemoteError) as caught, bad.borrow():
        pass
    assert "test_borrow.py" in caught.value.issued_at


def test_an_exception_in_the_block_ends_the_borrow(bob, x):
    p = bob.send(x)
    block = p.borrow()
    block.__enter__()
    p.add_(1)
    block.__exit__(KeyError, KeyError("body"), None)
    assert p.get().tolist() == [2.0, 3.0, 4.0]


def test_after_the_block_the_tensor_reads_or_raises(bob, x):
    p = bob.send(x)
    with p.borrow() as t:
        pass
    p.get()
    bob.run(torch.ones, 100_000).get()
    seen = outcome(lambda: t.sum().item())
    assert isinstance(seen, (float, Exception))


def test_a_moved_tensor_can_be_borrowed(bob, alice, x):
    p = bob.send(x).move(alice)
    with p.borrow() as t:
        assert torch.equal(t, x)


def test_nothing_is_kept_of_what_was_read(bob, x):
    p, reading = bob.send(x), bob.link.outbox.borrows.reading
    for _ in range(3):
        assert torch.equal(p.fetch(), x)
        assert len(fp.gather([p, p + 1])) == 2
        with p.borrow():
            assert len(reading) == 1
    with pytest.raises(fp.RemoteError):
        (p @ torch.ones).fetch()
    assert reading == {}


def test_nothing_is_kept_of_a_borrow_that_an_interrupt_took_away(bob, x):
    p, borrows = bob.send(x), bob.link.outbox.borrows
    borrow = start(bob.link, p._handle, "fetch")
    assert list(borrows.reading) == [borrow.query]
    del borrow  # as an interrupt does
    bob.link.tidy()
    assert borrows.reading == {}
    assert not borrows.orphans
    assert p.add_(1).get().tolist() == [2.0, 3.0, 4.0]


def test_borrowing_again_needs_no_answer(bob, x):
    p = bob.send(x)
    with p.borrow():
        pass
    process = psutil.Process(bob.pid)
    if bob.pid == os.getpid():
        pytest.skip("an inline worker cannot be stopped")
    process.suspend()
    try:
        with p.borrow() as t:
            assert torch.equal(t, x)
    finally:
        process.resume()


def test_what_is_borrowed_again_stays_where_it_is(bob):
    local = torch.arange(100_000.0)
    p = bob.send(local)
    with p.borrow():
        pass
    with p.borrow() as t:
        p.get()
        bob.send(-local).wait()  # would take the place of the object that went home
        assert torch.equal(t, local)
    assert torch.equal(bob.send(local).get(), local)


def test_a_copy_that_was_borrowed_is_not_taken_for_the_tensor(bob):
    whole = bob.run(torch.arange, 100_000)
    part = whole[10:]  # a view: it does not lie in shared memory, so a copy is lent
    for _ in range(3):
        with part.borrow() as t:
            bob.send(torch.zeros(99_990, dtype=torch.int64)).wait()
            assert torch.equal(t, torch.arange(10, 100_000))
    bob.run(abs, 1).get()


REPLACED = {
    "data": lambda p, other: setattr(p, "data", other),
    "set_": lambda p, other: p.set_(other),
    "run": lambda p, other: p.worker.run(torch.Tensor.set_, p, other),
    "copy_": lambda p, other: p.copy_(other),
}


def test_borrowing_again_shows_what_was_put_in_its_place(bob):
    assert each(REPLACED, lambda replace: _check_replaced(bob, replace)) == {}


def _check_replaced(bob, replace):
    p, other = bob.send(torch.ones(5000)), bob.send(torch.full((5000,), 2.0))
    for _ in range(2):
        with p.borrow() as t:
            assert t[0].item() == 1.0
    replace(p, other)
    for _ in range(2):
        with p.borrow() as t:
            assert t[0].item() == 2.0


def test_borrowing_again_asks_whether_it_has_become_private(bob, x):
    p, secret = bob.send(x), bob.send(x, private=True)
    with p.borrow():
        pass
    view = p.expand_as(secret)  # writes nothing, but shares its memory
    with pytest.raises(fp.NotPermittedError), p.borrow():
        pass
    del view


def test_a_write_waits_for_what_is_borrowed_again(bob, x):
    p = bob.send(x)
    with p.borrow():
        pass
    with p.borrow() as t:
        p.add_(1)
        assert torch.equal(t, x)
    assert p.get().tolist() == [2.0, 3.0, 4.0]


def test_memory_borrowed_again_is_given_back(bob):
    p = bob.send(torch.ones(500_000))
    for _ in range(3):
        with p.borrow() as t:
            assert t[-1].item() == 1.0
    del p
    assert bob.stats().arena_bytes < 500_000


def test_what_was_freed_is_not_borrowed_again(bob):
    p = bob.send(torch.ones(50_000), tags="freed")
    (found,) = bob.search("freed")
    with found.borrow():
        pass
    del p
    with pytest.raises(fp.ObjectGoneError), found.borrow():
        pass


def test_a_place_of_another_worker_is_not_borrowed_again(bob, alice, monkeypatch):
    hidden, p = alice.send(torch.zeros(50_000)), bob.send(torch.ones(50_000))
    hidden.wait()
    answer = Link.answer

    def move_meanwhile(link, number, what, timeout=None):
        got = answer(link, number, what, timeout)
        if what == "borrow":
            monkeypatch.setattr(Link, "answer", answer)
            p.move(alice)  # as another thread may
        return got

    monkeypatch.setattr(Link, "answer", move_meanwhile)
    for _ in range(2):
        with p.borrow() as t:
            assert t[0].item() == 1.0


def test_nothing_is_borrowed_again_once_it_is_being_cleared(bob, monkeypatch):
    p = bob.send(torch.ones(50_000))
    with p.borrow():
        pass
    answer = Link.answer

    def borrow_meanwhile(link, number, what, timeout=None):
        if what == "clear":  # as another thread may
            with pytest.raises(fp.ObjectGoneError), p.borrow():
                pass
        return answer(link, number, what, timeout)

    monkeypatch.setattr(Link, "answer", borrow_meanwhile)
    bob.clear()


def test_an_interrupted_borrow_holds_no_memory(bob, monkeypatch):
    p = bob.send(torch.ones(500_000))
    with p.borrow():
        pass
    send = Outbox.send

    def interrupted(outbox, message, site):
        sent = send(outbox, message, site)
        if message.what == "borrow":
            raise KeyboardInterrupt
        return sent

    with monkeypatch.context() as patched:
        patched.setattr(Outbox, "send", interrupted)
        with pytest.raises(KeyboardInterrupt), p.borrow():
            pass
    del p
    bob.stats()  # takes in an answer that nobody waits for
    assert bob.stats().arena_bytes < 500_000


def test_a_worker_that_only_lends_is_idle(bob, x):
    p = bob.send(x)
    for _ in range(2):
        with p.borrow():
            pass
    assert not bob.link.pending()
