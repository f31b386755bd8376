"""A program does what the captured function did; what cannot be repeated is not captured."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedproc.client.capture import MOST_BYTES, Programs, capture
from fedproc.client.gradients import _owned
from fedproc.client.program import _BINDINGS, Program

KNOWN = torch.arange(6.0).reshape(2, 3)


def captured(
    function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, turns: bool = False
) -> Program:
    program, results = capture(function, inputs, [KNOWN], turns=turns)
    assert program is not None
    assert all(map(torch.equal, results, function(*inputs)))
    return program


def in_place(x: Tensor) -> tuple[Tensor, ...]:
    y = x * 2
    y.add_(1)
    y[0].fill_(7)
    return y.detach(), y.t().t()


def in_parts(x: Tensor) -> tuple[Tensor, ...]:
    left, right = x.split(2, dim=1)
    values, places = left.max(dim=1)
    (whole,) = torch.cat([right, left], dim=1).split(4, dim=1)
    return whole, values, places, torch.stack([KNOWN, KNOWN * values[0]])


def descended(x: Tensor) -> tuple[Tensor, ...]:
    leaf = x.detach().requires_grad_()
    loss = (leaf.t().matmul(leaf).relu() * 3).sum()
    return loss.detach(), *torch.autograd.grad(loss, leaf)


def stacked(x: Tensor) -> tuple[Tensor, ...]:
    def loss(row: Tensor) -> Tensor:
        return (row.tanh() * KNOWN[0, 1]).sum() ** 2

    return torch.func.vmap(torch.func.grad(loss))(x), torch.func.vmap(loss)(x)


@pytest.mark.parametrize("function", [in_place, in_parts, descended, stacked])
def test_other_values_of_the_same_shape_get_the_same_operations(
    function: Callable[..., tuple[Tensor, ...]],
) -> None:
    torch.manual_seed(0)
    program = captured(function, torch.randn(5, 4))
    other = torch.randn(5, 4)

    results = program([other])

    expected = function(other)
    assert len(results) == len(expected)
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()
        assert not ours.requires_grad


def test_a_known_tensor_is_read_anew_and_may_be_changed() -> None:
    program = captured(lambda x: (x + KNOWN.clone(),), torch.zeros(2, 3))
    counted = torch.zeros(())

    def count(x: Tensor) -> tuple[Tensor, ...]:
        counted.add_(1)
        return (x + counted,)

    counting, _ = capture(count, [torch.zeros(())], [counted])
    assert counting is not None
    KNOWN.add_(10)
    try:
        assert program([torch.zeros(2, 3)])[0].tolist() == [[10.0, 11.0, 12.0], [13.0, 14.0, 15.0]]
    finally:
        KNOWN.sub_(10)
    assert [counting([torch.zeros(())])[0].item() for _ in range(2)] == [2.0, 3.0]


def test_a_random_number_is_drawn_though_nobody_uses_it() -> None:
    def draw(x: Tensor) -> tuple[Tensor, ...]:
        torch.rand(3)
        return (torch.rand_like(x),)

    program, _ = capture(draw, [torch.zeros(2)], [])
    assert program is not None
    torch.manual_seed(5)
    ours = program([torch.zeros(2)])[0]
    torch.manual_seed(5)

    assert torch.equal(ours, draw(torch.zeros(2))[0])


def test_an_error_leaves_autograd_as_it_was() -> None:
    def pick(x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (KNOWN.flatten().index_select(0, x),)

    program = captured(pick, torch.tensor([0, 5]))

    with pytest.raises(IndexError) as caught:
        program([torch.tensor([0, 6])])
    assert torch.is_grad_enabled()
    assert (torch.ones(2, requires_grad=True) * 2).requires_grad
    assert caught.tb  # while its frames are alive


def branch(x: Tensor) -> tuple[Tensor, ...]:
    return (x if x.sum() > 0 else -x,)


def scale(x: Tensor) -> tuple[Tensor, ...]:
    return (x * x.max().item(),)


def unknown(x: Tensor) -> tuple[Tensor, ...]:
    return (x + torch.tensor([1.0, 2.0, 3.0]),)


REFUSED: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "a branch": branch,
    "a number": scale,
    "chosen rows": lambda x: (x[x > 0],),
    "a tensor of each call": unknown,
    "large": lambda x: ((x.new_zeros(MOST_BYTES) + x[0, 0]).sum(),),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_repeated_is_not_captured(name: str) -> None:
    x = torch.ones(2, 3)

    program, results = capture(REFUSED[name], [x], [])

    assert program is None
    assert all(map(torch.equal, results, REFUSED[name](x)))


def test_gradients_are_nobody_elses_and_lie_like_their_parameters() -> None:
    first, second = torch.ones(2, 3), torch.ones(3, 2).t()
    gradient = torch.arange(6.0).reshape(2, 3)

    alone = _owned([first], [gradient], set())
    both = _owned([first, first], [gradient, gradient], set())
    turned = _owned([second], [gradient], set())
    shown = _owned([first], [gradient], {gradient.untyped_storage().data_ptr()})

    assert alone[0] is gradient
    assert len({tensor.data_ptr() for tensor in (*both, *turned, *shown)}) == 4
    assert turned[0].stride() == second.stride()
    assert all(torch.equal(tensor, gradient) for tensor in (*both, *turned, *shown))


class Cycle:
    """Draws a random number when the collector ends it."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        torch.rand(1)


