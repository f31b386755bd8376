"""Errors: the tree, remote errors with both tracebacks, and those nobody looked at."""

import pickle
import sys

import pytest
import torch

import fedproc as fp
from tests.contract import things

TREE = {
    "PlacementError": TypeError,
    "ObjectGoneError": LookupError,
    "WorkerNotFoundError": KeyError,
    "NotPermittedError": PermissionError,
    "NotShippableError": TypeError,
    "ClosedError": Exception,
    "WorkerStartError": Exception,
    "WorkerLostError": Exception,
    "CommandTimeoutError": TimeoutError,
    "ArenaFullError": MemoryError,
    "RemoteError": Exception,
    "QuorumError": Exception,
    "CheckpointError": ValueError,
}


def test_the_tree():
    for name, base in TREE.items():
        assert issubclass(getattr(fp, name), fp.FedprocError), name
        assert issubclass(getattr(fp, name), base), name


def _line():
    return sys._getframe(1).f_lineno


def test_a_remote_error_is_an_instance_of_the_original_class(bob):
    bad = bob.run(things.fail)
    with pytest.raises(fp.RemoteError, match="no good") as caught:
        bad.get()
    assert isinstance(caught.value, ValueError)
    assert not isinstance(caught.value, KeyError)


def test_it_says_where_it_was_issued_and_where_it_failed(bob):
    line, bad = _line(), bob.run(things.fail)
    with pytest.raises(fp.RemoteError) as caught:
        bad.get()
    error = caught.value
    here = "test_it_says_where_it_was_issued_and_where_it_failed"
    assert error.issued_at.endswith(f":{line} in {here}")
    assert "test_errors.py" in error.issued_at
    assert error.worker == "bob"
    assert "fail" in error.remote_traceback
    assert "ValueError: no good" in error.remote_traceback
    assert error.issued_at in str(error)


ISSUERS = {
    "operator": lambda p: p @ p[:2],
    "method": lambda p: p.view(7),
    "function": lambda p: torch.reshape(p, (7,)),
    "index": lambda p: p[17],
    "property": lambda p: p.view(7).data,
}


def test_issued_at_is_the_users_line_for_every_kind_of_command(bob, x):
    p = bob.send(x)
    wrong = {}
    for name, issue in ISSUERS.items():
        with pytest.raises(fp.RemoteError) as caught:
            issue(p).get()
        if not caught.value.issued_at.endswith(f":{issue.__code__.co_firstlineno} in <lambda>"):
            wrong[name] = caught.value.issued_at
    assert wrong == {}


def test_issued_at_of_commands_without_a_result(cluster, bob, x):
    p = bob.send(x)
    line = _line() + 1
    p[17] = 1.0
    with pytest.raises(fp.RemoteError) as caught:
        cluster.wait()
    assert caught.value.issued_at.endswith(
        f":{line} in test_issued_at_of_commands_without_a_result"
    )
    assert isinstance(caught.value, IndexError)


def test_wrong_shapes_are_the_torch_error(bob, x):
    p, q = bob.send(x), bob.send(torch.ones(2))
    bad = p + q
    with pytest.raises(fp.RemoteError, match="must match the size") as caught:
        bad.get()
    assert isinstance(caught.value, RuntimeError)
    assert torch.equal((p * 2).get(), 2 * x)
    assert q.get().tolist() == [1.0, 1.0]


def test_dependants_fail_with_the_first_cause(bob, x):
    line, bad = _line(), bob.send(x).view(7)
    later = torch.stack([bad + 1, bad * 2]).sum()
    with pytest.raises(RuntimeError, match="shape") as caught:
        later.get()
    assert f":{line} in " in caught.value.issued_at
    assert bob.run(abs, -1).get() == 1


def test_get_wait_and_fetch_all_raise_it(bob):
    bad = bob.run(things.fail)
    for look in (bad.wait, bad.fetch, bad.get, bad.wait):
        with pytest.raises(ValueError, match="no good"):
            look()
    assert bad.done() is True


