"""Flat calls in a worker: failures, counts, modes and names are those of the general way."""

import _thread
import functools
import pickle
import signal
import sys
import types

import pytest
import torch

from fedproc import autocast
from fedproc.worker import flat
from fedproc.worker import loop as loops
from tests.worker.pair import DONE, FAILED, REFUSAL, needs_compiled, state, three

pytestmark = needs_compiled


def user(name):
    return f":{__name__}:{name}"


# ---- what goes wrong


def fail(text="no good"):
    raise ValueError(text)


def leave(text):
    sys.exit(text)


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("not to be shown")


def unspeakable():
    raise Unspeakable


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        (user("fail"), (), "ValueError: no good"),
        (user("leave"), ("over",), "SystemExit: over"),
        (user("unspeakable"), (), "Unspeakable: <its message cannot be shown: RuntimeError>"),
        ("operator.__truediv__", (1, 0), "ZeroDivisionError: division by zero"),
        ("torch.zeros", ("a",), None),
        ("torch.no_such_name", (), None),
        (user("no_such_name"), (), None),
        (":no_such_module:f", (), "ModuleNotFoundError: No module named 'no_such_module'"),
        ("torch.pi", (), "TypeError: 'torch.pi' is not a function but float"),
    ],
)
def test_what_fails_is_told_at_once_and_leaves_a_tombstone(pair, name, args, expected):
    bad = pair.call(name, *args)
    assert [(number, cause) for number, cause, _ in pair.failures] == [(bad, bad)]
    assert expected is None or pair.failures[0][2] == expected
    assert pair.compiled.told()[-1][:2] == (DONE, bad)
    assert pair.compiled.host.store._by_id[bad].cause == bad
    uses = pair.call("operator.__neg__", bad, ids=(0,))
    again = pair.call("operator.__neg__", uses, ids=(0,))
    assert pair.failures[1:] == [(uses, bad, None), (again, bad, None)]


def test_the_traceback_is_the_users(pair):
    pair.call(user("fail"), "why")
    trace = next(f[1].traceback for kind, _, f in pair.compiled.told() if kind == FAILED)
    assert "in fail" in trace
    assert "fedproc/worker" not in trace


def test_an_object_that_is_gone_fails_as_ever(pair):
    p = pair.put(three)
    pair.call("operator.__neg__", p, ids=(0,), frees=(p,))
    ((number, cause, text),) = pair.failures
    assert number == cause
    assert text.startswith(f"ObjectGoneError: object {p} is not on worker 'bob' any more")


def test_what_failed_without_keep_leaves_no_tombstone(pair):
    pair.call(user("fail"), flags=0)
    assert pair.compiled.host.store._by_id == {}
    assert len(pair.failures) == 1


@pytest.mark.parametrize(
    "body", [b"", b"garbage", pickle.dumps((1, 2, 3, 4, 5), 5), pickle.dumps(7, 5)]
)
def test_a_body_that_cannot_be_read_fails_the_same(pair, body):
    bad = pair.give(body)
    assert [number for number, *_ in pair.failures] == [bad]
    assert pair.value(pair.call(":builtins:abs", -1)) == 1


def stopped(signum, frame):
    raise ValueError("stopped")


class Signalling:
    """Has a method that runs no Python."""

    __neg__ = staticmethod(functools.partial(_thread.interrupt_main, signal.SIGUSR1))

    def __repr__(self):  # the same on both sides
        return "signalling"


def test_a_signal_in_the_function_is_its_failure_and_nothing_is_kept_or_answered(pair):
    before = signal.signal(signal.SIGUSR1, stopped)
    try:
        call = pair.call(":_thread:interrupt_main", int(signal.SIGUSR1))
        asked = pair.ask("operator.__neg__", pair.put(Signalling), ids=(0,))
    finally:
        signal.signal(signal.SIGUSR1, before)
    told = [(kind, number) for kind, number, _ in pair.compiled.told() if number in (call, asked)]
    assert told == [(FAILED, call), (DONE, call), (REFUSAL, asked)]
    assert "stopped" in pair.failures[0][2]
    assert pair.left == []


