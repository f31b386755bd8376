"""A RemoteError pickles and can be copied whatever the original was, and its text is never lost."""

import copy
import pickle
import sys
import threading

import pytest

import fedproc as fp
from fedproc import errors


class Importable(ValueError):
    """Can be found by its name."""


def local_class():
    class Local(Importable):
        pass

    error = Local("of a local class")
    error.row, error.shown = 3, lambda: 1
    raise error


def local_class_of_nothing():
    class Local(Exception):
        pass

    raise Local("of nothing else")


def with_attributes():
    error = Importable("with attributes")
    error.row, error.show, error.lock = 3, lambda: 1, threading.Lock()
    raise error


def missing_file():
    open("/no/such/file")  # noqa: SIM115, PTH123


def in_a_cluster_of_its_own():
    with fp.Cluster(["inner"]) as cluster:
        cluster["inner"].run(with_attributes).get()


def caught(bob, function) -> fp.RemoteError:
    with pytest.raises(fp.RemoteError) as found:
        bob.run(function).get()
    return found.value.with_traceback(None)


def again(error):
    return pickle.loads(pickle.dumps(error))


def facts(error):
    return str(error), error.worker, error.issued_at, error.remote_traceback


# ---------------------------------------------------------------- pickles


def test_of_a_local_class_it_pickles_as_the_nearest_that_can_be_imported(bob):
    error = caught(bob, local_class)
    assert type(error).__name__ == "RemoteLocal"
    twin = again(error)
    assert type(twin).__name__ == "RemoteImportable"
    assert isinstance(twin, (fp.RemoteError, Importable))
    assert facts(twin) == facts(error)
    assert twin.row == 3
    assert again(twin).row == 3
    assert type(again(twin)) is type(twin)


def test_of_a_local_class_of_nothing_special_it_pickles_as_a_remote_error(bob):
    error = caught(bob, local_class_of_nothing)
    twin = again(error)
    assert type(twin) is fp.RemoteError
    assert facts(twin) == facts(error)


def test_attributes_that_do_not_pickle_stay_behind(bob):
    error = caught(bob, with_attributes)
    assert error.show() == 1
    error.here = threading.Lock()
    twin = again(error)
    assert type(twin) is type(error)
    assert set(vars(twin)) == {"row", "worker", "issued_at", "remote_traceback"}
    assert facts(twin) == facts(error)
    assert twin.row == 3


def test_what_pickles_but_does_not_load_stays_behind(bob):
    error = caught(bob, with_attributes)
    error.cause = NeedsTwo(1, 2)
    assert pickle.dumps(error.cause)
    assert not hasattr(again(error), "cause")


def test_the_attributes_of_an_os_error_come_along(bob):
    error = caught(bob, missing_file)
    twin = again(error)
    assert type(twin) is type(error)
    assert (twin.errno, twin.strerror, twin.filename) == (
        2,
        "No such file or directory",
        "/no/such/file",
    )


def test_a_remote_error_of_a_remote_error_is_made_of_the_same_original(cluster):
    error = caught(cluster["bob"], in_a_cluster_of_its_own)
    assert isinstance(error, Importable)
    assert error.worker == "bob"
    assert "Importable in worker 'inner': with attributes" in str(error)
    twin = again(error)
    assert type(twin) is type(error)
    assert facts(twin) == facts(error)
    assert type(caught(cluster["bob"], with_attributes)) is type(error)


class Own(fp.RemoteError):
    """Of a user."""


def test_a_users_own_remote_error_keeps_its_class():
    class Local(Own):
        pass

    assert type(again(Own("mine"))) is Own
    assert type(again(Local("mine"))) is Own
    assert str(again(Local("mine"))) == "mine"


def test_errors_that_refer_to_each_other_pickle():
    one, two = errors.remote_error(Importable, "one", {}), errors.remote_error(KeyError, "two", {})
    one.other, two.other = two, one
    twin = again(one)
    assert twin.other.other is twin
    assert (str(twin), str(twin.other)) == ("one", "two")


def test_a_long_row_of_errors_pickles_in_one_go():
    made = None
    for number in range(40):  # twice as long for each would be for ever
        made = errors.remote_error(Importable, str(number), {"inner": made})
    twin = again(made)
    assert [str(twin), str(twin.inner), str(twin.inner.inner)] == ["39", "38", "37"]


