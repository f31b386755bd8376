"""Pointers to anything else: methods, attributes, items, truth; optimizers as objects."""

import collections
import copyreg
import functools

import numpy as np
import pytest
import torch

import fedproc as fp
from tests.contract.things import Counter, each


@pytest.fixture
def c(bob):
    return bob.send(Counter(5))


def test_methods_run_there_and_give_pointers(c, bob):
    result = c.add(2, times=3)
    assert result.worker is bob
    assert result.get() == 11
    assert c.add().get() == 12


def test_attributes_are_fetched_by_get(c):
    c.add(1).wait()
    assert c.total.get() == 6
    assert c.kind.get() == "counter"
    assert c.total.fetch() == 6


def test_tensors_are_taken_as_arguments(c, bob, x):
    c.keep(bob.send(x)).wait()
    assert torch.equal(c.tensor.get(), x)


def test_methods_do_not_wait(c, bob, gate):
    held = bob.run(gate.hold)
    result = c.add(1)
    assert not held.done()
    gate.open()
    assert result.get() == 6
    held.wait()


def test_items_len_and_iteration_of_a_sequence(bob):
    p = bob.send([10, 20, 30])
    assert p[1].get() == 20
    assert p[-1].fetch() == 30
    assert p[1:].get() == [20, 30]
    assert len(p) == 3
    assert [item.get() for item in p] == [10, 20, 30]


def test_items_of_a_mapping(bob):
    p = bob.send({"a": 1, "b": [2]})
    assert p["a"].get() == 1
    assert len(p) == 2
    assert p["b"][0].get() == 2
    assert p.get() == {"a": 1, "b": [2]}


def test_tensors_inside_objects_are_tensor_pointers(bob, x):
    p = bob.send({"x": x})
    inner = p["x"]
    assert isinstance(inner, fp.TensorPointer)
    inner.add_(1)
    assert p.get()["x"].tolist() == [2.0, 3.0, 4.0]


def test_a_tuple_result_unpacks(bob):
    a, b = bob.run(divmod, 7, 2)
    assert (a.get(), b.get()) == (3, 1)


def test_the_pointers_own_names_win(c, bob):
    assert c.id != "the object's own id"
    assert bob.run(getattr, c, "id").get() == "the object's own id"


def test_underscore_names_are_an_attribute_error_here(c):
    with pytest.raises(AttributeError):
        c._hidden  # noqa: B018
    assert not hasattr(c, "__wrapped__")


def test_truth_is_the_objects(bob):
    assert bool(bob.send([])) is False
    assert bool(bob.send([0])) is True
    assert bool(bob.send(0)) is False


def test_equality_is_identity(bob):
    p, q = bob.send([1]), bob.send([1])
    assert (p == p) is True
    assert (p == q) is False
    assert (p != q) is True
    assert len({p, q, p}) == 2


def test_a_missing_name_is_the_remote_error(c):
    with pytest.raises(fp.RemoteError, match="nothing"):
        c.nothing.get()


def test_a_method_that_raises(c):
    bad = c.fail()
    with pytest.raises(ValueError, match="counted too far") as caught:
        bad.get()
    assert isinstance(caught.value, fp.RemoteError)
    assert c.total.get() == 5


def test_a_result_that_cannot_travel_stays_usable(bob):
    p = bob.run(iter, [1, 2])
    lines = bob.run(lambda: (n * n for n in range(3)))
    with pytest.raises(fp.NotShippableError):
        lines.get()
    assert bob.run(next, lines).get() == 0
    assert bob.run(next, lines).get() == 1
    assert bob.run(next, p).get() == 1


OPTIMIZERS = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.1),
    "momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": functools.partial(torch.optim.Adam, lr=0.05),
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.05),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=0.01),
}


def test_optimizers_work_as_objects(bob):
    def check(kind):
        local = torch.tensor([3.0, -2.0], requires_grad=True)
        w = bob.send(local)
        opt, local_opt = bob.run(kind, [w]), kind([local])
        for weight, optimizer in ((w, opt), (local, local_opt)):
            for _ in range(4):
                optimizer.zero_grad()
                (weight**2).sum().backward()
                optimizer.step()
        assert torch.equal(w.get(), local)

    assert each(OPTIMIZERS, check) == {}


def test_schedulers_work_as_objects(bob):
    w = bob.send(torch.ones(1, requires_grad=True))
    opt = bob.run(torch.optim.SGD, [w], lr=1.0)
    schedule = bob.run(torch.optim.lr_scheduler.StepLR, opt, step_size=1, gamma=0.5)
    for _ in range(3):
        opt.zero_grad()
        w.sum().backward()
        opt.step()
        schedule.step()
    assert w.item() == 1.0 - (1.0 + 0.5 + 0.25)


