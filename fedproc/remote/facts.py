"""What is known of a remote object: kind, shape, dtype ... Runs in the parent.

Facts come from the worker and are kept while nothing was submitted that could change them: a
pointer never tells what is not so.
"""

from typing import Any

from fedproc.errors import RemoteError
from fedproc.remote.handle import Handle
from fedproc.remote.message import plain
from fedproc.remote.pointer import Pointer
from fedproc.remote.site import caller
from fedproc.wire import commands


def facts(pointer: Pointer) -> dict[str, Any]:
    """Kind, shape, dtype ... of the object; waits for it."""
    return _facts(pointer._data())


def _facts(handle: Handle) -> dict[str, Any]:
    handle.check()
    link = handle.link
    if handle.facts is not None and handle.facts_at == link.outbox.writes:
        return handle.facts
    link.check()
    at = link.outbox.writes
    try:
        told: dict[str, Any] = link.ask(plain(commands.Describe(handle.oid), "describe"), caller())
    except RemoteError as error:
        raise not_an_attribute_error(error) from None
    handle.facts, handle.facts_at = told, at
    return told


def not_an_attribute_error(error: RemoteError) -> RemoteError:
    """The same error, but never an AttributeError.

    Python takes an AttributeError from reading an attribute for 'there is none' and goes on.
    """
    if not isinstance(error, AttributeError):
        return error
    plain_error = RemoteError(*error.args)
    plain_error.__dict__.update(error.__dict__)
    return plain_error
