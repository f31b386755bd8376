"""Every error fedproc raises. Used in parent and worker processes.

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

All of them pickle and can be copied, with their attributes.
"""

import builtins
import contextlib
import copy
import functools
import pickle
import threading
from signal import Signals
from typing import Any

from fedproc.remade import ARGS, attributes, filled, restored

_GROUP: type = getattr(builtins, "ExceptionGroup", type(None))  # of Python 3.11


class FedprocError(Exception):
    """Base of all errors of fedproc."""

    def __str__(self) -> str:
        """The message alone (a KeyError would show its repr)."""
        return str((*ARGS.__get__(self), "")[0])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by class, arguments and attributes, without calling ``__init__`` again."""
        return _reduced(self, restored, type(self))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The same: a way of the original's class would make an original."""
        return type(self).__reduce__(self)

    def __setstate__(self, state: dict[str, Any] | None) -> None:
        """Set the attributes that were pickled."""
        filled(self, state or {})

    def __copy__(self) -> "FedprocError":
        """Of the same class, also where that does not pickle."""
        return filled(restored(type(self), ARGS.__get__(self)), attributes(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> "FedprocError":
        """As ``copy``, with copies of the attributes; what has none (a lock) is shared."""
        memo[id(self)] = twin = copy.copy(self)
        for name, value in attributes(self).items():
            with contextlib.suppress(Exception):
                filled(twin, {name: copy.deepcopy(value, memo)})
        return twin


class PlacementError(FedprocError, TypeError):
    """Operands of one operation live in different places; nothing was moved or sent."""


class ObjectGoneError(FedprocError, LookupError):
    """The remote object is no longer there: fetched with ``get``, freed, or cleared."""


class WorkerNotFoundError(FedprocError, KeyError):
    """No worker of the cluster has that name."""


class NotPermittedError(FedprocError, PermissionError):
    """The object is private: it may be used in its worker but must not leave it."""


class NotShippableError(FedprocError, TypeError):
    """It cannot be pickled, so nothing was sent; or not loaded here, so it stays where it is."""


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
        number = -(self.exitcode or 0)
        return Signals(number) if number in set(Signals) else None


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

    def __reduce__(self) -> tuple[Any, ...]:
        """The mixed class is made anew where it is loaded, of what can be imported there."""
        return _reduced(self, _restore_remote, _nearest(type(self)))


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
        parts = facts.get("exceptions", ())
        args, original = ((message, parts), original) if parts else (args, None)
    return filled(_restore_remote(original, args), facts)


def original_class(cls: type) -> type[BaseException] | None:
    """What a class of RemoteErrors is made of; None: of nothing. Any other is the class itself."""
    return None if cls is RemoteError else vars(cls).get("_fedproc_original", cls)


def _restore_remote(original: Any, args: tuple[Any, ...]) -> RemoteError:
    try:
        mixed: type[RemoteError] = _remote_class(original or RemoteError)
        return restored(mixed, args)
    except Exception:  # noqa: BLE001 - it refuses to be subclassed, or its layout does not combine
        return restored(RemoteError, args)


@functools.lru_cache(maxsize=256)
def _remote_class(original: Any) -> Any:
    if issubclass(original, RemoteError):
        return original
    if not issubclass(original, Exception):
        return RemoteError
    if _made_of(original) is None:
        told = {"__module__": __name__, "__doc__": original.__doc__}
        new = type(f"Remote{original.__name__}", (RemoteError, original), told)
        # Only now: a class that its base has refused may still be listed there.
        type.__setattr__(new, "_fedproc_original", original)
    return _made_of(original)  # the first, where another thread made one, too


def _made_of(original: Any) -> Any:
    """The class in use, also where the cache has forgotten it: copies of errors must have it."""
    return next((c for c in type.__subclasses__(original) if original_class(c) is original), None)


def with_article(noun: str) -> str:
    """``noun``, as a rule the name of a class, with "a" or "an" in front (u as in "user")."""
    return f"an {noun}" if noun[:1].lower() in {"a", "e", "i", "o"} else f"a {noun}"


_trial = threading.local()  # on: this thread only tries whether something pickles


def _pickles(value: Any) -> bool:
    before, _trial.on = getattr(_trial, "on", False), True
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:  # noqa: BLE001 - users' __reduce__ and __setstate__ raise anything
        return False
    finally:
        _trial.on = before
    return True


def _reduced(error: BaseException, make: Any, kind: Any) -> tuple[Any, ...]:
    if getattr(_trial, "on", False):  # it does; and two errors may refer to each other
        return make, (kind, ()), {}
    state = {name: value for name, value in attributes(error).items() if _pickles(value)}
    return make, (kind, tuple(map(_portable, ARGS.__get__(error)))), state


def _portable(value: Any) -> Any:
    """An argument, or what stands for it where it cannot be pickled."""
    if _pickles(value):
        return value
    if isinstance(value, (tuple, list)):  # the parts of a group
        return tuple(map(_portable, value))
    if isinstance(value, BaseException):
        return filled(_restore_remote(type(value), ARGS.__get__(value)), attributes(value))
    return f"<{type(value).__name__}>"


def _nearest(cls: type[BaseException]) -> type[BaseException] | None:
    """The first class of the original's that can be imported; None: it tells nothing."""
    original = original_class(cls)
    for base in () if original is None else original.__mro__:
        found = original_class(base)
        if found is None or (found is Exception and original is not Exception):
            break
        if issubclass(found, Exception) and _pickles(found):
            return found
    return None
