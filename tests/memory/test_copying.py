"""Copies side by side: nothing is lost in a thread."""

import math
import os
import signal
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from fedproc.client.seeding import torch_threads
from fedproc.memory import copying, helpers
from fedproc.memory.copying import same_bits

COUNT = 2 * copying.SIDE_BY_SIDE_BYTES + 5
PAST = copying.PAST_CACHES_BYTES
needs_compiled = pytest.mark.skipif(not copying.COMPILED, reason="the compiled copy was not built")


@pytest.fixture
def threads_of_torch(request):
    """As many as the test asks for; one, if it does not."""
    count = getattr(request, "param", 1)
    with torch_threads(count):
        yield count


in_one_thread = pytest.mark.usefixtures("threads_of_torch")
in_threads = pytest.mark.parametrize("threads_of_torch", [1, 2, 5], indirect=True)


@in_threads
@pytest.mark.parametrize("inference", [False, True])
def test_every_byte_is_copied(threads_of_torch, inference):
    source = torch.arange(COUNT, dtype=torch.uint8)
    with torch.inference_mode(inference):
        target = copying.fresh(COUNT)
        copying.copy_bytes(target, source)
    assert torch.equal(target, source)


@needs_compiled
@in_threads
@pytest.mark.parametrize("offset", [0, 1, 15, 63])
@pytest.mark.parametrize("count", [PAST - 1, PAST, PAST + 1, PAST + 2 * copying.PIECE_BYTES + 77])
def test_many_bytes_are_copied_past_the_caches(threads_of_torch, monkeypatch, count, offset):
    counts, copy, has_threads = [], copying._copy.copy, copying._copy.HAS_THREADS

    class Counting:
        HAS_THREADS = has_threads

        @staticmethod
        def copy(target, source, nbytes, of):
            counts.append(nbytes)
            assert of == threads_of_torch
            copy(target, source, nbytes, of)

    monkeypatch.setattr(copying, "_copy", Counting)
    whole = torch.randint(256, (offset + count + 1,), dtype=torch.uint8)
    source, target = whole[offset:-1], torch.zeros(count + 130, dtype=torch.uint8)

    copying.copy_bytes(target[65 : 65 + count], source)

    assert torch.equal(target[65 : 65 + count], source)
    assert not target[:65].any()
    assert not target[65 + count :].any()
    assert sum(counts) == (count if count >= PAST and (threads_of_torch == 1 or has_threads) else 0)


@needs_compiled
@pytest.mark.parametrize("count", [*range(140), 1000, 4096])
def test_any_number_of_bytes_from_any_address_to_any(count):
    source = torch.arange(1, 8192, dtype=torch.int32).view(torch.uint8)[: count + 64]
    for here, there in [(0, 0), (1, 0), (0, 1), (63, 17), (17, 63)]:
        target = torch.zeros(count + 200, dtype=torch.uint8)
        copying._copy.copy(target.data_ptr() + there, source.data_ptr() + here, count, 1)
        assert torch.equal(target[there : there + count], source[here : here + count])
        assert not target[:there].any()
        assert not target[there + count :].any()


@needs_compiled
@pytest.mark.parametrize("arguments", [(0, 0, -1, 1), (0, 0, 0, 0), (0, 0, 0), ("a", 0, 0, 1)])
def test_what_cannot_be_copied(arguments):
    with pytest.raises((ValueError, TypeError)):
        copying._copy.copy(*arguments)


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_an_error_in_any_thread_is_raised_when_all_have_ended(threads):
    ended = []

    def work(number):
        if number == 1:
            raise ValueError("one")
        ended.append(number)

    with pytest.raises(ValueError, match="one"):
        copying.side_by_side(work, [(0,), (1,), (2,)], threads)
    assert sorted(ended) == [0, 2]


