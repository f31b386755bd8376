"""Exceptions as data: what a worker tells of a failed command. Runs in the worker.

The class travels as a pickle (by value when it is of ``__main__``), attributes where they can be
pickled, the traceback as text without the frames of fedproc's own loop. What cannot be pickled
degrades to text: a failure is always reported.
"""

import builtins
import io
import pickle
import traceback
from typing import Any

from fedproc.errors import FedprocError, RemoteError, original_class
from fedproc.remade import attributes
from fedproc.wire.code import dumps, travels_by_name
from fedproc.wire.commands import Failure

LONGEST_TEXT = 64 * 1024
"""Characters of a message or traceback that are kept."""

_GROUP: Any = getattr(builtins, "ExceptionGroup", ())
"""Python 3.11 has exception groups: their parts travel, too."""
_OWN_FRAMES = ("/fedproc/worker/",)


class UnreadableError(Exception):
    """What was sent cannot be unpickled here; the cause is what the code of its class raised."""


def describe(error: BaseException, *, private: bool) -> Failure:
    """The failure as data.

    Args:
        error: what was raised; an UnreadableError is told as its cause.
        private: a private object was in use: only class and place are told, no message.
    """
    told = error.__cause__ if isinstance(error, UnreadableError) else None
    if told is not None:
        failure = describe(told, private=private)
        return failure._replace(message=_unreadable(failure.message))
    try:
        return _describe(error, private=private)
    except BaseException as broken:  # noqa: BLE001 - hostile __str__ and __dict__ raise anything
        kind = _importable(type(error)) if private else type(error)
        name = kind.__qualname__
        text = f"<it cannot be described: {_importable(type(broken)).__name__}>"
        return Failure(None, _pickled(kind), name, text, name, None)


def _describe(error: BaseException, *, private: bool) -> Failure:
    own = isinstance(error, FedprocError) and not isinstance(error, RemoteError)
    # A user's function may raise our errors, and put a value into the text, or make a class of it.
    own = own and (not private or is_ours(error))
    kind = _importable(type(error)) if private else type(error)
    original = original_class(kind)  # of a RemoteError: its own class is made in each process
    known = original is not None and issubclass(original, Exception)
    return Failure(
        own=_pickled(error) if own else None,
        kind=_pickled(original) if known else None,
        name=kind.__qualname__,
        message="" if private else _text(error),
        traceback=_traceback(error, private=private),
        state=None if private else _pickled(_attributes(error)),
    )


def is_ours(error: BaseException) -> bool:
    """Whether fedproc itself raised it: nobody else's code is on the way to it."""
    trace = error.__traceback__
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        if not module.startswith("fedproc.") and module not in ("pickle", "_pickle", "contextlib"):
            return False
        trace = trace.tb_next
    return error.__class__.__module__.startswith("fedproc.")


def _importable(cls: type[BaseException]) -> type[BaseException]:
    """The class, or the first one it is made from that was not made while it ran."""
    return next(base for base in cls.__mro__ if travels_by_name(base))


def _attributes(error: BaseException) -> dict[str, Any]:
    own = attributes(error)
    if isinstance(error, _GROUP):
        own["exceptions"] = error.exceptions
    return {
        name: value
        for name, value in own.items()
        if not name.startswith("_") and _pickled(value) is not None
    }


def _pickled(thing: Any) -> bytes | None:
    """A pickle that loads again here; None if there is no such thing."""
    try:
        data = dumps(thing)
        if not isinstance(thing, type):
            pickle.Unpickler(io.BytesIO(data)).load()
    except BaseException:  # noqa: BLE001 - hostile __reduce__ and __setstate__ raise anything; degrade to text
        return None
    return data if len(data) <= LONGEST_TEXT else None


def _text(error: BaseException) -> str:
    try:
        return str(error)[:LONGEST_TEXT]
    except BaseException as broken:  # noqa: BLE001 - a user's __str__ may raise anything
        return f"<its message cannot be shown: {type(broken).__name__}>"


def _unreadable(message: str) -> str:
    why = f" ({message})" if message else ""
    return (
        f"unpickling what was sent failed{why}. What can be pickled cannot always be loaded again: "
        "send plain parts of it, or make it there with worker.run(function)."
    )


def _traceback(error: BaseException, *, private: bool) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    kept = [f for f in frames if not any(own in f.filename for own in _OWN_FRAMES)]
    if private:
        lines = [f'  File "{f.filename}", line {f.lineno}, in {f.name}\n' for f in kept]
        name = _importable(type(error)).__qualname__
        return "".join(["Traceback (most recent call last):\n", *lines, name])
    try:
        shown = traceback.TracebackException.from_exception(error)
        shown.stack = traceback.StackSummary.from_list(kept)
        return "".join(shown.format())[-LONGEST_TEXT:]
    except BaseException:  # noqa: BLE001 - a __str__ that raises, once more
        return "".join(traceback.format_list(kept)) + type(error).__qualname__