def test_what_a_finalizer_does_meanwhile_is_no_part_of_it() -> None:
    def compute(x: Tensor) -> tuple[Tensor, ...]:
        Cycle()
        for _ in range(50):
            x = x + [0, [[]]][0]  # makes what the collector counts
        return (x,)

    old = gc.get_threshold()
    gc.set_threshold(3)
    try:
        program, _ = capture(compute, [torch.zeros(2)], [])
    finally:
        gc.set_threshold(*old)

    assert gc.isenabled()
    assert program is not None
    assert program.source.count("(") == 50 + 3  # and of the definition, the mode, and the return


def test_a_program_whose_first_results_differ_is_not_taken() -> None:
    programs = Programs([])
    x = torch.ones(3)

    results = [
        programs(lambda x: (x * 2,), lambda x, factor=factor: (x * factor,), [x])[0].tolist()
        for factor in (1.0, 3.0, 4.0)
    ]

    assert results == [[1.0] * 3, [3.0] * 3, [4.0] * 3]
    assert [programs(in_place, in_place, [torch.ones(2, 2)])[0].tolist() for _ in range(4)] == [
        [[7.0, 7.0], [3.0, 3.0]]
    ] * 4
    assert [type(found) for found in programs._found.values()] == [str, Program]


def test_trying_leaves_tensors_and_the_random_stream_as_they_were() -> None:
    counted = torch.zeros(())
    programs = Programs([counted])

    def compute(x: Tensor) -> tuple[Tensor, ...]:
        counted.add_(1)
        return (x.add_(1) + torch.rand(2),)

    torch.manual_seed(3)
    ours = [programs(compute, compute, [torch.zeros(2)])[0] for _ in range(4)]
    assert counted.item() == 4
    torch.manual_seed(3)

    assert all(torch.equal(found, 1 + torch.rand(2)) for found in ours)


# ---------------------------------------------------------------- views


def in_views(x: Tensor) -> tuple[Tensor, ...]:
    left, right = x.split([2, 2], dim=1)
    chained = left.t().unsqueeze(0).expand(3, -1, -1).transpose(1, 2)
    return chained * 2, right[1:].reshape(-1), (x + 1).view(2, 10)[:, ::3] * 1


def through_a_view(x: Tensor) -> tuple[Tensor, ...]:
    """What is written through a view is seen in the whole, and in views made before."""
    y = x * 1
    first = y.view(-1)[:4]
    y.t()[0].view(5).mul_(3)
    return y, first, first + 1, y.t().reshape(2, 10)


def turned(x: Tensor) -> tuple[Tensor, ...]:
    product = torch.bmm(x.view(2, 5, 2), x.view(2, 2, 5))
    return (product.transpose(1, 2).contiguous(),)


def turned_of_another(x: Tensor) -> tuple[Tensor, ...]:
    """A factor is changed before the copy is made."""
    left = x.view(2, 5, 2) * 1
    product = torch.bmm(left, x.view(2, 2, 5))
    left.zero_()
    return product.transpose(1, 2).contiguous(), left


