"""Which code travels by name and which by value. Used on both sides; no torch.

What the other process can import travels by name. Functions and classes of ``__main__``, of a
notebook, and nested ones travel by value, made by cloudpickle; their bytes are named by a digest
and shipped once per worker.
"""

import functools
import hashlib
import importlib
import io
import sys
import types
from typing import Any, NamedTuple

import cloudpickle
from cloudpickle.cloudpickle import _make_skeleton_class


def travels_by_name(thing: Any) -> bool:
    """Whether ``thing`` (a function or class) is found again by importing its module."""
    module_name = getattr(thing, "__module__", None)
    qualname = getattr(thing, "__qualname__", "")
    module = sys.modules.get(module_name) if module_name else None
    if module is None or module_name == "__main__" or "<" in qualname:
        return False
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found is thing and _importable(str(module_name))


def name_of_function(function: Any) -> str | None:
    """``":module:qualified.name"`` of a function that travels by name, None of any other.

    Whether it still is what its module calls so is looked at each time; the rest is remembered.
    """
    kept = kept_name(function)
    if kept is not None:
        return kept[0]
    if not travels_by_name(function):
        return None
    module_name, name = function.__module__, function.__qualname__
    told = f":{module_name}:{name}"
    if "." not in name:
        if len(KEPT_NAMES) >= _MOST_KEPT:
            KEPT_NAMES.clear()
        KEPT_NAMES[function] = (module_name, name, (told, name))
    return told


def kept_name(function: Any) -> tuple[str, str] | None:
    """What ``name_of_function`` told before and is still so, and the function's own name."""
    kept = KEPT_NAMES.get(function)
    if kept is None or getattr(sys.modules.get(kept[0]), kept[1], None) is not function:
        return None
    return kept[2]


_MOST_KEPT = 4096
KEPT_NAMES: dict[Any, tuple[str, str, tuple[str, str]]] = {}
"""Functions of modules only: none that holds a user's tensors is kept alive."""


@functools.lru_cache(maxsize=4096)
def _importable(module_name: str) -> bool:
    """Whether a new process with the same ``sys.path`` finds the module.

    Being in ``sys.modules`` is no proof: test runners and notebooks load files under names that
    exist nowhere else.
    """
    if module_name in sys.builtin_module_names:
        return True
    parent, _, _ = module_name.rpartition(".")
    path = None
    if parent:
        if not _importable(parent):
            return False
        path = getattr(sys.modules.get(parent), "__path__", None)
        if path is None:
            # torch.return_types and the like: made by their parent, not found on disk
            return module_name in sys.modules
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find is not None and find(module_name, path) is not None:
            return True
    module = sys.modules.get(module_name)
    return parent != "" and module is not None and getattr(module, "__file__", None) is None


def by_value(thing: types.FunctionType | type) -> tuple[bytes, bytes]:
    """``(digest, code)`` of a function or class, with its globals as they are now.

    Raises:
        Exception: whatever pickling a captured variable raises.
    """
    code = dumps(thing)
    return hashlib.blake2b(code, digest_size=16).digest(), code


def dumps(thing: Any) -> bytes:
    """A pickle with code by value where it cannot be imported.

    Raises:
        Exception: whatever pickling a part raises.
    """
    stream = io.BytesIO()
    _Pickler(stream).dump(thing)
    return stream.getvalue()


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]  # has no types
    """Names modules of a class of their own, too, such as ``torch.backends.cudnn``.

    Classes with ``__slots__`` have them in the other process.
    """

    def reducer_override(self, obj: Any) -> Any:
        """As of the base, but for such modules and classes."""
        if isinstance(obj, types.ModuleType) and type(obj) is not types.ModuleType:
            name = str(obj.__name__)
            if sys.modules.get(name) is obj:
                return importlib.import_module, (name,)
        reduced = super().reducer_override(obj)
        if isinstance(reduced, tuple) and reduced[0] is _make_skeleton_class:
            return _with_slots(obj.__dict__.get("__slots__"), *reduced)
        return reduced


def _with_slots(slots: Any, make: Any, arguments: Any, state: Any, *rest: Any) -> tuple[Any, ...]:
    """How a class is made, with its slots from the start.

    cloudpickle sets ``__slots__`` when the class is made already: its instances have a dict then,
    and do not come home to the class that has none.
    """
    # an iterator has given all it had; the metaclass of named tuples sets them itself
    if isinstance(slots, (str, tuple, list, dict)) and NamedTuple not in arguments[2]:
        attributes, more = state
        attributes.pop("__slots__", None)
        constructor, name, bases, keywords, *others = arguments
        arguments = (constructor, name, bases, {**keywords, "__slots__": slots}, *others)
        state = (attributes, more)
    return make, arguments, state, *rest
