"""Copies side by side: nothing is lost in a thread."""

import threading
import time

import pytest
import torch

from fedproc.memory import copying

COUNT = 2 * copying.SIDE_BY_SIDE_BYTES + 5


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("inference", [False, True])
def test_every_byte_is_copied(one_thread, inference):
    source = torch.arange(COUNT, dtype=torch.uint8)
    with torch.inference_mode(inference):
        target = copying.fresh(COUNT)
        copying.copy_bytes(target, source)
    assert torch.equal(target, source)


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


def test_it_is_done_alone_where_no_thread_can_be_started(one_thread, monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(copying._thread, "start_new_thread", refuse)
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


def test_a_large_tensor_is_fetched_in_inference_mode(one_thread, alice):
    values = torch.rand(COUNT // 4)
    pointer = alice.send(values)
    with torch.inference_mode():
        assert torch.equal(pointer.fetch(), values)
