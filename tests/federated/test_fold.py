import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedproc.client.layout import Layout
from fedproc.client.weighted_mean import WeightedMean
from fedproc.federated.fold import Fold, Weighted


def blocks_of(models):
    layout = Layout.of(models[0])
    return layout, [layout.pack(layout.tensors(m), layout.new_block()) for m in models]


def fold(models, weights):
    layout, blocks = blocks_of(models)
    folded = Fold(layout, keep_rows=False)
    for block, weight in zip(blocks, weights, strict=True):
        folded.add([Weighted(block, weight, weight)])
    mean, _ = folded.trained()
    layout.unpack(folded.write(mean), layout.tensors(models[0]))
    return models[0]


def constant(value, dtype=torch.float32):
    layer = nn.Linear(2, 1).to(dtype)
    nn.init.constant_(layer.weight, value)
    nn.init.constant_(layer.bias, -value)
    return layer


def test_the_mean_is_weighted():
    mean = fold([constant(1.0), constant(4.0)], [2.0, 1.0])
    assert mean.weight.tolist() == [[2.0, 2.0]]
    assert mean.bias.tolist() == [-2.0]


@given(
    st.lists(
        st.tuples(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), st.integers(1, 10_000)),
        min_size=1,
        max_size=20,
    )
)
def test_the_sum_is_the_sequential_float64_sum_to_the_bit(terms):
    mean = WeightedMean(1)
    total = weights = 0.0
    for value, weight in terms:
        mean.add([[torch.tensor([value], dtype=torch.float32)]], [float(weight)])
        total += weight * value
        weights += weight
    assert mean.result().item() == total / weights


def test_product_and_sum_round_one_after_the_other():
    # fused, 0.1 * 3 - 0.30000000000000004 would be -2.7e-17 and not 0
    mean = WeightedMean(1)
    mean.add([[torch.tensor([-0.30000000000000004], dtype=torch.float64)]], [1.0])
    mean.add([[torch.tensor([0.1], dtype=torch.float64)]], [3.0])
    assert mean.result().item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_in_float64_and_cast_once(dtype):
    models = [constant(1.0, dtype) for _ in range(999)] + [constant(1001.0, dtype)]
    mean = fold(models, [1.0] * 1000)
    exact = (999.0 + float(torch.tensor(1001.0, dtype=dtype))) / 1000
    assert mean.weight.dtype == dtype
    assert mean.weight[0, 0].item() == torch.tensor(exact, dtype=torch.float64).to(dtype).item()


def test_integer_buffers_become_the_largest_exactly_and_keep_shape_and_dtype():
    models = [nn.BatchNorm1d(2) for _ in range(3)]
    for model, count in zip(models, [16_777_217, 5, 16_777_216], strict=True):
        model.num_batches_tracked.fill_(count)
    mean = fold(models, [1.0, 1.0, 1.0])
    assert mean.num_batches_tracked.item() == 16_777_217
    assert mean.num_batches_tracked.shape == ()
    assert mean.num_batches_tracked.dtype == torch.int64


def test_float_buffers_take_the_rounds_weights_whatever_the_strategy_weighs():
    first, second = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    second.running_mean.fill_(8.0)
    layout, (a, b) = blocks_of([first, second])
    folded = Fold(layout, keep_rows=False)
    folded.add([Weighted(a, 3.0, 1.0), Weighted(b, 1.0, 1.0)])
    mean, _ = folded.trained()
    layout.unpack(folded.write(mean), layout.tensors(first))
    assert first.running_mean.item() == 2.0


def test_a_block_may_be_reused_after_it_was_added():
    layout, (block, other) = blocks_of([constant(1.0), constant(3.0)])
    for keep_rows in (False, True):
        folded = Fold(layout, keep_rows=keep_rows)
        row = block.clone()
        folded.add([Weighted(row, 1.0, 1.0)])
        row.copy_(other)
        folded.add([Weighted(row, 1.0, 1.0)])
        mean, rows = folded.trained()
        found = rows.double().mean(dim=0) if keep_rows else mean
        assert found.tolist() == [2.0, 2.0, -2.0]


def test_mixed_dtypes_fold_each_in_its_own():
    def mixed(value):
        model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).double())
        for parameter in model.parameters():
            nn.init.constant_(parameter, value)
        return model

    mean = fold([mixed(0.1), mixed(0.2)], [1.0, 1.0])
    single = (torch.tensor(0.1).double() + torch.tensor(0.2).double()) / 2
    assert mean[0].weight.item() == single.float().item()
    assert mean[1].weight.item() == (0.1 + 0.2) / 2
    assert [layer.weight.dtype for layer in mean] == [torch.float32, torch.float64]


def test_a_vector_longer_than_what_is_folded_at_a_time_has_the_same_bits():
    generator = torch.Generator().manual_seed(0)
    sizes, weights = (200_001, 70_000, 3), (3.0, 0.1, 7.0)
    mean, total = WeightedMean(sum(sizes)), torch.zeros(sum(sizes), dtype=torch.float64)
    for weight in weights:
        pieces = [torch.randn(size, generator=generator) for size in sizes]
        mean.add([[piece] for piece in pieces], [weight])
        total += torch.cat(pieces).double() * weight
    assert torch.equal(mean.result(), total / (3.0 + 0.1 + 7.0))