@pytest.mark.parametrize(
    ("function", "original"),
    [(things.raise_awkward, things.AwkwardError), (lambda: {}["k"], KeyError)],
    ids=["awkward constructor", "KeyError"],
)
def test_classes_that_are_hard_to_rebuild(bob, function, original):
    bad = bob.run(function)
    with pytest.raises(original) as caught:
        bad.get()
    assert isinstance(caught.value, fp.RemoteError)
    assert caught.value.worker == "bob"


def test_awkward_errors_keep_their_text(bob):
    bad = bob.run(things.raise_awkward)
    with pytest.raises(fp.RemoteError, match="7: seven is too many"):
        bad.get()


def test_a_class_that_cannot_be_subclassed_gives_a_plain_remote_error(bob):
    bad = bob.run(things.raise_final)
    with pytest.raises(fp.RemoteError, match="no heirs") as caught:
        bad.get()
    assert type(caught.value) is fp.RemoteError
    assert "FinalError" in caught.value.remote_traceback


def test_system_exit_and_the_like_are_plain_remote_errors(bob):
    other = bob.send(1)
    for leave in (things.leave, things.interrupt, things.generator_exit):
        bad = bob.run(leave)
        with pytest.raises(fp.RemoteError) as caught:
            bad.get()
        assert type(caught.value) is fp.RemoteError
    assert bob.alive is True
    assert other.get() == 1


def test_an_error_inside_an_error_keeps_both_in_the_text(bob):
    def chain():
        try:
            _ = 1 / 0
        except ZeroDivisionError as error:
            raise LookupError("outer") from error

    bad = bob.run(chain)
    with pytest.raises(LookupError, match="outer") as caught:
        bad.get()
    assert "ZeroDivisionError" in caught.value.remote_traceback


def test_a_remote_fedproc_error_is_no_mystery(bob):
    def nested():
        raise fp.PlacementError("made there")

    bad = bob.run(nested)
    with pytest.raises(fp.PlacementError, match="made there"):
        bad.get()


def test_unseen_errors_come_first_submitted_first(cluster, bob, alice):
    held = [bob.run(things.fail_late, "first"), alice.run(things.fail, "second")]
    with pytest.raises(ValueError, match="first"):
        cluster.wait()
    with pytest.raises(ValueError, match="second"):
        cluster.wait()
    cluster.wait()
    del held


def test_unseen_errors_of_dropped_pointers_are_raised(cluster, bob):
    bob.run(things.fail, "dropped")
    with pytest.raises(ValueError, match="dropped"):
        cluster.wait()
    cluster.wait()


def test_unseen_errors_of_commands_without_result_are_raised(cluster, bob, x):
    p = bob.send(x)
    p[7] = 0.0
    with pytest.raises(IndexError):
        cluster.wait()
    assert torch.equal(p.get(), x)


def test_failed_commands_without_result_leave_nothing_in_the_worker(cluster, bob, x):
    def tombstones():
        import gc

        from fedproc.worker.store import Tombstone

        return sum(type(thing) is Tombstone for thing in gc.get_objects())

    p, before = bob.send(x), bob.run(tombstones).get()
    for _ in range(3):
        p[7] = 0.0
    later = p.view(7)
    assert bob.run(tombstones).get() - before == 1
    for _ in range(3):
        with pytest.raises(IndexError):
            cluster.wait()
    with pytest.raises(fp.RemoteError):
        later.wait()


def test_seen_errors_are_not_raised_again(cluster, bob):
    bad = bob.run(things.fail, "seen")
    later = bad + 1
    with pytest.raises(ValueError, match="seen"):
        later.get()
    cluster.wait()
    del bad


def test_an_error_seen_through_gather_or_shape_counts(cluster, bob):
    one, two = bob.run(things.fail, "one"), bob.run(things.fail, "two")
    with pytest.raises(ValueError, match="one"):
        fp.gather([one])
    with pytest.raises(fp.RemoteError, match="two"):
        two.shape  # noqa: B018
    cluster.wait()


