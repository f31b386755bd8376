"""Random lives of pointers, against a model in plain Python: values, owners, places, errors."""

import gc
import operator
from contextlib import suppress

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

import fedproc as fp
from tests.fuzz.amount import amount
from tests.fuzz.model import Handle, Held, Model, Place, Slot, Thing

NAMES = ["alice", "bob", "carol"]
WORKERS = st.sampled_from(NAMES)
WHICH = st.integers(0, 10_000)
SHAPES = st.sampled_from([(), (0,), (3,), (2, 2), (2, 3), (5000,)])  # the last goes by the arena

UNARY = {
    "neg": operator.neg,
    "plus": lambda t: t + 1,
    "times": lambda t: 2 * t,
    "sum": lambda t: t.sum(),
    "clone": torch.clone,
    "first": lambda t: t[0],
    "rest": lambda t: t[1:],
    "flat": lambda t: t.view(-1),
    "reshaped": lambda t: t.reshape(-1),
    "turned": lambda t: t.transpose(0, -1),
    "detached": lambda t: t.detach(),
    "contiguous": lambda t: t.contiguous(),
    "view_of_seven": lambda t: t.view(7),
}
IN_PLACE = {
    "add_": lambda t: t.add_(1),
    "mul_": lambda t: t.mul_(2),
    "zero_": lambda t: t.zero_(),
    "transpose_": lambda t: t.transpose_(0, -1),
    "setitem": lambda t: operator.setitem(t, 0, 7),
    "iadd": lambda t: operator.iadd(t, 3),
}
BINARY = {
    "add": operator.add,
    "cat": lambda a, b: torch.cat([a, b]),
    "maximum": torch.maximum,
    "of_run": lambda a, b: a * b,
}


def same(thing):
    return thing


def attempt(action):
    """What the action gives, or the error."""
    try:
        return action(), None
    except Exception as error:
        return None, error.with_traceback(None)


