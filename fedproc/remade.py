"""Exceptions taken apart and made again without their ``__init__``. Used in parent and workers.

What an exception is made with may be gone, or live in another process: here it is put together of
its class, its arguments and what was set on it.
"""

import contextlib
import types
from typing import Any, TypeVar

_E = TypeVar("_E", bound=BaseException)
_SLOTS = types.MemberDescriptorType, types.GetSetDescriptorType

ARGS, _DICT = vars(BaseException)["args"], vars(BaseException)["__dict__"]
"""The real ones: a class may have properties of these names."""


def attributes(error: BaseException) -> dict[str, Any]:
    """What was set on an exception; what built-in classes keep is not in its ``__dict__``."""
    kept = {slot.__name__: slot.__get__(error) for slot in _slots(type(error))}
    return dict(_DICT.__get__(error)) | {name: v for name, v in kept.items() if v is not None}


def _slots(cls: type) -> list[Any]:
    """Where built-in classes keep what is to be told; not the object that lacks an attribute."""
    bases = [c for c in cls.__mro__ if c.__module__ == "builtins" and issubclass(c, Exception)]
    slots = [member for base in bases for member in vars(base).values() if type(member) in _SLOTS]
    return [slot for slot in slots if slot.__name__ not in ("obj", "characters_written")]


def restored(cls: type[_E], args: tuple[Any, ...]) -> _E:
    """An exception of class ``cls`` with these arguments, without its ``__init__``."""
    # The nearest built-in class knows how to allocate the instance; user-defined __new__ and
    # __init__ may want arguments that nobody has here.
    builtin: Any = cls
    while builtin.__module__ != "builtins":
        builtin = builtin.__base__
    error: _E = builtin.__new__(cls, *args)
    ARGS.__set__(error, args)
    return error


def filled(error: _E, state: dict[str, Any]) -> _E:
    """``error``, with what can be set of ``state``."""
    for name, value in state.items():
        # Past a __setattr__ that refuses (frozen dataclasses); a property may still refuse.
        with contextlib.suppress(Exception):
            BaseException.__setattr__(error, name, value)
    return error