# ---- numbers and counts


def test_a_number_that_was_there_is_ignored(pair):
    p = pair.put(three)
    body = pickle.dumps(("operator.__neg__", (p,), {}, None, False, (0,)), 5)
    number = pair.give(body, frees=(17,))
    before = state(pair.compiled)
    for old in (number, number - 1):
        pair.give(body, number=old, frees=(p,))
    assert state(pair.compiled) == before


def test_commands_are_counted_noted_and_reported_in_time(pair):
    for _ in range(loops.REPORT_COMMANDS - 1):
        pair.call(":builtins:abs", -1)
    assert pair.compiled.told() == []
    last = pair.call(":builtins:abs", -1)
    assert pair.compiled.told() == [(DONE, last, ())]
    assert pair.compiled.host.commands == last == pair.compiled.host.arena.done[0]
    assert pair.left == []


def test_a_worker_that_was_told_to_stop_does_nothing(pair):
    for side in (pair.compiled, pair.general):
        side.host.stopped = True
    pair.call(":builtins:abs", -1)
    assert pair.compiled.host.commands == 0


def test_a_long_command_is_reported_at_once(pair):
    flat.prepared(loops.REPORT_COMMANDS, -1.0)  # any is long
    loops.REPORT_SECONDS = -1.0  # the fixture puts it back
    number = pair.call(":builtins:abs", -1)
    assert pair.compiled.told() == [(DONE, number, ())]


# ---- modes


def without_gradients(fails):
    torch.set_grad_enabled(False)
    return fail() if fails else 1


def in_double(fails):
    torch.set_default_dtype(torch.float64)
    return fail() if fails else 1


def in_autocast(fails):
    torch.autocast("cpu", dtype=torch.bfloat16).__enter__()
    return fail() if fails else 1


def switched_off(fails):
    torch.autocast("cpu", enabled=False).__enter__()
    return fail() if fails else 1


def modes():
    return torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("how", [without_gradients, in_double, in_autocast, switched_off])
def test_modes_that_a_function_leaves_are_usual_again(pair, how, fails):
    pair.call(user(how.__name__), fails)
    assert modes() == (True, torch.float32, False)
    assert autocast.depth() == 0
    assert pair.left == []
    assert len(pair.failures) == fails
    assert pair.value(pair.call(user("modes"))) == (True, torch.float32, False)


def test_modes_that_travel_are_left_to_the_general_way(pair):
    p = pair.put(lambda: three().requires_grad_())
    none = pair.call("operator.__neg__", p, ids=(0,), modes=(False, False, None, torch.float32))
    double = pair.call("torch.ones", 1, modes=(True, False, None, torch.float64))
    assert pair.left == [none, double]
    assert not pair.value(none).requires_grad
    assert pair.value(double).dtype is torch.float64


# ---- names


@pytest.mark.parametrize("path", ["told", "Kind.told"])
def test_a_module_that_is_loaded_anew_is_looked_up_again(pair, monkeypatch, path):
    def load(value):
        module = types.ModuleType("loaded_anew")
        module.told = lambda: value
        module.Kind = type("Kind", (), {"told": staticmethod(lambda: value)})
        monkeypatch.setitem(sys.modules, "loaded_anew", module)

    for value in (1, 2):
        load(value)
        assert pair.value(pair.call(f":loaded_anew:{path}")) == value


def test_a_module_is_imported_when_it_is_needed(pair, monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert pair.value(pair.call(":colorsys:rgb_to_hsv", 0, 0, 0)) == (0.0, 0.0, 0)
    assert pair.value(pair.call(":colorsys:rgb_to_hsv", 1, 1, 1)) == (0.0, 0.0, 1)
    assert len(pair.left) == 1
