"""Every error pickles with its attributes, and is also the built-in class it promises to be."""

import inspect
import pickle
import signal

import pytest

import fedproc
from fedproc import errors

BUILTIN = {
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
    "PrivacyBudgetError": Exception,
    "CheckpointError": ValueError,
}
ATTRIBUTES = {
    "WorkerLostError": ("worker", "exitcode", "signal", "last_command"),
    "RemoteError": ("worker", "issued_at", "remote_traceback"),
}
# What the constructors take, by the name of the parameter. `signal` follows from `exitcode`.
SAMPLES = {
    "message": "bob is gone",
    "worker": "bob",
    "exitcode": -9,
    "last_command": "torch.add",
    "failures": {"client-7": "no rows"},
}
ALL = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, errors.FedprocError)
}


def make(cls: type[errors.FedprocError]) -> errors.FedprocError:
    """An instance with every documented attribute set."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())
    options = {p.name: SAMPLES[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}
    error = cls(SAMPLES["message"], **options)
    if cls is errors.RemoteError:
        error.worker, error.issued_at, error.remote_traceback = "bob", "a.py:3 in f", "Traceback"
    return error


def again(error: BaseException, protocol: int) -> BaseException:
    return pickle.loads(pickle.dumps(error, protocol))


def test_the_table_names_every_error():
    assert sorted(ALL) == sorted([*BUILTIN, "FedprocError"])


@pytest.mark.parametrize("name", BUILTIN)
def test_is_also_the_built_in_class(name):
    assert issubclass(ALL[name], errors.FedprocError)
    assert issubclass(ALL[name], BUILTIN[name])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", sorted(ALL))
def test_pickles_with_its_attributes(name, protocol):
    error = make(ALL[name])
    copy = again(error, protocol)
    assert type(copy) is type(error)
    assert str(copy) == str(error) == SAMPLES["message"]
    assert copy.args == error.args
    assert vars(copy) == vars(error)
    for attribute in ATTRIBUTES.get(name, ()):
        value = getattr(copy, attribute)
        assert value == getattr(error, attribute)
        assert value, f"{attribute} was not set, so this proves nothing"


def test_a_lost_worker_names_the_signal():
    assert make(errors.WorkerLostError).signal is signal.SIGKILL
    assert errors.WorkerLostError("left by itself", worker="bob", exitcode=3).signal is None


class OddError(ValueError):
    """Built from arguments that pickle's default way would not give back."""

    def __init__(self, *, row: int, column: int) -> None:
        super().__init__(f"row {row}, column {column}")
        self.row = row


def fail_oddly() -> None:
    raise OddError(row=3, column=4)


def test_an_error_from_a_worker_pickles(bob):
    with pytest.raises(fedproc.RemoteError, match="row 3, column 4") as caught:
        bob.run(fail_oddly).get()
    error = caught.value
    copy = again(error, pickle.HIGHEST_PROTOCOL)
    assert isinstance(copy, OddError)
    assert isinstance(copy, fedproc.RemoteError)
    assert str(copy) == str(error)
    assert (copy.row, copy.worker, copy.issued_at) == (3, "bob", error.issued_at)
    assert "fail_oddly" in copy.remote_traceback
    assert "test_errors_pickle.py" in copy.issued_at
