"""Copies side by side: nothing is lost in a thread."""

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


def test_an_error_in_any_thread_is_raised_when_all_have_ended():
    ended = []

    def work(number):
        if number == 1:
            raise ValueError("one")
        ended.append(number)

    with pytest.raises(ValueError, match="one"):
        copying.side_by_side(work, [(0,), (1,), (2,)])
    assert sorted(ended) == [0, 2]


def test_a_large_tensor_is_fetched_in_inference_mode(one_thread, alice):
    values = torch.rand(COUNT // 4)
    pointer = alice.send(values)
    with torch.inference_mode():
        assert torch.equal(pointer.fetch(), values)
