"""What leaves a worker under differential privacy: the clipped change, and nothing else."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedproc.client import clipping
from fedproc.client.layout import Layout


def clip_update(layout, start, block, clip_norm):
    return clipping.clip_update(layout, layout.pieces(start), layout.slot(block), clip_norm)


def blocks(*modules):
    layout = Layout.of(modules[0])
    return layout, *(layout.pack(layout.tensors(m), layout.new_block()) for m in modules)


def filled(value, dtype=torch.float32, features=4):
    module = nn.Linear(features, 1, bias=False, dtype=dtype)
    nn.init.constant_(module.weight, value)
    return module


def test_a_small_change_stays_as_it_is():
    layout, start, block = blocks(filled(0.25), filled(1.25))
    assert clip_update(layout, start, block, 2.0)  # the norm is exactly 2
    assert layout.flat_trained(block).tolist() == [1.0] * 4
    assert layout.flat_trained(start).tolist() == [0.25] * 4


def test_a_large_change_gets_the_norm_and_keeps_its_direction():
    layout, start, block = blocks(filled(0.25), filled(-99.75))
    assert not clip_update(layout, start, block, 2.0)
    assert layout.flat_trained(block).tolist() == pytest.approx([-1.0] * 4, rel=2e-7)
    assert layout.flat_trained(block).norm() <= 2.0


def test_one_norm_over_all_tensors_of_every_dtype_tied_ones_once():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False).double())
    model.append(model[0])
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    layout, start, block = blocks(model, model)
    layout.of_kind("trained")[0].view(block).fill_(3.0)
    layout.of_kind("trained")[1].view(block).fill_(4.0)
    assert not clip_update(layout, start, block, 1.0)
    assert layout.flat_trained(block).tolist() == pytest.approx([0.6, 0.8], rel=2e-7)


def test_nothing_of_the_buffers_leaves():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    layout, start, _ = blocks(model, model)
    model(torch.randn(8, 2))
    layout, block = blocks(model)
    assert clip_update(layout, start, block, 1.0)  # the statistics are no part of the norm
    for section in layout.sections:
        assert not section.view(block).any()


def test_frozen_parameters_are_no_part_of_it():
    model = nn.Linear(2, 1)
    model.weight.requires_grad_(False)
    layout, start, block = blocks(model, model)
    assert layout.trained_numel == 1
    assert clip_update(layout, start, block, 1.0)


@given(
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.integers(0, 2**32 - 1),
    st.floats(1e-3, 1e3),
    st.integers(1, 70_000),
)
def test_the_norm_is_never_above_the_clip_norm(dtype, seed, clip_norm, numel):
    generator = torch.Generator().manual_seed(seed)
    start = filled(0.0, dtype, numel)
    after = filled(0.0, dtype, numel)
    with torch.no_grad():
        after.weight.copy_(torch.randn(1, numel, generator=generator))
    layout, x, y = blocks(start, after)
    norm = math.sqrt(math.fsum((layout.flat_trained(y) ** 2).tolist()))
    within = clip_update(layout, x, y, clip_norm)
    clipped = math.sqrt(math.fsum((layout.flat_trained(y) ** 2).tolist()))
    assert within == (norm <= clip_norm) or norm == pytest.approx(clip_norm, rel=1e-12)
    assert clipped <= clip_norm
    # rounded towards zero: at most one step of the dtype, or below its smallest numbers
    info = torch.finfo(dtype)
    lost = info.eps * min(norm, clip_norm) + info.tiny * math.sqrt(numel)
    assert clipped >= min(norm, clip_norm) * (1 - 1e-11) - lost


def test_threads_do_not_change_the_bits():
    after = filled(0.0, features=200_000)
    with torch.no_grad():
        after.weight.copy_(torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0)))
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            layout, x, y = blocks(filled(0.0, features=200_000), after)
            clip_update(layout, x, y, 0.5)
            found.append(y)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_change_outside_of_the_dtype_is_cut_to_its_largest_number():
    largest = torch.finfo(torch.float16).max
    layout, start, block = blocks(filled(-largest, torch.float16), filled(largest, torch.float16))
    assert clip_update(layout, start, block, 1e9)
    assert layout.flat_trained(block).tolist() == [largest] * 4


def test_a_change_beyond_float64_is_an_error():
    largest = torch.finfo(torch.float64).max
    layout, start, block = blocks(filled(0.0, torch.float64), filled(largest, torch.float64))
    with pytest.raises(FloatingPointError, match="norm of the update is not finite"):
        clip_update(layout, start, block, 1.0)
