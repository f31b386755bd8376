"""Memory of large copies is used again once nobody holds it, and goes back if nobody wants it."""

import gc
import os
import pickle
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

from fedproc.memory import arena, copying, pages, spares
from fedproc.memory.spares import IDLE_SECONDS, IN_USE_SECONDS, SPARES, Spares
from fedproc.worker.upkeep import Upkeep

SIZE = 1 << 18


@pytest.fixture
def kept():
    """What keeps memory, with one user."""
    made = Spares()
    made.open("user")
    return made


def note(tensor):
    """The storage of a tensor, as long as there is one."""
    return weakref.ref(tensor.untyped_storage())


def lives(storage):
    """Whether a noted storage is still there; a failed assertion would print all its bytes."""
    return storage() is not None


def same(tensor, storage):
    return tensor.untyped_storage() is storage()


def later(seconds):
    return time.monotonic() + seconds


# ---------------------------------------------------------------- used again


def test_it_is_used_again_when_the_tensor_is_gone(kept):
    first = kept.take(SIZE).fill_(1)
    storage = note(first)
    other = kept.take(SIZE)
    assert not same(other, storage)
    del first
    assert same(kept.take(SIZE), storage)


def test_only_by_what_has_as_many_bytes(kept):
    storage = note(kept.take(SIZE))
    for nbytes in (SIZE - 1, SIZE + 1):
        assert kept.take(nbytes).untyped_storage().nbytes() == nbytes
    assert not lives(storage)  # it made way for others


