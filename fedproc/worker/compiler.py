"""Torch's compiler, imported when a worker compiles something and not before.

Runs in the zygote and in workers. Making any optimizer, and every step of it, imports
``torch._dynamo`` only to tell the compiler what it must not look into: eight hundred modules, as
long as torch itself takes to import and as much memory. Until somebody asks for anything else of
it, nothing is compiled and there is nobody to tell. So a stand-in takes such marks and keeps them
for the real module, which takes its place at the first other use.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_NAME: Final = "torch._dynamo"
_MARK: Final = "__dynamo_disable"
"""Where torch keeps what ``disable`` made of a function, so that it asks once only."""


class _Compiler(types.ModuleType):
    """Stands in ``sys.modules`` for a module that nobody has needed yet."""

    def __init__(self) -> None:
        """Nothing was marked yet."""
        super().__init__(_NAME, "Stands in for torch's compiler until it is needed.")
        self.__spec__ = importlib.util.find_spec(_NAME)
        self._marked: list[Callable[..., Any]] = []

    def disable(self, *args: Any, **options: Any) -> Any:
        """Keeps a mark of torch's own, and returns the function; what users disable goes on."""
        if set(options) == {"wrapping"}:
            self._marked.append(args[0])
            return args[0]
        return _load().disable(*args, **options)

    def graph_break(self) -> None:
        """Does nothing: there is no graph."""

    def __getattr__(self, name: str) -> Any:
        """Finds everything else in the real module; ``__path__``, too: it has submodules."""
        return getattr(_load(), name)

    def __dir__(self) -> list[str]:
        """Lists what the real module has."""
        return dir(_load())


def defer() -> None:
    """Puts the stand-in where the compiler would be, unless it is there already."""
    if _NAME not in sys.modules:
        stand_in = _Compiler()
        sys.modules[_NAME] = stand_in
        torch._dynamo = stand_in


def _load() -> types.ModuleType:
    """Imports the compiler in place of the stand-in; marked functions are marked anew by it."""
    stand_in = sys.modules.get(_NAME)
    if isinstance(stand_in, _Compiler):
        del sys.modules[_NAME]
        vars(torch).pop("_dynamo", None)
        for function in stand_in._marked:
            vars(function).pop(_MARK, None)
    return importlib.import_module(_NAME)
