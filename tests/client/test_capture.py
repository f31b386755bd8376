"""A program does what the captured function did; what cannot be repeated is not captured."""

import gc
import re
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedproc.client.capture import MOST_BYTES, Programs, capture
from fedproc.client.gradients import _owned
from fedproc.client.program import Program

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


def alone(x: Tensor) -> tuple[Tensor, ...]:
    used = torch.rand_like(x)
    torch.rand(3)
    return (used,)


def in_place_alone(x: Tensor) -> tuple[Tensor, ...]:
    used = torch.rand_like(x)
    torch.empty(3).bernoulli_(0.5)
    return (used,)


def changed_later(x: Tensor) -> tuple[Tensor, ...]:
    used = torch.rand_like(x)
    torch.rand(3).add_(1).mul_(2)
    return (used,)


@pytest.mark.parametrize("draw", [alone, in_place_alone, changed_later])
def test_a_random_number_is_drawn_though_nobody_uses_it(
    draw: Callable[[Tensor], tuple[Tensor, ...]],
) -> None:
    programs, x = Programs([]), torch.zeros(2)
    torch.manual_seed(5)
    ours = [programs(draw, draw, [x])[0] for _ in range(4)]
    torch.manual_seed(5)

    assert all(torch.equal(mine, draw(x)[0]) for mine in ours)


def in_place_of_a_view(x: Tensor) -> tuple[Tensor, ...]:
    y = torch.zeros(4)
    y[:2].bernoulli_(0.5)
    return (y * x[0],)


def in_place_random(x: Tensor) -> tuple[Tensor, ...]:
    return (x.clone().bernoulli_(0.5), torch.nn.functional.dropout(x, 0.5))


@pytest.mark.parametrize("draw", [in_place_of_a_view, in_place_random])
def test_random_numbers_come_from_the_same_stream(
    draw: Callable[[Tensor], tuple[Tensor, ...]],
) -> None:
    programs, x = Programs([]), torch.ones(50)
    torch.manual_seed(5)
    ours = [programs(draw, draw, [x]) for _ in range(4)]
    torch.manual_seed(5)

    for mine in ours:
        assert all(map(torch.equal, mine, draw(x)))
    assert [type(found) for found in programs._found.values()] == [Program]