def turned_in_part(x: Tensor) -> tuple[Tensor, ...]:
    product = torch.bmm(x.view(2, 5, 2), x.view(2, 2, 5))
    return product.transpose(1, 2)[:, :3].contiguous(), product.transpose(1, 2) + 1


@pytest.mark.parametrize(
    "function", [in_views, through_a_view, turned, turned_of_another, turned_in_part]
)
@pytest.mark.parametrize("turns", [False, True])
def test_views_show_what_they_showed(
    function: Callable[[Tensor], tuple[Tensor, ...]], turns: bool
) -> None:
    torch.manual_seed(0)
    program = captured(function, torch.randn(5, 4), turns=turns)
    other = torch.randn(5, 4)

    results = program([other])

    for ours, theirs in zip(results, function(other), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()


def names(program: Program) -> list[str]:
    """What a program calls, in order."""
    bound = program._replay.__globals__
    lines = [line.strip().partition(" = ")[2] for line in program.source.splitlines()]
    return [bound[line.partition("(")[0]].__name__ for line in lines if line]


def test_a_chain_of_views_is_one_and_what_nobody_reads_is_none() -> None:
    assert names(captured(in_views, torch.ones(5, 4))) == [
        *("as_strided", "mul"),  # of the left half
        *("as_strided", "clone", "as_strided"),  # of the right half
        *("add", "as_strided", "mul"),
    ]


def test_a_copy_of_a_transposed_product_may_be_the_product_of_turned_factors() -> None:
    x = torch.ones(5, 4)
    assert names(captured(turned, x, turns=True)) == ["as_strided", "as_strided", "bmm"]
    assert names(captured(turned, x))[-1] == "clone", "only where other bits would do, too"
    for function in (turned_of_another, turned_in_part):
        assert "clone" in names(captured(function, x, turns=True))


def other_bits(x: Tensor) -> tuple[Tensor, ...]:
    """Of factors of these shapes the turned product has other bits."""
    left, right = x[:8], x[8:]
    return (torch.bmm(left[:, :17], right[:, :9].mT).transpose(1, 2).contiguous(),)


@pytest.mark.parametrize("numbers", [torch.zeros, torch.ones, torch.randn])
def test_turned_factors_are_not_taken_where_the_bits_of_some_numbers_are_others(
    numbers: Callable[..., Tensor],
) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 17, 50)
    left, right = x[:8, :17], x[8:, :9].mT
    if torch.equal(torch.bmm(left, right).mT, torch.bmm(right.mT, left.mT)):
        pytest.skip("this machine forms both in the same order")
    program = captured(other_bits, numbers(16, 17, 50), turns=True)
    assert torch.equal(program([x])[0], other_bits(x)[0])


def test_a_known_tensor_may_come_to_lie_otherwise() -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    x = torch.ones(2, 2)

    def compute(x: Tensor) -> tuple[Tensor, ...]:
        return (x.mm(parameter.detach()).t().reshape(-1)[1:] + parameter.detach().t()[0, 0],)

    program, _ = capture(compute, [x], [parameter])
    assert program is not None
    parameter.data = torch.arange(12.0).reshape(3, 4).t()[1:3]

    assert torch.equal(program([x])[0], compute(x)[0])


def test_inputs_that_lie_elsewhere_in_their_memory_have_a_program_of_their_own() -> None:
    programs, whole = Programs([]), torch.arange(60.0)

    def compute(x: Tensor) -> tuple[Tensor, ...]:
        return (x.t()[1:].unsqueeze(0) * 1,)

    for start in (0, 20, 0, 20, 0, 20):
        x = whole[start : start + 20].view(5, 4)
        assert torch.equal(programs(compute, compute, [x])[0], compute(x)[0])
    assert [type(found) for found in programs._found.values()] == [Program, Program]


def test_a_program_that_gives_other_bits_than_was_written_down_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(_BINDINGS, torch.ops.aten.mul.Tensor, lambda a, b: torch.mul(a, b) + 1e-6)
    programs, x = Programs([]), torch.ones(3)

    def square(x: Tensor) -> tuple[Tensor, ...]:
        return (x * x,)

    assert [programs(square, square, [x])[0].tolist() for _ in range(3)] == [[1.0] * 3] * 3
    assert list(programs._found.values()) == ["refused"]