def test_an_optimizer_of_pointers_elsewhere_is_refused(alice, bob):
    w = bob.send(torch.ones(1, requires_grad=True))
    with pytest.raises(fp.PlacementError):
        alice.run(torch.optim.SGD, [w], lr=0.1)


class Squares:
    """A sequence by its methods alone, as a map-style dataset is."""

    def __len__(self):
        return 3

    def __getitem__(self, place):
        return place * place


@pytest.mark.parametrize(
    ("value", "items"),
    [
        (range(3), [0, 1, 2]),
        ("abc", ["a", "b", "c"]),
        (collections.deque([4, 5]), [4, 5]),
        (np.arange(3), [0, 1, 2]),
        (Squares(), [0, 1, 4]),
    ],
)
def test_everything_that_has_numbered_items_is_iterated(bob, value, items):
    assert [item.get() for item in bob.send(value)] == items


@pytest.mark.parametrize("value", [{"a": 1}, {1, 2}, 7])
def test_what_has_no_numbered_items_is_not(bob, value):
    with pytest.raises(TypeError, match=r"is no sequence.*worker.run\(list, pointer\)"):
        iter(bob.send(value))


class Holder:
    def __init__(self):
        self.n, self.t, self.xs = 3, torch.ones(2), [1, 2]


def test_an_attribute_is_a_pointer_to_its_value(bob, x):
    o, pair = bob.send(Holder()), bob.send(torch.ones(2))
    assert torch.add(pair, o.t).tolist() == [2.0, 2.0]
    assert torch.sum(o.t).item() == 2.0
    assert ((o.n + 1).get(), (1 + o.n).get(), (-o.n).get()) == (4, 4, -3)
    assert (float(o.n), int(o.n), bool(o.n)) == (3.0, 3, True)
    assert (o.t > 0).tolist() == [True, True]
    assert 1 in o.xs
    assert [item.get() for item in o.xs] == [1, 2]
    assert o.xs[1].get() == 2
    twin = o.t.copy()
    twin.add_(1).wait()
    assert o.t.get().tolist() == [1.0, 1.0]


def test_an_attribute_can_be_sent_on(bob, alice):
    chain = bob.send(Holder()).t.send(alice)
    assert chain.worker is alice
    assert chain.fetch().tolist() == [1.0, 1.0]


def test_attributes_are_not_set_behind_the_users_back(bob):
    o = bob.send(Holder())
    with pytest.raises(AttributeError, match=r"worker.run\(setattr, pointer, 'n', value\)"):
        o.n = 5
    assert o.n.get() == 3
    bob.run(setattr, o, "n", 5).wait()
    assert o.n.get() == 5
    later = bob.run(Holder)
    with pytest.raises(AttributeError, match="cannot be set through the pointer"):
        later.n = 5


def _slotted():
    """Classes that travel by value: plain, with a text, inherited, empty, with names of its own."""

    class Plain:
        __slots__ = ("a", "b")

        def __init__(self):
            self.a, self.b = 1, torch.ones(2)

    class One:
        __slots__ = "a"  # noqa: PLC0205 - a text is one name

        def __init__(self):
            self.a = 1

    class Below(One):
        __slots__ = ("__weakref__", "c")

        def __init__(self):
            super().__init__()
            self.c = 2

    class Open(One):
        def __init__(self):
            super().__init__()
            self.d = 3

    class Hidden:
        __slots__ = ("__own",)

        def __init__(self):
            self.__own = 1

    class Empty:
        __slots__ = ()

    class BelowEmpty(Empty):
        __slots__ = ()

    class Explained:
        __slots__ = {"a": "what it is for"}

        def __init__(self):
            self.a = 1

    return [Plain, One, Below, Open, Hidden, Empty, BelowEmpty, Explained]


@pytest.mark.parametrize("cls", _slotted(), ids=lambda cls: cls.__name__)
def test_objects_with_slots_come_home(bob, alice, cls):
    def held(thing):
        return {name: getattr(thing, name) for name in copyreg._slotnames(type(thing))}

    def is_open(thing):
        return hasattr(thing, "__dict__")

    made = cls()
    for pointer in (bob.send(made), bob.run(cls), bob.send(made).move(alice)):
        there = pointer.worker
        assert there.run(is_open, pointer).get() == is_open(made)
        home = pointer.fetch()
        assert type(home) is cls
        assert str(held(home)) == str(held(made))
        assert getattr(home, "__dict__", {}) == getattr(made, "__dict__", {})
