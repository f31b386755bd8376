"""Pickling of messages. Used on both sides; knows neither torch nor pointers.

Three kinds of things leave the pickle stream and are referred to by a persistent id:

* a pointer, by the id of its object (a number > 0);
* a tensor, by its place in the table in front of the message (a number <= 0, counted down);
* code that cannot be imported, by its digest (through ``load_code``, replaced when decoding).

The layers above say how, by *externals*: a dict from exact type to a function that returns the
persistent id.
"""

import io
import pickle
import types
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import cloudpickle

from fedproc.wire.code import by_value, travels_by_name

Externals = Mapping[type, Callable[[Any], int | None]]


class Encoder(pickle.Pickler):
    """Pickles one value; collects the code it met as ``definitions`` (digest -> bytes)."""

    dispatch_table = cloudpickle.CloudPickler.dispatch_table

    def __init__(
        self,
        externals: Externals,
        *,
        nest_code: bool = False,
        registered: Callable[[], Mapping[Any, bytes] | None] = lambda: None,
        reducers: Mapping[type, Callable[[Any], Any]] = MappingProxyType({}),
    ) -> None:
        """Make a pickler for one value.

        Args:
            externals: exact type -> function giving the persistent id of an instance.
            nest_code: put code inside the stream; else only its digest, see ``definitions``.
            registered: gives the code that the receiver has (function or class -> digest) where it
                takes no other; None where it does.
            reducers: exact type -> what ``reducer_override`` returns for an instance that has no
                persistent id.
        """
        self._reducers = reducers
        self._nest_code = nest_code
        self._registered = registered
        self._buffer = io.BytesIO()
        super().__init__(self._buffer, protocol=5)
        self._externals = externals
        self.definitions: dict[bytes, bytes] = {}

    def encode(self, value: Any) -> bytes:
        """The pickle of ``value``."""
        self.dump(value)
        return self._buffer.getvalue()

    def persistent_id(self, obj: Any) -> int | None:
        """The id of what does not go into the stream."""
        external = self._externals.get(type(obj))
        return None if external is None else external(obj)

    def reducer_override(self, obj: Any) -> Any:
        """Ship code that cannot be imported by value."""
        reducer = self._reducers.get(type(obj))
        if reducer is not None:
            return reducer(obj)
        if isinstance(obj, (types.FunctionType, type)) and not travels_by_name(obj):
            registered = self._registered()
            if registered is not None:  # the receiver refuses what it does not know, by this name
                return load_code, (registered.get(obj, b""), f"{obj.__module__}.{obj.__qualname__}")
            digest, code = by_value(obj)
            if self._nest_code:
                return cloudpickle.loads, (code,)
            self.definitions[digest] = code
            return load_code, (digest,)
        return NotImplemented


class Decoder(pickle.Unpickler):
    """Unpickles one value, asking for what did not travel in the stream."""

    def __init__(
        self,
        body: "io.BytesIO",
        load_external: Callable[[int], Any],
        definitions: Mapping[bytes, bytes],
    ) -> None:
        """``load_external``: persistent id -> object; ``definitions``: digest -> code."""
        super().__init__(body)
        self.persistent_load = load_external  # type: ignore[method-assign]
        self._definitions = definitions

    def find_class(self, module: str, name: str) -> Any:
        """Classes and functions by name; ``load_code`` by this decoder's definitions."""
        if name == "load_code" and module == __name__:
            return self._load_code
        return super().find_class(module, name)

    def _load_code(self, digest: bytes, _name: str = "") -> Any:
        # Loaded anew each time, on purpose: a function starts with its globals as they were when
        # it was submitted, not as an earlier call in the same worker left them.
        return cloudpickle.loads(self._definitions[digest])


def load_code(digest: bytes, name: str = "") -> Any:
    """Stands in the stream for code by digest; only a Decoder can load it.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(f"code {name} {digest.hex()} can only be loaded by fedproc's own decoder")