def pick(x: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (KNOWN.flatten().index_select(0, x),)


def test_an_error_leaves_autograd_as_it_was() -> None:
    program = captured(pick, torch.tensor([0, 5]))

    with pytest.raises(RuntimeError, match="index out of range") as caught:
        program([torch.tensor([0, 6])])
    assert torch.is_grad_enabled()
    assert torch._C._get_graph_executor_optimize()
    assert (torch.ones(2, requires_grad=True) * 2).requires_grad
    assert caught.tb  # while its frames are alive


def test_no_thread_lets_torchscript_optimize_meanwhile() -> None:
    programs, x = Programs([]), torch.ones(2)
    for _ in range(2):
        programs(in_place, in_place, [x])
    program = programs.find([x])
    assert program is not None
    inside, optimizes = threading.Barrier(2), torch._C._get_graph_executor_optimize
    meanwhile: list[bool] = []
    afterwards: list[bool] = []

    def use(results: tuple[Tensor | None, ...]) -> None:
        inside.wait(10)
        meanwhile.append(optimizes())

    def replay() -> None:
        program.instead_of(in_place, [x], use)
        afterwards.append(optimizes())

    threads = [threading.Thread(target=replay) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (meanwhile, afterwards) == ([False, False], [True, True])


def test_an_error_is_the_one_of_torch() -> None:
    programs = Programs([KNOWN])
    for _ in range(3):
        programs(pick, pick, [torch.tensor([0, 5])])
    assert [type(found) for found in programs._found.values()] == [Program]

    with pytest.raises(IndexError, match=r"^index out of range in self$"):
        programs(pick, pick, [torch.tensor([0, 6])])


def test_an_error_that_a_random_number_decides_is_the_one_of_torch() -> None:
    programs = Programs([])

    def compute(x: Tensor) -> tuple[Tensor, ...]:
        kept = torch.nn.functional.dropout(x.sigmoid(), 0.5)  # 0 or twice as much, so over 1
        return (torch.nn.functional.binary_cross_entropy(kept, torch.ones_like(x)),)

    torch.manual_seed(0)
    for _ in range(3):
        programs(compute, compute, [torch.tensor([-3.0, -3.0])])
    assert [type(found) for found in programs._found.values()] == [Program]
    rows = torch.tensor([0.01, -3.0])
    for _ in range(40):
        stream = torch.get_rng_state()
        errors = []
        for call in (lambda: programs(compute, compute, [rows]), lambda: compute(rows)):
            torch.set_rng_state(stream)
            try:
                call()
                errors.append("")
            except RuntimeError as error:
                errors.append(str(error))
        assert errors[0] == errors[1]


@pytest.mark.parametrize(
    "turned_round",
    [
        lambda x: (torch.div(3.0, x),),
        lambda x: (torch.mul(-0.7, x.bfloat16()),),
        lambda x: (torch.mul(True, x.sum()),),
        lambda x: (torch.rsub(x, KNOWN),),
    ],
)
def test_what_torchscript_would_compute_otherwise_is_not_captured(
    turned_round: Callable[[Tensor], tuple[Tensor, ...]],
) -> None:
    program, _ = capture(turned_round, [torch.ones(2, 3)], [KNOWN])
    assert program is None


def test_numbers_may_stand_first_in_python() -> None:
    def compute(x: Tensor) -> tuple[Tensor, ...]:
        return 1 - x, 2 * x, 3 / x, 2**x, x > 0.5

    torch.manual_seed(0)
    program, _ = capture(compute, [torch.rand(50)], [])
    assert program is not None
    for _ in range(50):
        x = torch.rand(50)
        assert all(map(torch.equal, program([x]), compute(x)))


def test_statistics_of_a_batch_are_kept_though_nobody_uses_it_otherwise() -> None:
    mean, variance = torch.zeros(3), torch.ones(3)
    programs = Programs([mean, variance])

    def compute(x: Tensor) -> tuple[Tensor, ...]:
        torch.nn.functional.batch_norm(x, mean, variance, training=True)
        return (x * 2,)

    for _ in range(4):
        programs(compute, compute, [torch.ones(2, 3)])
    torch.testing.assert_close(mean, torch.full((3,), 1 - 0.9**4))


def test_an_input_may_be_known_besides() -> None:
    x = torch.ones(2)
    program, _ = capture(lambda a: (a + 1,), [x], [x])
    assert program is not None
    assert program([torch.zeros(2)])[0].tolist() == [1.0, 1.0]


def test_an_error_that_torch_does_not_have_is_told() -> None:
    programs, given = Programs([KNOWN]), [torch.tensor([0, 5])]
    for _ in range(3):
        programs(pick, pick, given)

    with pytest.raises(RuntimeError, match="index out of range"):
        programs(pick, lambda x: (x,), [torch.tensor([0, 6])])


def of_every_kind(x: Tensor) -> tuple[Tensor, ...]:
    y = torch.nn.functional.gelu(x, approximate="tanh") * float("inf") + float("-inf")
    z = torch.full([2, 3], 1e-45, dtype=torch.float64, device="cpu").sum([])
    whole = torch.cat([x, x.double().float()], dim=-1).contiguous().div(3, rounding_mode="floor")
    return y, z, x.index_select(1, PLACES), whole, x.sum([0, -1], True), x.eq(False), x - -0.1


PLACES = torch.tensor([1, 0, 2])


def test_constants_of_every_kind_are_written_down() -> None:
    x = torch.randn(4, 3)
    program, _ = capture(of_every_kind, [x], [PLACES])
    assert program is not None
    for ours, theirs in zip(program([x]), of_every_kind(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_what_torchscript_does_not_understand_is_not_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedproc.client.writer._written", lambda value: "unheard_of")
    program, results = capture(lambda x: (x * 2,), [torch.ones(2)], [])
    assert program is None
    assert results[0].tolist() == [2.0, 2.0]


def test_a_value_that_cannot_be_written_down_is_not_captured() -> None:
    program, results = capture(lambda x: (x * 2j,), [torch.ones(2)], [])
    assert program is None
    assert results[0].tolist() == [2j, 2j]


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
    return re.findall(r"= aten\.(\w+)\(", program.source)


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
    def written(value: object) -> str:
        return repr(value + 1e-6) if isinstance(value, float) else repr(value)

    monkeypatch.setattr("fedproc.client.writer._written", written)
    programs, x = Programs([]), torch.ones(3)

    def halve(x: Tensor) -> tuple[Tensor, ...]:
        return (x * 0.5,)

    assert [programs(halve, halve, [x])[0].tolist() for _ in range(3)] == [[0.5] * 3] * 3
    assert list(programs._found.values()) == ["refused"]
