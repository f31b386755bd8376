"""Questions and fetches in a worker: the compiled step answers what the general way does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproc.wire import frames
from fedproc.worker.store import Domain
from tests.remote.ways import exact
from tests.worker.pair import DONE, FETCH, REFUSAL, made, needs_compiled, pickled, three

pytestmark = needs_compiled

# ---- what is asked


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("Tensor.numel", (), 3),
        ("Tensor.is_contiguous", (), True),
        ("Tensor.type", (), "torch.FloatTensor"),
        ("torch.is_tensor", (), True),
    ],
)
def test_a_plain_answer(pair, name, more, expected):
    number = pair.ask(name, pair.put(three), *more, ids=(0,))
    for answer in pair.answers(number):
        assert exact(answer) == exact((frames.PLAIN, expected))
    assert pair.left == []


def test_an_answer_that_is_not_plain_comes_from_the_same_call(pair):
    p, log = pair.put(three), pair.put(lambda: [[1, 2.5, "a"]] * 200)
    for name, args in (
        ("Tensor.tolist", (p,)), ("operator.__getitem__", (log, 7)), ("Tensor.size", (p,)),
        ("operator.__mul__", (p, 2)), ("operator.getitem", (log, 0)),
    ):  # fmt: skip
        one, other = pair.answers(pair.ask(name, *args, ids=(0,)))
        assert one == other
    assert pair.left == []


def test_questions_are_answered_one_by_one_and_nothing_else_is_told(pair):
    p = pair.put(three)
    pair.call("operator.__neg__", p, ids=(0,))
    numbers = [pair.ask("Tensor.numel", p, ids=(0,)) for _ in range(3)]
    assert [number for _, number, _ in pair.compiled.told()] == numbers
    assert (pair.compiled.loop._reported, pair.compiled.loop._unreported) == (numbers[-1], 0)
    assert pair.compiled.host.arena.done[0] == numbers[0] - 1
    pair.compiled.loop._report()
    assert DONE not in [kind for kind, *_ in pair.compiled.told()]
    assert pair.left == []


@pytest.mark.parametrize(
    ("name", "operand", "text"),
    [
        ("Tensor.item", three, "RuntimeError: a Tensor with 3 elements cannot be converted"),
        ("operator.__truediv__", lambda: 1, "ZeroDivisionError: division by zero"),
        ("torch.no_such_name", three, "AttributeError"),
    ],
)
def test_what_goes_wrong_refuses_the_question(pair, name, operand, text):
    args = (0,) if "truediv" in name else ()
    number = pair.ask(name, pair.put(operand), *args, ids=(0,))
    kind, to, (_, failure) = pair.compiled.told()[-1]
    assert (kind, to) == (REFUSAL, number)
    assert f"{failure.name}: {failure.message}".startswith(text)
    assert number not in pair.compiled.host.store._by_id
    assert [a[1] for a in pair.answers(pair.ask("Tensor.numel", pair.put(three), ids=(0,)))] == [
        3,
        3,
    ]
    assert pair.left == []


def test_what_only_the_general_way_may_answer(pair):
    p, private = pair.put(three), pair.put(three, private=True)
    asked = [
        pair.ask("Tensor.sum", private, ids=(0,)),
        pair.ask("operator.__add__", p, private, ids=(0, 1)),
        pair.ask("Tensor.add_", p, 1, ids=(0,)),
        pair.ask("fedproc.worker.parts.truth", p, ids=(0,)),
        pair.ask("Tensor.numel", p, ids=(0,), modes=(False, False, None, torch.float32)),
        pair.ask("Tensor.numel", p, ids=(0,), folding=True),
        pair.ask("Tensor.numel", 99, ids=(0,)),
    ]
    assert pair.left == asked
    refused = [number for kind, number, _ in pair.compiled.told() if kind == REFUSAL]
    assert refused == [asked[0], asked[1], asked[3], asked[6]]
    assert pair.value(p).tolist() == [2.0, 3.0, 4.0]


# ---- what is fetched

VALUES = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.booleans(), st.none(),
    st.text(), st.binary(),
    st.sampled_from([254, 255, 256]).flatmap(lambda n: st.sampled_from(["a" * n, b"a" * n])),
    st.sampled_from([0, 255, 256, -1, 2**31, 2**63 - 1, 2**63, -(2**63), "\ud800", -0.0]),
)  # fmt: skip


def test_a_plain_object_comes_with_its_ids():
    def check(value, more):
        with pytest.MonkeyPatch.context() as monkeypatch:
            for pair in made(monkeypatch):
                p = pair.put(lambda: value)
                ids = [p, *(pair.number + 1 + n for n in range(more))]
                for side in (pair.compiled, pair.general):
                    entry = side.host.store.entry(p)
                    entry.ids[:] = ids
                    side.host.store._by_id.update(dict.fromkeys(ids, entry))
                pair.number = ids[-1]
                one, other = pair.answers(pair.fetch(p))
                assert exact(one) == exact(other) == exact((frames.PLAIN, value, tuple(ids)))
                short = not isinstance(value, str | bytes) or len(_bytes(value)) < 256
                number = isinstance(value, int) and not -(2**63) <= value < 2**63
                assert pair.left == (
                    [] if short and not number and value != "\ud800" else [ids[-1] + 1]
                )

    settings(max_examples=150)(given(VALUES, st.integers(0, 5))(check))()


def _bytes(value):
    return value.encode(errors="surrogatepass") if isinstance(value, str) else value


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), 5e-324])
def test_any_number_comes_with_its_bits(value):
    with pytest.MonkeyPatch.context() as monkeypatch:
        for pair in made(monkeypatch):
            side = pair.compiled
            side.host.store.add(1, value, Domain(False))
            side.loop.execute(frames.Frame(FETCH, frames.PLAIN, 2, pickled((1, False))))
            assert exact(side.told()[0][2][0]) == exact((frames.PLAIN, value, (1,)))
            assert pair.left == []


def test_many_ids_have_no_room(pair):
    p = pair.put(lambda: 7)
    for side in (pair.compiled, pair.general):
        entry = side.host.store.entry(p)
        entry.ids.extend(range(1000, 2000))
    assert list(pair.answers(pair.fetch(p))) == [(frames.PLAIN, 7, (p, *range(1000, 2000)))] * 2
    assert pair.left == [pair.number]


def test_what_only_the_general_way_may_give(pair):
    tensor, number, private = (
        pair.put(three),
        pair.put(lambda: 7),
        pair.put(lambda: 7, private=True),
    )
    kind = type("N", (int,), {})
    odd, bad = pair.put(lambda: kind(7)), pair.call("torch.no_such_name")
    asked = [
        pair.fetch(tensor), pair.fetch(private), pair.fetch(odd), pair.fetch(bad), pair.fetch(99),
        pair.fetch(number, lent=True), pair.fetch(tensor, lent=True),
    ]  # fmt: skip
    assert pair.left == asked
    refused = [number for kind, number, _ in pair.compiled.told() if kind == REFUSAL]
    assert refused == [asked[1], *asked[3:6]]


def test_frees_in_front_of_a_fetch_come_first(pair):
    p, q = pair.put(lambda: 7), pair.put(lambda: 8)
    assert [a[1] for a in pair.answers(pair.fetch(p, frees=(q,)))] == [7, 7]
    assert q not in pair.compiled.host.store._by_id
    pair.fetch(p, frees=(p,))
    assert pair.compiled.told()[-1][0] == REFUSAL
    assert pair.left == [pair.number]


@pytest.mark.parametrize("lent", [False, True])
def test_a_fetch_that_was_there_is_ignored(pair, lent):
    p = pair.put(lambda: 7)
    number = pair.fetch(p)
    for side in (pair.compiled, pair.general):
        side.replies.clear()
    pair.number -= 1
    pair.fetch(p, lent=lent)
    assert pair.compiled.told() == pair.general.told() == []
    assert pair.compiled.loop._last == number