def saved_for_backward(tensor):
    leaf = torch.ones(SIZE // 4, requires_grad=True)
    return leaf * tensor.view(torch.float32)


def in_a_cycle(tensor):
    cycle = [tensor]
    cycle.append(cycle)
    return cycle


HOLDERS = {
    "slice": lambda t: t[5:7],
    "detached": lambda t: t.detach(),
    "other dtype": lambda t: t.view(torch.bfloat16),
    "storage": lambda t: t.untyped_storage(),
    "array": lambda t: t.numpy(),
    "view of an array": lambda t: memoryview(t.numpy())[3:],
    "parameter": lambda t: torch.nn.Parameter(t.view(torch.float32)),
    "saved for backward": saved_for_backward,
    "dlpack": torch.utils.dlpack.to_dlpack,
    "cycle": in_a_cycle,
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS.keys())
def test_never_while_anything_holds_it(kept, hold):
    tensor = kept.take(SIZE).fill_(1)
    storage, address = note(tensor), tensor.data_ptr()
    held = hold(tensor)
    del tensor
    others = [kept.take(SIZE).fill_(2) for _ in range(3)]
    assert address not in [other.data_ptr() for other in others]
    del held
    gc.collect()
    assert same(kept.take(SIZE), storage)


def test_gradients_reach_other_threads(kept):
    """The engine runs backward passes in threads of its own, and lets go of what it held."""
    values = kept.take(SIZE).fill_(0).view(torch.float32).add_(3)
    storage = note(values)
    leaf = torch.ones(SIZE // 4, requires_grad=True)
    product = (leaf * values).sum()
    del values
    assert not same(kept.take(SIZE).fill_(9), storage)
    thread = threading.Thread(target=product.backward)
    thread.start()
    thread.join()
    assert (leaf.grad == 3).all()
    del product, thread
    taken = [kept.take(SIZE).untyped_storage() for _ in range(2)]
    assert any(other is storage() for other in taken)


# ---------------------------------------------------------------- ordinary memory


def test_it_is_ordinary(kept):
    kept.take(SIZE)
    tensor = kept.take(SIZE).view(torch.float32).fill_(2)
    assert tensor.untyped_storage().nbytes() == SIZE
    assert tensor.untyped_storage().resizable()
    assert (tensor.is_leaf, tensor.is_shared(), tensor.requires_grad) == (True, False, False)
    tensor.requires_grad_().sum().backward()
    assert (tensor.grad == 1).all()
    assert torch.equal(pickle.loads(pickle.dumps(tensor)), tensor)
    assert tensor.detach().numpy().flags.writeable


CHANGES = {
    "larger": lambda t: t.resize_(2 * SIZE),
    "storage larger": lambda t: t.untyped_storage().resize_(2 * SIZE),
    "storage empty": lambda t: t.untyped_storage().resize_(0),
    "shared": lambda t: t.share_memory_(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_a_user_has_changed_is_not_used_again(kept, change):
    tensor = kept.take(SIZE).fill_(3)
    change(tensor)
    storage = note(tensor)
    del tensor
    new = kept.take(SIZE)
    assert new.untyped_storage().nbytes() == SIZE
    assert not new.is_shared()
    assert not lives(storage)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_has_a_copy_and_keeps_nothing():
    SPARES.open("user")
    try:
        tensor = SPARES.take(SIZE).fill_(1)
        storage = note(SPARES.take(SIZE))
        assert lives(storage)
        pid = os.fork()
        if pid == 0:
            tensor[:10] = 2  # torch's threads are not here: no more than one can do
            os._exit(1 if lives(storage) else 0)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert (tensor == 1).all()
        assert lives(storage)
    finally:
        SPARES.close("user")


# ---------------------------------------------------------------- given back


def test_what_is_not_used_goes_back(kept):
    tensor = kept.take(SIZE)
    storage = note(tensor)
    kept.collect(later(IDLE_SECONDS))
    del tensor
    kept.collect()  # finds that it is free
    assert lives(storage)
    kept.collect(later(IDLE_SECONDS - 1))
    assert lives(storage)
    kept.collect(later(IDLE_SECONDS))
    assert not lives(storage)


def test_what_is_used_in_between_stays(kept):
    storage = note(kept.take(SIZE))
    kept.collect()
    time.sleep(0.01)
    assert same(kept.take(SIZE), storage)
    kept.collect(later(IDLE_SECONDS - 0.005))
    assert lives(storage)


def test_the_rest_goes_back_though_some_is_used_all_the_time(kept, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(spares, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    storages = [note(tensor) for tensor in [kept.take(SIZE) for _ in range(9)]]
    held = None
    for second in range(46):
        clock[0] = float(second)
        if second % 15 == 0:
            kept.collect()
        held = kept.take(SIZE)
        kept.take(SIZE)
    assert held is not None
    assert sum(map(lives, storages)) <= 3


def test_what_is_held_for_long_ends_with_its_holder(kept):
    tensor = kept.take(SIZE)
    storage = note(tensor)
    kept.collect(later(IN_USE_SECONDS))
    assert (tensor.fill_(4) == 4).all()
    del tensor
    assert not lives(storage)


def test_new_memory_is_made_after_as_much_was_let_go(kept):
    storages = [note(tensor) for tensor in [kept.take(SIZE), kept.take(2 * SIZE)]]
    kept.take(2 * SIZE)  # found free later than the first
    kept.take(SIZE // 2)
    assert [*map(lives, storages)] == [False, True]


def test_not_more_than_the_machine_can_spare(kept, monkeypatch):
    monkeypatch.setattr(pages, "machine_room_bytes", lambda: 9 * SIZE)
    storages = [note(tensor) for tensor in [kept.take(SIZE) for _ in range(3)]]
    assert [*map(lives, storages)] == [True, True, False]


def test_nothing_is_kept_before_the_first_and_after_the_last_user():
    kept = Spares()
    storage = note(kept.take(SIZE))
    assert not lives(storage)
    kept.open("one")
    kept.open("two")
    tensor, storage = kept.take(SIZE).fill_(5), note(kept.take(SIZE))
    kept.close("one")
    assert lives(storage)
    kept.close("two")
    assert not lives(storage)
    assert (tensor == 5).all()
    storage = note(tensor)
    del tensor
    assert not lives(storage)


def test_a_worker_gives_it_back_when_nothing_happens(monkeypatch):
    monkeypatch.setattr(spares, "IDLE_SECONDS", -1.0)
    SPARES.open("worker")
    memory = arena.Arena("test", 1 << 24)
    try:
        upkeep, storage = Upkeep(memory), note(copying.fresh(copying.SIDE_BY_SIDE_BYTES))
        assert lives(storage)
        upkeep.look(busy=False)
        assert not lives(storage)
    finally:
        memory.close()
        SPARES.close("worker")


# ---------------------------------------------------------------- at any moment


def test_a_finalizer_may_ask_for_memory(kept):
    """In the middle of a request, where a lock would be taken already."""
    taken = []

    class Asking:
        def __del__(self):
            taken.append(kept.take(SIZE).fill_(1))

    for _ in range(3):
        cycle = [Asking(), kept.take(SIZE)]
        cycle.append(cycle)
        del cycle
        threshold = gc.get_threshold()
        gc.set_threshold(1)
        held = [kept.take(SIZE).fill_(2) for _ in range(2)]
        gc.set_threshold(*threshold)
        gc.collect()
        assert all((tensor == 2).all() for tensor in held)
        assert len(taken) == 1
        assert (taken.pop() == 1).all()


def test_threads_never_get_the_same(kept):
    wrong = []

    def work(number):
        for _ in range(300):
            tensors = [kept.take(4096).fill_(number) for _ in range(3)]
            time.sleep(0)
            if not all((tensor == number).all() for tensor in tensors):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        kept.collect()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_used_again_where_holders_cannot_be_counted(kept, monkeypatch):
    spares.counts_holders.cache_clear()
    monkeypatch.setattr(torch._C, "_storage_Use_Count", lambda _: 1)
    monkeypatch.setattr(spares.sys, "getrefcount", lambda _: 2)
    try:
        storage = note(kept.take(SIZE))
        assert not lives(storage)
    finally:
        spares.counts_holders.cache_clear()