@in_one_thread
def test_it_is_done_alone_where_no_thread_can_be_started(monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(helpers._thread, "start_new_thread", refuse)
    source = torch.arange(COUNT, dtype=torch.uint8)
    target = torch.zeros_like(source)
    copying.copy_bytes(target, source)
    assert torch.equal(target, source)


def test_it_ends_after_all_threads():
    start, running = threading.Event(), []

    def work(number):
        running.append(number)
        start.wait()
        time.sleep(0.01)
        running.remove(number)

    threading.Timer(0.05, start.set).start()
    copying.side_by_side(work, [(0,), (1,), (2,)], 3)
    assert not running


@in_one_thread
def test_a_large_tensor_is_fetched_in_inference_mode(alice):
    values = torch.rand(COUNT // 4)
    pointer = alice.send(values)
    with torch.inference_mode():
        assert torch.equal(pointer.fetch(), values)


# ---------------------------------------------------------------- threads


def threads() -> set[str]:
    return {entry.name for entry in Path("/proc/self/task").iterdir()}


@pytest.fixture
def new():
    """How many threads there are that were not there before, once they are as many as expected."""
    helpers._end_all()
    before = threads()

    def settled(count: int) -> int:
        until = time.monotonic() + 10
        while len(threads() - before) != count and time.monotonic() < until:
            time.sleep(0.001)
        return len(threads() - before)

    yield settled
    helpers._end_all()
    assert settled(0) == 0


def test_a_thread_serves_many_copies(new):
    seen = set()
    for _ in range(5):
        copying.side_by_side(lambda _: seen.add(threading.get_native_id()), [(0,), (1,)], 2)
        assert new(1) == 1
    assert len(seen) <= 2


def test_copies_at_the_same_time_have_threads_of_their_own(new):
    all_here, found = threading.Barrier(6), []

    def work(_):
        all_here.wait(10)
        found.append(threading.get_native_id())

    def copy():
        copying.side_by_side(work, [(0,), (1,)], 2)

    callers = [threading.Thread(target=copy) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(set(found)) == 6
    assert new(3) == 3


def test_no_more_threads_are_kept_than_are_of_use(new):
    helpers.give_back([helpers.Helper() for _ in range(helpers.MOST_IDLE + 3)])
    assert new(helpers.MOST_IDLE) == helpers.MOST_IDLE


def test_a_thread_that_nobody_waits_for_ends_after_its_job(new):
    may_end, done = threading.Event(), threading.Event()
    helper = helpers.take()
    helper.start(lambda: (may_end.wait(10), done.set()))

    del helper  # Ctrl-C, for instance
    assert new(1) == 1
    may_end.set()

    assert done.wait(10)
    assert new(0) == 0


def test_a_helper_on_other_cores_is_not_used(new, monkeypatch):
    copying.side_by_side(lambda _: None, [(0,), (1,)], 2)
    (kept,) = helpers._idle
    monkeypatch.setattr(helpers.os, "sched_getaffinity", lambda _: {999})

    other = helpers.take()

    assert other is not kept
    assert not helpers._idle


def test_a_fork_finds_no_helpers_and_the_child_makes_its_own(new):
    copying.side_by_side(lambda _: None, [(0,), (1,)], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads that are not ours
        child = os.fork()
    if child == 0:
        found = []
        copying.side_by_side(found.append, [(0,), (1,)], 2)
        os._exit(0 if sorted(found) == [0, 1] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert new(0) == 0


@pytest.fixture
def ctrl_c():
    """SIGINT raises KeyboardInterrupt, also where a shell has it ignored by what runs behind it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_raised_when_no_thread_is_at_work(new, ctrl_c):
    main, both, done = threading.get_ident(), threading.Barrier(2), []

    def give_way():
        for _ in range(20_000):
            os.sched_yield()

    def work(number):
        both.wait(10)
        if threading.get_ident() != main:
            give_way()  # until the main thread waits for this one
            signal.pthread_kill(main, signal.SIGINT)
            give_way()
            done.append(number)

    with pytest.raises(KeyboardInterrupt):
        copying.side_by_side(work, [(0,), (1,)], 2)
    assert len(done) == 1
    assert new(1) == 1


@pytest.mark.parametrize(
    "dtype",
    "bool uint8 int16 bfloat16 float16 float32 float64 int64 complex64 complex128".split(),
)
def test_one_bit_makes_a_difference(dtype):
    one = torch.ones(6, 5).to(getattr(torch, dtype))
    other = one.clone()
    assert same_bits(one, other)
    assert same_bits(one.t(), other.t())
    other.view(torch.uint8).reshape(-1)[7] ^= 1
    assert not same_bits(one, other)
    assert same_bits(one[:0], other[:0])


def test_bits_tell_zeros_apart_and_nan_is_nan():
    odd = torch.tensor([math.nan, -0.0])
    assert same_bits(odd, odd.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
