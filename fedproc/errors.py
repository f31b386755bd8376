"""Every error fedproc raises. Used in parent and worker processes; imports nothing of fedproc.

::

    FedprocError
    |-- you asked for something that cannot be
    |   |-- PlacementError        (TypeError)        operands live in different places
    |   |-- ObjectGoneError       (LookupError)      the remote object was fetched, freed or cleared
    |   |-- WorkerNotFoundError   (KeyError)         no worker of that name
    |   |-- NotPermittedError     (PermissionError)  a private value may not leave its worker
    |   |-- NotShippableError     (TypeError)        cannot be pickled; nothing was sent
    |   `-- ClosedError                              the cluster was closed
    |-- your code failed in a worker
    |   `-- RemoteError           (the original's class)
    |-- the machinery failed
    |   |-- WorkerStartError                         a worker could not be started
    |   |-- WorkerLostError                          a worker's process ended
    |   |-- CommandTimeoutError   (TimeoutError)     not done in time; the command goes on
    |   `-- ArenaFullError        (MemoryError)      no shared memory left
    `-- the round failed
        |-- QuorumError                              too few clients finished
        |-- PrivacyBudgetError                       one more round would exceed max_epsilon
        `-- CheckpointError       (ValueError)       the file is damaged

All of them pickle, with their attributes.
"""

import builtins
import functools
from collections.abc import Callable
from signal import Signals
from typing import Any

_GROUP: type = getattr(builtins, "ExceptionGroup", type(None))
"""Python 3.11 has exception groups."""


class FedprocError(Exception):
    """Base of all errors of fedproc."""

    def __str__(self) -> str:
        """The message alone (a KeyError would show its repr)."""
        return str(self.args[0]) if self.args else ""

    def __reduce__(self) -> tuple[Callable[..., BaseException], tuple[Any, ...]]:
        """Pickle by class, arguments and attributes, without calling ``__init__`` again."""
        return _restore, (type(self), self.args, self.__dict__)


class PlacementError(FedprocError, TypeError):
    """Operands of one operation live in different places; nothing was moved or sent."""


class ObjectGoneError(FedprocError, LookupError):
    """The remote object is no longer there: fetched with ``get``, freed, or cleared."""


class WorkerNotFoundError(FedprocError, KeyError):
    """No worker of the cluster has that name."""


class NotPermittedError(FedprocError, PermissionError):
    """The object is private: it may be used in its worker but must not leave it."""


class NotShippableError(FedprocError, TypeError):
    """The object cannot be pickled; nothing was sent."""


class ClosedError(FedprocError):
    """The cluster is closed, or belongs to the process this one was forked from."""


class WorkerStartError(FedprocError):
    """A worker process could not be started or prepared."""


class WorkerLostError(FedprocError):
    """The process of a worker ended; its objects are gone.

    Attributes:
        worker: name of the worker.
        exitcode: as in ``multiprocessing``: -9 after SIGKILL; None when unknown.
        signal: the signal that ended it, or None.
        last_command: what it was asked to do last and had not finished, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        worker: str = "",
        exitcode: int | None = None,
        last_command: str | None = None,
    ) -> None:
        """Keep the facts; ``message`` is shown as it is."""
        super().__init__(message)
        self.worker = worker
        self.exitcode = exitcode
        self.last_command = last_command

    @property
    def signal(self) -> Signals | None:
        """The signal that ended the process, None when it exited by itself."""
        known = {signal.value for signal in Signals}
        if self.exitcode is None or -self.exitcode not in known:
            return None
        return Signals(-self.exitcode)


class CommandTimeoutError(FedprocError, TimeoutError):
    """Not done within the timeout. The command goes on; asking again is fine."""


class ArenaFullError(FedprocError, MemoryError):
    """The shared memory of a process is used up, by its limit or by the machine's."""


class QuorumError(FedprocError):
    """Fewer clients finished a round than ``min_clients``; the model is unchanged.

    Attributes:
        failures: client name -> the exception that made it fail.
    """

    def __init__(self, message: str, *, failures: dict[str, BaseException] | None = None) -> None:
        """Keep the failures by client."""
        super().__init__(message)
        self.failures = dict(failures or {})


class PrivacyBudgetError(FedprocError):
    """One more round would cost more epsilon than the budget; it was not begun."""


class CheckpointError(FedprocError, ValueError):
    """A checkpoint file is damaged or not one of fedproc's."""


class RemoteError(FedprocError):
    """Code failed in a worker. Also an instance of the original exception's class.

    Attributes:
        worker: name of the worker.
        issued_at: ``"file:line in function"`` of the call in the parent.
        remote_traceback: the traceback text from the worker.
    """

    worker: str = ""
    issued_at: str = ""
    remote_traceback: str = ""

    def __reduce__(self) -> tuple[Callable[..., BaseException], tuple[Any, ...]]:
        """The mixed class is made anew where it is loaded."""
        original = getattr(type(self), "original", None)
        return _restore_remote, (original, self.args, self.__dict__)


def remote_error(
    original: type[BaseException] | None, message: str, facts: dict[str, Any]
) -> RemoteError:
    """Make a RemoteError that is also an ``original``, without running the original's ``__init__``.

    Args:
        original: class of the exception in the worker; None if it cannot be had here.
        message: text of the error.
        facts: attributes to set (``worker``, ``issued_at``, ``remote_traceback`` and those of
            the original instance).
    """
    args: tuple[Any, ...] = (message,)
    if original is not None and issubclass(original, _GROUP):
        # The parts travel as attributes. Without them (one cannot be pickled) there is no group.
        facts = dict(facts)
        parts = facts.pop("exceptions", ())
        args, original = ((message, parts), original) if parts else (args, None)
    error = _restore_remote(original, args, facts)
    assert isinstance(error, RemoteError)
    return error


def _restore_remote(
    original: type[BaseException] | None, args: tuple[Any, ...], state: dict[str, Any]
) -> BaseException:
    mixed: type[BaseException] = RemoteError
    if original is not None:
        mixed = _remote_class(original)  # type: ignore[arg-type]  # mypy: a class is hashable
    return _restore(mixed, args, state)


def _restore(
    cls: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]
) -> BaseException:
    # The nearest built-in class knows how to allocate the instance; user-defined __new__ and
    # __init__ may want arguments that nobody has here.
    builtin: type[BaseException] = cls
    while builtin.__module__ != "builtins":
        builtin = builtin.__base__  # type: ignore[assignment]
    error = builtin.__new__(cls, *args)
    # Past a __setattr__ that refuses (frozen dataclasses); errno of an OSError is not in __dict__.
    BaseException.__setattr__(error, "args", args)
    for name, value in state.items():
        BaseException.__setattr__(error, name, value)
    return error


@functools.lru_cache(maxsize=256)
def _remote_class(original: type[BaseException]) -> type[RemoteError]:
    if not issubclass(original, Exception):
        return RemoteError
    if issubclass(original, RemoteError):
        return original
    namespace = {
        "original": original,
        "__module__": "fedproc.errors",
        "__doc__": original.__doc__,
    }
    try:
        mixed = type(f"Remote{original.__name__}", (RemoteError, original), namespace)
    except Exception:  # noqa: BLE001 - it refuses to be subclassed, or its layout does not combine
        return RemoteError
    return mixed
