"""Flat calls in a worker: the compiled step does what ``Loop._execute`` does, frame by frame."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fedproc as fp
from fedproc.wire import frames
from tests.worker.pair import made, needs_compiled, three

pytestmark = needs_compiled


def user(name):
    return f":{__name__}:{name}"


class Held:
    @staticmethod
    def twice(value):
        return 2 * value


# ---- results


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("operator.__add__", [2.0, 4.0, 6.0]),
        ("operator.__lt__", [False, False, False]),
        ("torch.dot", 14.0),
        ("torch.outer", [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 6.0, 9.0]]),
    ],
)
def test_a_new_tensor_is_kept_under_the_number_of_its_command(pair, name, expected):
    p, q = pair.put(three), pair.put(three)
    kept = pair.call(name, p, q, ids=(0, 1))
    assert pair.value(kept).tolist() == expected
    assert (pair.entry(kept).ids, pair.left) == ([kept], [])
    assert not pair.entry(kept).domain.private


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Tensor.tolist", [1.0, 2.0, 3.0]),
        ("Tensor.numel", 3),
        ("Tensor.size", torch.Size([3])),
        ("Tensor.is_contiguous", True),
        ("Tensor.type", "torch.FloatTensor"),
    ],
)
def test_what_is_no_tensor_is_kept_with_its_sources(pair, name, expected):
    p = pair.put(three)
    kept = pair.call(name, p, ids=(0,))
    assert pair.value(kept) == expected
    assert (type(pair.value(kept)), pair.left) == (type(expected), [])


def test_without_objects_any_function_of_a_module_is_taken(pair):
    assert pair.value(pair.call(":builtins:divmod", 17, 5)) == (3, 2)
    assert pair.value(pair.call("torch.zeros", 2)).tolist() == [0.0, 0.0]
    assert pair.value(pair.call("operator.__add__", "a", "b")) == "ab"
    assert pair.value(pair.call(user("Held.twice"), 4)) == 8
    assert pair.left == [4]  # what is in a class is looked up along the whole path


def test_a_call_without_keep_keeps_nothing(pair):
    p = pair.put(three)
    gone = pair.call("operator.__neg__", p, ids=(0,), flags=0)
    assert gone not in pair.compiled.host.store._by_id
    assert pair.left == []


def test_an_object_that_comes_back_gets_a_further_id(pair):
    p = pair.put(three)
    same = pair.call("Tensor.contiguous", p, ids=(0,))
    assert pair.entry(same) is pair.entry(p)
    assert pair.entry(p).ids == [p, same]
    pair.call("operator.__neg__", same, ids=(0,), frees=(p,))
    assert pair.entry(same).ids == [same]


@pytest.mark.parametrize("value", [7, 1e300, "text", b"bytes", True, None])
def test_an_atom_is_another_object_each_time(pair, value):
    first, second = (pair.call("operator.__getitem__", p, 0, ids=(0,)) for p in values(pair, value))
    assert pair.value(first) is pair.value(second)
    assert pair.entry(first) is not pair.entry(second)
    assert (pair.entry(first).ids, pair.entry(second).ids) == ([first], [second])
    assert pair.left == []


def values(pair, value):
    return pair.put(lambda: [value]), pair.put(lambda: [value])


@pytest.mark.parametrize("name", ["Tensor.t", "Tensor.detach", "Tensor.flatten", "torch.real"])
def test_a_view_is_in_the_domain_of_its_base(pair, name):
    p = pair.put(lambda: torch.ones(2, 2))
    view = pair.call(name, p, ids=(0,))
    assert pair.entry(view).domain is pair.entry(p).domain
    assert pair.left == []
    for side in (pair.compiled, pair.general):
        side.host.store.entry(p).domain.taint()
    assert pair.entry(view).domain.private
    pair.call("operator.__neg__", view, ids=(0,))
    assert pair.entry(pair.number).domain.private
    assert pair.left == [pair.number]


def test_what_is_made_of_an_object_that_holds_others_is_private_with_it(pair):
    whole = pair.put(lambda: [three(), three()])
    part = pair.call("operator.__getitem__", whole, 1, ids=(0,))
    assert pair.entry(part).domain._sources == (pair.entry(whole).domain,)
    for side in (pair.compiled, pair.general):
        side.host.store.entry(whole).domain.taint()
    pair.call("operator.__neg__", part, ids=(0,))
    assert pair.left == [pair.number]
    assert pair.entry(pair.number).domain.private


@pytest.mark.parametrize("place", [0, 1])
def test_private_objects_are_left_to_the_general_way(pair, place):
    objects = [pair.put(three, private=place == 0), pair.put(three, private=place == 1)]
    result = pair.call("operator.__add__", *objects, ids=(0, 1))
    assert pair.left == [result]
    assert pair.entry(result).domain.private


def test_a_result_that_is_to_be_private_is(pair):
    pair.call("torch.ones", 2, private=True)
    assert pair.entry(pair.number).domain.private
    assert pair.left == [pair.number]


def test_sparse_and_empty_tensors_share_no_memory(pair):
    sparse, empty = pair.put(lambda: three().to_sparse()), pair.put(lambda: torch.empty(0))
    dense = pair.call("Tensor.to_dense", sparse, ids=(0,))
    again = pair.call("Tensor.to_sparse", dense, ids=(0,))
    twice = pair.call("operator.__add__", empty, empty, ids=(0, 1))
    assert pair.value(dense).tolist() == [1.0, 2.0, 3.0]
    assert pair.value(again).is_sparse
    assert pair.value(twice).tolist() == []
    assert len({id(pair.entry(i).domain) for i in (sparse, empty, dense, again, twice)}) == 5
    assert pair.left == []


def test_parameters_keep_their_class(pair):
    p = pair.put(lambda: nn.Parameter(three()))
    double = pair.call("operator.__mul__", p, 2, ids=(0,))
    pair.call("Tensor.detach", p, ids=(0,))
    assert pair.entry(pair.number).domain is pair.entry(p).domain
    assert pair.value(double).grad_fn is not None
    assert pair.left == []


@pytest.mark.parametrize("name", ["Tensor.add_", "operator.iadd", "Tensor.__imul__"])
def test_what_writes_into_an_object_is_left_to_the_general_way(pair, name):
    p, q = pair.put(three), pair.put(three)
    result = pair.call(name, p, q, ids=(0, 1))
    assert pair.left == [result]
    assert pair.entry(result) is pair.entry(p)
    assert pair.value(p).tolist() in ([2.0, 4.0, 6.0], [1.0, 4.0, 9.0])


def test_frees_in_front_are_done_also_where_the_call_is_not_taken(pair):
    p, q, view = pair.put(three), pair.put(three), pair.put(three, private=True)
    same = pair.call("Tensor.contiguous", p, ids=(0,))
    pair.call("operator.__neg__", view, ids=(0,), frees=(q, p | frames.WHOLE, 999))
    left = pair.compiled.host.store._by_id
    assert not {p, q, same} & set(left)
    assert pair.left == [pair.number]


# ---- all of it


NAMES = {
    1: ["operator.__neg__", "Tensor.t", "Tensor.contiguous", "Tensor.tolist", "Tensor.to_sparse",
        "Tensor.zero_", "Tensor.sum", ":builtins:list", ":builtins:repr", "Tensor.requires_grad_"],
    2: ["operator.__add__", "operator.__getitem__", "operator.iadd", "torch.matmul",
        "torch.maximum", ":builtins:max", "Tensor.view_as", "Tensor.data.__set__",
        "Tensor.copy_", "torch.nothing"],
}  # fmt: skip
ID = st.integers(1, 12)
OPERAND = ID.map(lambda n: (n, True)) | st.sampled_from([(1, False), (0.5, False)])
FREES = st.lists(ID | ID.map(lambda n: n | frames.WHOLE), max_size=2)
STEP = (
    st.integers(1, 2).flatmap(
        lambda n: st.tuples(
            st.sampled_from(NAMES[n]),
            st.lists(OPERAND, min_size=n, max_size=n),
            FREES,
            st.sampled_from([0, frames.KEEP, frames.KEEP, frames.KEEP, "asked"]),
        )
    )
    | ID
)  # it is fetched


@settings(max_examples=150)
@given(st.lists(STEP, max_size=12))
def test_both_ways_make_the_same_of_any_calls(steps):
    with pytest.MonkeyPatch.context() as monkeypatch:
        for pair in made(monkeypatch):
            for kind in (three, lambda: torch.ones(2, 2), lambda: [three(), 5], lambda: 3):
                pair.put(kind)
            pair.put(three, private=True)
            for step in steps:
                if isinstance(step, int):
                    pair.fetch(step)
                    continue
                name, operands, frees, flags = step
                ids = tuple(place for place, (_, is_id) in enumerate(operands) if is_id)
                args = [value for value, _ in operands]
                if flags == "asked":
                    pair.ask(name, *args, ids=ids, frees=frees)
                else:
                    pair.call(name, *args, ids=ids, frees=frees, flags=flags)


# ---- registered functions


def with_itself(value):
    return value, value


def test_registered_functions_go_the_general_way(transport):
    with fp.Cluster(["bob"], transport=transport, functions=[Held.twice, with_itself]) as cluster:
        bob = cluster["bob"]
        assert [bob.run(with_itself, n).get() for n in range(3)] == [(n, n) for n in range(3)]
        assert (bob.send(three()) + 1).get().tolist() == [2.0, 3.0, 4.0]
        with pytest.raises(fp.NotPermittedError):
            bob.run(os.getpid).get()