# ---------------------------------------------------------------- torch's own bindings

ATEN = torch.ops.aten
X = torch.linspace(-2, 2, 12).reshape(3, 4)
PLACES = torch.tensor([[1, 0, 2, 3], [0, 0, 1, 1], [3, 2, 1, 0]])
LOGITS = torch.log_softmax(X, 1)
CALLS: dict[object, list[tuple[object, ...]]] = {
    ATEN.t.default: [(X,)],
    ATEN.mm.default: [(X, X.t())],
    ATEN.addmm.default: [(X[:, :3], X, X.t()), (X[0, :3], X, X.t())],
    ATEN.bmm.default: [(X[None], X.t()[None])],
    ATEN.convolution.default: [
        (X[None, None], torch.ones(1, 1, 2, 2), bias, [1, 2], [1, 0], [1, 1], False, [0, 0], 1)
        for bias in (None, torch.ones(1))
    ],
    ATEN.relu.default: [(X,)],
    ATEN._log_softmax.default: [(X, 1, False), (X, 0, False)],
    ATEN._log_softmax_backward_data.default: [(X, LOGITS, 1, torch.float32)],
    ATEN.add.Tensor: [(X, X[0]), (X, torch.tensor(3.0))],
    ATEN.mul.Tensor: [(X, X[0]), (X, torch.tensor(3.0))],
    ATEN.mul.Scalar: [(X, 1), (X, 0.5), (PLACES, 2)],
    ATEN.neg.default: [(X,)],
    ATEN.ne.Scalar: [(PLACES, 1)],
    ATEN.sum.default: [(X,), (PLACES,)],
    ATEN.sum.dim_IntList: [(X, [0]), (X, [0, 1], True), (X, [-1], False), (X, None)],
    ATEN.gather.default: [(X, 1, PLACES)],
    ATEN.scatter_add.default: [(X, 1, PLACES, X)],
    ATEN.where.self: [(X > 0, X, X[0])],
    ATEN.scalar_tensor.default: [(2.0,), (3,)],
    ATEN.ones_like.default: [(X.t(),), (PLACES,)],
    ATEN.new_zeros.default: [(X, [2, 3])],
    ATEN.clone.default: [(X.t(),)],
    ATEN.cat.default: [([X, X],), ([X, X], 1)],
    ATEN.split_with_sizes.default: [(X, [1, 2]), (X, [3, 1], 1)],
    ATEN.view.default: [(X, [4, 3]), (X, [2, -1])],
    ATEN.expand.default: [(X[:, None], [-1, 2, 4])],
    ATEN.transpose.int: [(X[None], 1, 2)],
    ATEN.permute.default: [(X[None], [2, 0, 1])],
    ATEN.unsqueeze.default: [(X, 1)],
    ATEN.squeeze.dim: [(X[None], 0), (X, 0)],
}
KEYWORDS: dict[object, dict[str, object]] = {
    ATEN.add.Tensor: {"alpha": 3},
    ATEN.sum.default: {"dtype": torch.float64},
    ATEN.sum.dim_IntList: {"dtype": torch.float64},
    ATEN.ones_like.default: {"pin_memory": False, "memory_format": torch.preserve_format},
    ATEN.new_zeros.default: {"dtype": torch.int64},
    ATEN.scalar_tensor.default: {"dtype": torch.int64},
    ATEN.clone.default: {"memory_format": torch.contiguous_format},
}


@pytest.mark.parametrize("func", _BINDINGS, ids=str)
def test_a_binding_does_what_the_operation_does(func: torch._ops.OpOverload) -> None:
    binding = _BINDINGS[func]
    for args in CALLS[func]:
        for keywords in ({}, KEYWORDS.get(func, {})):
            ours, theirs = binding(*args, **keywords), func(*args, **keywords)
            parts = (
                [(ours, theirs)]
                if isinstance(theirs, Tensor)
                else list(zip(ours, theirs, strict=True))
            )
            for mine, other in parts:
                assert torch.equal(mine, other)
                assert (mine.dtype, mine.stride()) == (other.dtype, other.stride())
                assert mine._is_view() == other._is_view()
