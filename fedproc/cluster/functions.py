"""The functions that a cluster's workers may run, as they are told. Runs in the parent."""

import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from fedproc.wire.code import by_value, travels_by_name


class Functions(NamedTuple):
    """What workers are told once, when they start.

    ``entries``: (module, qualified name, digest, code); without code it is imported there.
    ``digests``: function or class -> digest, of what travels by value.
    """

    entries: tuple[tuple[str, str, bytes, bytes], ...]
    digests: dict[Any, bytes]


def functions_of(given: Iterable[Callable[..., Any]]) -> Functions:
    """The entries of these functions and classes.

    Raises:
        TypeError: one is neither function nor class, or cannot be pickled.
    """
    entries: list[tuple[str, str, bytes, bytes]] = []
    digests: dict[Any, bytes] = {}
    for function in given:
        kinds = (types.FunctionType, types.BuiltinFunctionType, type)
        bound = not isinstance(getattr(function, "__self__", None), (types.ModuleType, type(None)))
        if not isinstance(function, kinds) or bound:
            raise TypeError(
                f"functions: {function!r} is neither a function nor a class. Register the function "
                "or class itself, not a bound method, partial or instance."
            )
        module, name = str(function.__module__), function.__qualname__
        digest = code = b""
        if not travels_by_name(function):
            digest, code = _by_value(function)
            digests[function] = digest
        entries.append((module, name, digest, code))
    return Functions(tuple(entries), digests)


def _by_value(function: Any) -> tuple[bytes, bytes]:
    try:
        return by_value(function)
    except Exception as error:
        raise TypeError(
            f"functions: {function.__qualname__} cannot be pickled, so no worker can have it: "
            f"{type(error).__name__}: {error}"
        ) from error