def test_the_end_of_with_raises_unseen_errors(transport):
    cluster = fp.Cluster(["bob"], transport=transport)

    def block():
        with cluster:
            cluster["bob"].run(things.fail, "unseen")
            cluster["bob"].run(things.fail, "too late")

    with pytest.raises(ValueError, match="unseen"):
        block()
    assert cluster.workers[0].alive is False


def test_the_end_of_with_does_not_repeat_seen_errors(transport):
    with fp.Cluster(["bob"], transport=transport) as cluster:
        bad = cluster["bob"].run(things.fail, "seen")
        with pytest.raises(ValueError, match="seen"):
            bad.get()


def test_the_bodys_own_exception_wins(transport):
    def block():
        with fp.Cluster(["bob"], transport=transport) as cluster:
            cluster["bob"].run(things.fail, "unseen").done()
            raise KeyError("body")

    with pytest.raises(KeyError, match="body"):
        block()


def test_close_does_not_raise(transport):
    cluster = fp.Cluster(["bob"], transport=transport)
    cluster["bob"].run(things.fail, "unseen")
    cluster.close()


def test_all_errors_pickle(cluster, bob, alice, x, gate):
    p, q = bob.send(x), alice.send(x)
    gone = bob.send(x)
    gone.get()
    held = alice.run(gate.hold)
    late = things.outcome(lambda: held.wait(timeout=0.01))
    gate.open()
    held.wait()
    bad = bob.run(things.raise_awkward)
    errors = [
        late,
        things.outcome(lambda: p + q),
        things.outcome(lambda: gone.get()),
        things.outcome(lambda: cluster["nobody"]),
        things.outcome(lambda: bob.send(x, private=True).get()),
        things.outcome(lambda: bob.send(sys._getframe())),
        things.outcome(bad.get),
    ]
    for error in errors:
        again = pickle.loads(pickle.dumps(error))
        assert type(again).__name__ == type(error).__name__
        assert isinstance(again, fp.FedprocError)
        assert str(again) == str(error)
    again = pickle.loads(pickle.dumps(errors[-1]))
    assert isinstance(again, things.AwkwardError)
    assert again.worker == "bob"
    assert again.issued_at == errors[-1].issued_at
    assert again.remote_traceback == errors[-1].remote_traceback


def test_a_lost_worker_error_pickles(cluster, bob, x):
    p = bob.send(x)
    p.wait()
    bob.kill()
    error = things.outcome(p.get)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is fp.WorkerLostError
    for name in ("worker", "exitcode", "signal", "last_command"):
        assert getattr(again, name) == getattr(error, name)
    assert again.worker == "bob"


def fail_in_group(parts):
    raise ExceptionGroup("several", parts)  # noqa: F821 - of Python 3.11


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups are of Python 3.11")
def test_an_exception_group_comes_as_one(bob):
    parts = [ValueError("a"), KeyError("b")]
    with pytest.raises(ExceptionGroup) as caught:  # noqa: F821
        bob.run(fail_in_group, parts).get()
    error = caught.value
    assert isinstance(error, fp.RemoteError)
    assert error.worker == "bob"
    assert "several (2 sub-exceptions)" in str(error)
    assert [repr(part) for part in error.exceptions] == ["ValueError('a')", "KeyError('b')"]
    matched, rest = error.split(ValueError)
    assert [repr(part) for part in matched.exceptions] == ["ValueError('a')"]
    assert [repr(part) for part in rest.exceptions] == ["KeyError('b')"]
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, ExceptionGroup)  # noqa: F821
    assert (str(copy), copy.worker) == (str(error), "bob")
    assert [repr(part) for part in copy.exceptions] == ["ValueError('a')", "KeyError('b')"]


def fail_in_private_group(value):
    fail_in_group([ValueError(value)])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups are of Python 3.11")
def test_an_exception_group_about_private_values_comes_without_its_parts(bob):
    with pytest.raises(fp.RemoteError) as caught:
        bob.run(fail_in_private_group, bob.send("secret", private=True)).get()
    assert not isinstance(caught.value, ExceptionGroup)  # noqa: F821
    assert "ExceptionGroup" in str(caught.value)
    assert "secret" not in repr(vars(caught.value)) + str(caught.value)