class PointerMachine(RuleBasedStateMachine):
    def __init__(self, cluster: fp.Cluster) -> None:
        super().__init__()
        self.cluster = cluster
        self.model = Model()
        self.sites = {name: Place(cluster[name]) for name in NAMES}
        self.serial = 0

    # ---- helpers

    def pick(self, which: int) -> Held:
        return self.model.held[which % len(self.model.held)]

    def hold(self, pointer, handle: Handle, **rest) -> Held:
        self.model.held.append(Held(pointer, handle, **rest))
        return self.model.held[-1]

    def refused(self, error, expected) -> bool:
        """Whether an action was to fail; it did, with an error of a class that was expected."""
        if not expected:
            assert error is None, repr(error)
            return False
        assert isinstance(error, tuple(expected)), (error, expected)
        with suppress(*expected):  # told by the call above, or by this one
            self.cluster.wait()
        return True

    def settled(self, action):
        """Act and wait: the result, or the error of the action itself."""

        def act():
            result = action()
            self.cluster.wait()
            return result

        return attempt(act)

    # ---- making

    @initialize()
    def start(self):
        self.send("bob", (3,), "")
        self.send("alice", (2, 2), "tag")

    @rule(name=WORKERS, shape=SHAPES, tag=st.sampled_from(["", "tag"]))
    def send(self, name, shape, tag):
        self.serial += 1
        value = torch.arange(self.serial, self.serial + shape_size(shape)).reshape(shape)
        pointer = self.sites[name].worker.send(value.clone(), tags=tag or ())
        self.hold(pointer, self.model.result(value, self.sites[name]))

    @precondition(lambda self: self.model.held)
    @rule(which=WHICH, name=st.sampled_from(sorted(UNARY)))
    def compute(self, which, name):
        held, operation = self.pick(which), UNARY[name]
        self.keep(lambda: operation(held.pointer), lambda: operation(held.tensor), held)

    @precondition(lambda self: self.model.held)
    @rule(which=WHICH)
    def alias(self, which):
        held = self.pick(which)
        worker = held.handle.thing.site.worker
        self.keep(lambda: worker.run(same, held.pointer), lambda: held.tensor, held)

    @precondition(lambda self: self.model.held)
    @rule(which=WHICH)
    def copy(self, which):
        held = self.pick(which)
        self.keep(held.pointer.copy, lambda: held.tensor.clone(), held)

    def keep(self, there, here, *held):
        """Make a new object from others."""
        places = {one.handle.thing.site for one in held}
        expected = set().union(*(one.handle.errors() for one in held))
        if len(places) > 1:
            expected |= {fp.PlacementError}
        local, failure = (None, None) if expected else attempt(here)
        if not expected and failure is None:
            (site,) = places
            self.hold(there(), self.model.result(local, site))
            return
        pointer, error = attempt(there)
        if error is not None:
            assert expected
            self.refused(error, expected)
            return
        (site,) = places
        expected = expected or {type(failure)}
        _, error = attempt(pointer.wait)
        self.refused(error, expected)
        if failure is not None:
            # the tombstone: every use of it fails with that error
            thing = Thing(None, site, type(failure))
            self.hold(pointer, self.model.handle(thing))

    @precondition(lambda self: self.model.held)
    @rule(one=WHICH, two=WHICH, name=st.sampled_from(sorted(BINARY)))
    def combine(self, one, two, name):
        a, b, operation = self.pick(one), self.pick(two), BINARY[name]
        self.keep(
            lambda: operation(a.pointer, b.pointer), lambda: operation(a.tensor, b.tensor), a, b
        )

    # ---- changing

    @precondition(lambda self: self.model.held)
    @rule(which=WHICH, name=st.sampled_from(sorted(IN_PLACE)))
    def change(self, which, name):
        held, operation = self.pick(which), IN_PLACE[name]
        expected = held.handle.errors()
        if not expected:
            _, failure = attempt(lambda: operation(held.tensor))
            expected = {type(failure)} if failure else set()
        if expected:
            _, error = self.settled(lambda: operation(held.pointer))
            if error is not None or not held.handle.thing.error:
                self.refused(error, expected)  # of a failed result: told once, when it was made
            return
        result = operation(held.pointer)
        assert result is None or result is held.pointer

    # ---- reading

    def check_value(self, value, held):
        assert torch.equal(value, held.tensor), (value, held.tensor)
        assert (value.shape, value.dtype) == (held.tensor.shape, held.tensor.dtype)

    @precondition(lambda self: self.model.held)
    @rule(which=WHICH)
    def fetch(self, which):
        held = self.pick(which)
        value, error = attempt(held.pointer.fetch)
        if not self.refused(error, held.handle.errors()):
            self.check_value(value, held)
            value.fill_(-1)  # ours alone

    @precondition(lambda self: self.model.held)
    @rule(which=WHICH)
    def shape(self, which):
        held = self.pick(which)
        found, error = attempt(lambda: (tuple(held.pointer.shape), held.pointer.dtype))
        if held.handle.errors():  # what was told before may be answered from memory
            assert error is None or isinstance(error, tuple(held.handle.errors()))
            with suppress(*held.handle.errors()):
                self.cluster.wait()
        else:
            assert found == (tuple(held.tensor.shape), held.tensor.dtype)

    @precondition(lambda self: self.model.held)
    @rule(which=WHICH)
    def wait(self, which):
        held = self.pick(which)
        _, error = attempt(held.pointer.wait)
        # The object was made, even if it is gone there by now.
        if error is not None:
            assert isinstance(error, tuple(held.handle.errors())), error

    @precondition(lambda self: self.model.held)
    @rule(which=WHICH, write=st.booleans())
    def borrow(self, which, write):
        held = self.pick(which)

        def use():
            with held.pointer.borrow() as lent:
                self.check_value(lent, held)
                if write:
                    assert held.pointer.add_(1) is held.pointer
                    assert torch.equal(lent, held.tensor)
                    with pytest.raises(fp.FedprocError, match="for ever"):
                        held.pointer.fetch()

        _, error = attempt(use)
        if not self.refused(error, held.handle.errors()) and write:
            held.tensor.add_(1)

    @precondition(lambda self: self.model.held)
    @rule(which=WHICH)
    def get(self, which):
        held = self.pick(which)
        if held.slot is not None:
            self.get_chain(held)
            return
        expected = held.handle.errors()
        value, error = attempt(held.pointer.get)
        if not self.refused(error, expected):
            self.check_value(value, held)
            self.model.take(held.handle)

    def get_chain(self, held):
        expected = set()
        if held.handle.gone:
            expected = {fp.ObjectGoneError}
        elif not held.slot.site.alive:
            expected = {fp.WorkerLostError}
        inner, error = attempt(held.pointer.get)
        if self.refused(error, expected):
            return
        assert inner is held.slot.inner.pointer
        if held.slot.inner not in self.model.held:
            self.model.held.append(held.slot.inner)
        held.handle = self.model.handle(Thing(None, held.slot.site))
        held.handle.gone = held.handle.dead = True
        held.slot, held.owns = None, False
        self.model.sweep()

    # ---- moving

    @precondition(lambda self: self.model.held)
    @rule(which=WHICH, name=WORKERS)
    def move(self, which, name):
        held, site = self.pick(which), self.sites[name]
        stays = held.handle.thing.site is site
        expected = {fp.ObjectGoneError} if held.handle.gone else set()
        if not stays and not expected:
            expected = held.handle.errors()
        result, error = attempt(lambda: held.pointer.move(site.worker))
        if self.refused(error, expected):
            return
        assert result is held.pointer
        held.slot = None
        if not stays:
            self.model.move(held.handle, site)
        assert held.pointer.worker is site.worker
        self.model.sweep()

    @precondition(lambda self: self.model.held)
    @rule(which=WHICH, name=WORKERS)
    def chain(self, which, name):
        held, site = self.pick(which), self.sites[name]
        pointer, error = attempt(lambda: held.pointer.send(site.worker))
        if not self.refused(error, held.handle.errors()):
            # a chain shares the owner of what it was made from, if that has one
            self.hold(pointer, held.handle, owns=held.owns, slot=Slot(held, site))

    @precondition(lambda self: self.model.held)
    @rule(which=WHICH)
    def remote_get(self, which):
        held = self.pick(which)
        slot = held.slot
        if slot is None:
            expected = {fp.ObjectGoneError} if held.handle.gone else {fp.PlacementError}
        elif slot.inner.slot is not None:
            expected = set()
        else:
            expected = held.handle.errors()
            expected = expected or (set() if slot.site.alive else {fp.WorkerLostError})
        result, error = attempt(held.pointer.remote_get)
        if self.refused(error, expected):
            return
        assert result is held.pointer
        if slot.inner.slot is not None:
            slot.inner.slot, slot.inner = None, slot.inner.slot.inner
        else:
            self.model.move(held.handle, slot.site)
            held.slot = None
        self.model.sweep()

    # ---- letting go

    @precondition(lambda self: self.model.held)
    @rule(which=WHICH)
    def drop(self, which):
        self.model.drop(self.pick(which))

    @rule(name=WORKERS)
    def search(self, name):
        site = self.sites[name]
        for pointer in site.worker.search("tag"):
            owners = [h for h in self.model.reached() if h.pointer._handle is pointer._handle]
            assert owners
            assert owners[0].handle.errors() == set()
            self.hold(pointer, owners[0].handle, owns=False)

    @rule(name=WORKERS)
    def clear(self, name):
        self.sites[name].worker.clear()
        self.model.clear(self.sites[name])

    @rule(name=WORKERS)
    def kill(self, name):
        old = self.sites[name]
        old.worker.kill()
        old.alive = False
        with suppress(fp.WorkerLostError):
            self.cluster.wait()
        new = self.cluster[name]
        assert new is not old.worker
        assert (new.alive, old.worker.alive) == (True, False)
        self.sites[name] = Place(new)

    # ---- looking

    @precondition(lambda self: self.model.held)
    @rule(which=WHICH)
    def look(self, which):
        held = self.pick(which)
        assert held.pointer.worker is held.site().worker
        assert f" on {held.site().worker.name}" in repr(held.pointer)

    @rule()
    def count(self):
        self.cluster.wait()
        for site in self.sites.values():
            expected = self.model.count(site)
            if len(site.worker.objects) != expected:
                gc.collect()  # an error that was raised keeps its frames for a while
            assert len(site.worker.objects) == expected, site.worker.objects
            assert site.worker.stats().objects == expected

    def teardown(self):
        try:
            self.count()
            while self.model.held:
                self.model.drop(self.model.held[-1])
            self.count()
        finally:
            for name in NAMES:
                self.cluster[name].clear()
            with suppress(fp.FedprocError):
                self.cluster.wait()


def shape_size(shape):
    return int(torch.Size(shape).numel())


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.timeout(240)  # a busy machine takes many times as long as a quiet one
@pytest.mark.parametrize(("transport", "examples"), [("inline", 30), ("process", 6)])
def test_pointers_live_as_the_model_says(transport, examples):
    with fp.Cluster(NAMES, transport=transport, restart=True) as cluster:
        run_state_machine_as_test(lambda: PointerMachine(cluster), settings=amount(examples, 40))