def test_the_class_is_the_same_after_many_others():
    error = errors.remote_error(Importable, "first", {})
    for number in range(300):
        errors.remote_error(type(f"Other{number}", (Exception,), {}), "later", {})
    assert type(again(error)) is type(error)


class OwnWays(Exception):
    """Pickles and copies in ways that only fit itself."""

    def __reduce_ex__(self, protocol):
        raise TypeError("not this way")

    __copy__ = __deepcopy__ = __setstate__ = __reduce_ex__


def test_ways_of_the_originals_class_are_not_gone():
    error = errors.remote_error(OwnWays, "text", {"row": [3]})
    for twin in (again(error), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert (str(twin), twin.row) == ("text", [3])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups are of Python 3.11")
def test_a_group_with_parts_of_local_classes_stays_a_group():
    class Local(Importable):
        pass

    group = ExceptionGroup  # noqa: F821
    parts = [Local("a"), KeyError("b"), group("inner", [Local("c")])]
    error = errors.remote_error(group, "several", {"exceptions": tuple(parts)})
    twin = again(error)
    assert isinstance(twin, (fp.RemoteError, group))
    assert str(twin) == "several"
    first, second, inner = twin.exceptions
    assert (type(first).__name__, str(first)) == ("RemoteImportable", "a")
    assert repr(second) == "KeyError('b')"
    assert isinstance(inner, group)
    assert [str(part) for part in inner.exceptions] == ["c"]
    assert isinstance(inner.exceptions[0], Importable)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_does(protocol):
    error = errors.remote_error(Importable, "text", {"row": 3, "lock": threading.Lock()})
    twin = pickle.loads(pickle.dumps(error, protocol))
    assert (type(twin), str(twin), vars(twin)) == (type(error), "text", {"row": 3})


# ---------------------------------------------------------------- copies


def test_copies_have_the_class_and_all_attributes(bob):
    error = caught(bob, local_class)
    error.lock, error.rows = threading.Lock(), [1, 2]
    shallow, deep = copy.copy(error), copy.deepcopy(error)
    assert type(shallow) is type(deep) is type(error)
    assert facts(shallow) == facts(deep) == facts(error)
    assert vars(shallow) == vars(deep) == vars(error)
    assert shallow.rows is error.rows
    assert deep.rows is not error.rows
    assert deep.lock is error.lock


def test_a_copy_of_any_other_error_is_of_its_class():
    error = fp.WorkerLostError("gone", worker="bob", exitcode=-9, last_command="get")
    error.lock = threading.Lock()
    for twin in (copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is fp.WorkerLostError
        assert vars(twin) == vars(error)
    assert set(vars(again(error))) == {"worker", "exitcode", "last_command"}


# ---------------------------------------------------------------- classes that do not want to


class NeedsTwo(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} {b}")


class FixedArgs(Exception):
    @property
    def args(self):
        return ("always this",)


class FixedNumber(OSError):
    @property
    def errno(self):
        raise AttributeError("none")


class FixedDict(Exception):
    @property
    def __dict__(self):
        raise RuntimeError("none")


class Refuses(Exception):
    def __init_subclass__(cls):
        raise TypeError("no heirs")


def raises(kind):
    error = kind("the original text")
    raise error


@pytest.mark.parametrize("kind", [FixedArgs, FixedNumber, FixedDict])
def test_properties_of_the_originals_class_lose_nothing(bob, kind):
    with pytest.raises(kind) as found:
        bob.run(raises, kind).get()
    error = found.value
    assert isinstance(error, fp.RemoteError)
    first = str(error).partition("\n")[0]
    assert first == f"{kind.__name__} in worker 'bob': the original text"
    assert "test_remote_errors_travel.py" in error.issued_at
    twin = again(error)
    assert type(twin) is type(error)
    assert facts(twin) == facts(error)


def test_a_class_that_was_refused_is_not_used_later():
    for _ in range(2):
        error = errors.remote_error(Refuses, "text", {})
        assert type(error) is fp.RemoteError
        assert type(again(error)) is fp.RemoteError


class OwnPlacement(fp.PlacementError):
    """Its arguments cannot be set."""

    @property
    def args(self):
        return (3,)


def own_placement():
    raise OwnPlacement("made there")


def test_an_error_of_ours_with_properties_of_a_user(bob):
    with pytest.raises(OwnPlacement) as found:
        bob.run(own_placement).get()
    assert str(found.value) == "made there"
