"""What is kept of failures, and for how long: as long as somebody may ask."""

import pickle

import pytest

import fedproc as fp
from fedproc.remote.failures import MOST_CAUSES, MOST_SEEN, Failures
from fedproc.remote.site import Site

FAILURE = (None, pickle.dumps(ValueError), "ValueError", "no good", "Traceback", None)
MANY = 3 * MOST_CAUSES


def fail():
    raise ValueError("no good")


def _failures(held):
    return Failures("bob", dict.fromkeys(held, "its handle").get)


def _by_itself(failures, number):
    failures.add(number, Site.nowhere(), number, FAILURE)


def _by_cause(failures, number, cause):
    failures.add(number, Site.nowhere(), cause, None)


def _raises(failures, number, error=ValueError, match="no good"):
    with pytest.raises(error, match=match):
        failures.raise_for(number)


def test_results_that_depend_on_a_failure_are_kept_while_they_are_held():
    failures = _failures([2, 3])
    _by_itself(failures, 1)
    for number in range(2, MANY):
        _by_cause(failures, number, 1)
    kept = [number for number in range(2, MANY) if failures.failed(number)]
    assert kept[:2] == [2, 3]
    assert len(kept) <= MOST_CAUSES
    # the newest may be about to be held: their numbers are drawn before there is a handle
    assert kept[-MOST_SEEN:] == list(range(MANY - MOST_SEEN, MANY))
    for number in (2, 3, MANY - 1):
        _raises(failures, number)


def test_as_many_are_kept_as_are_held():
    failures = _failures(range(MANY))
    _by_itself(failures, 0)
    for number in range(1, MANY):
        _by_cause(failures, number, 0)
    assert all(failures.failed(number) for number in range(MANY))


def test_failures_that_were_seen_are_forgotten_unless_their_result_is_held():
    failures = _failures([1])
    for number in range(1, MANY):
        _by_itself(failures, number)
        _raises(failures, number)
    kept = [number for number in range(1, MANY) if failures.failed(number)]
    assert kept[0] == 1
    assert len(kept) <= MOST_CAUSES + MOST_SEEN
    assert failures.is_seen(1)
    _raises(failures, 1, fp.FedprocError, "command 1 on worker 'bob', .*, failed long ago")


def test_a_result_fails_although_its_cause_is_forgotten():
    failures = _failures([])
    for number in range(1, MANY):
        _by_itself(failures, number)
        _raises(failures, number)
    assert not failures.failed(1)
    _by_cause(failures, MANY, 1)
    assert failures.is_seen(MANY)
    _raises(failures, MANY, fp.FedprocError, "command 1 on worker 'bob', .*, failed long ago")


def test_results_that_were_dropped_leave_nothing(bob):
    bad = bob.run(fail)
    held = bad + 1
    for _ in range(MANY):
        bad + 1
    with pytest.raises(ValueError, match="no good"):
        bad.wait()
    bob.run(abs, -1).get()
    assert len(bob.link.failures._causes) <= MOST_CAUSES
    with pytest.raises(ValueError, match="no good"):
        held.wait()
