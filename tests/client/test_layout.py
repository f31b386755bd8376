import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedproc.client import layout as layouts
from fedproc.client.layout import Layout


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, 2, bias=False).double(),
        nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last),
    )


def values(module):
    return {name: tensor.tolist() for name, tensor in module.state_dict().items()}


def test_what_was_packed_comes_back_whatever_the_strides():
    layout = Layout.of(model())
    block = layout.pack(layout.tensors(model()), layout.new_block())
    target = model()
    with torch.no_grad():
        for tensor in target.state_dict().values():
            tensor.zero_()
    layout.unpack(block, layout.tensors(target))
    assert values(target) == values(model())
    assert target[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_between_sections_a_block_that_is_to_be_filled_is_zeros(monkeypatch):
    monkeypatch.setattr(layouts, "fresh", lambda n: torch.full((n,), 255, dtype=torch.uint8))
    layout = Layout.of(model())
    room, whole = layout.room(), layout.new_block()
    for block in (room, whole):
        layout.pack(layout.tensors(model()), block)
    assert room.shape == whole.shape == (layout.nbytes,)
    assert torch.equal(room, whole)


def test_sections_are_trained_first_and_aligned():
    layout = Layout.of(model())
    kinds = [(section.kind, section.dtype) for section in layout.sections]
    assert kinds == [
        ("trained", torch.float32),
        ("trained", torch.float64),
        ("mean", torch.float32),
        ("largest", torch.int64),
    ]
    assert all(section.start_bytes % 64 == 0 for section in layout.sections)
    assert layout.trained_numel == 15 + 5 + 10 + 10 + 36 + 2
    assert layout.payload_bytes == 4 * (15 + 5 + 10 + 36 + 2) + 8 * 10 + 4 * 10 + 8


def test_frozen_parameters_do_not_travel_and_tied_ones_once():
    tied = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
    tied[1].weight = tied[0].weight
    tied[2].bias.requires_grad_(False)
    names = [entry.name for section in Layout.of(tied).sections for entry in section.entries]
    assert names == ["0.weight", "2.weight"]


def test_the_vector_of_trained_parameters_has_them_one_after_the_other():
    layout = Layout.of(model())
    block = layout.pack(layout.tensors(model()), layout.new_block())
    vector = layout.flat_trained(block)
    assert vector.dtype == torch.float64
    trained = [parameter.detach().reshape(-1) for parameter in layout.trained(model())]
    assert vector.tolist() == torch.cat(trained).tolist()


@given(
    st.sampled_from(["0.bias", "1.running_var", "2.weight"]),
    st.sampled_from(["nan", "inf", "-inf"]),
)
def test_non_finite_values_are_found_by_name(name, value):
    broken = model()
    broken.state_dict()[name].view(-1)[1] = float(value)
    layout = Layout.of(broken)
    where = layout.non_finite(layout.slot(layout.pack(layout.tensors(broken), layout.new_block())))
    assert where is not None
    assert f"1 of {broken.state_dict()[name].numel()} values of {name!r}" in where


def test_finite_values_are_fine_and_integers_are_not_looked_at():
    layout = Layout.of(model())
    assert (
        layout.non_finite(layout.slot(layout.pack(layout.tensors(model()), layout.new_block())))
        is None
    )


def expanded():
    module = nn.Linear(2, 2)
    module.register_buffer("wide", torch.ones(1).expand(3))
    return module


def sparse():
    module = nn.Linear(2, 2)
    module.register_buffer("holes", torch.eye(2).to_sparse())
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.ReLU(), "requires_grad"),
        (expanded, "'wide' is an expanded view"),
        (sparse, "'holes' is sparse"),
        (lambda: nn.LazyLinear(2), "no values yet"),
        (lambda: nn.Linear(1, 1, dtype=torch.complex64), "complex64"),
    ],
)
def test_what_has_no_defined_mean_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        Layout.of(make())
