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
import threading
import types
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_NAME: Final = "torch._dynamo"
_MARK: Final = "__dynamo_disable"
"""Where torch keeps what ``disable`` made of a function, so that it asks once only."""
_replacing = threading.Lock()


class _Compiler(types.ModuleType):
    """Stands in ``sys.modules`` for a module that nobody has needed yet."""

    def __init__(self, spec: ModuleSpec) -> None:
        """Nothing was marked yet."""
        super().__init__(_NAME, "Stands in for torch's compiler until it is needed.")
        # what is asked of every module: the answers are those of the real one
        self.__spec__, self.__file__ = spec, spec.origin
        self.__path__ = list(spec.submodule_search_locations or ())
        self._marked: list[Callable[..., Any]] = []

    def disable(self, *args: Any, **options: Any) -> Any:
        """Keeps a mark of torch's own, and returns the function; what users disable goes on."""
        if sys.modules.get(_NAME) is self and set(options) == {"wrapping"}:
            self._marked.append(args[0])
            return args[0]
        return _load().disable(*args, **options)

    def graph_break(self, *args: Any, **options: Any) -> None:
        """Does nothing while there is no graph."""
        if sys.modules.get(_NAME) is not self:
            _load().graph_break(*args, **options)

    def __getattr__(self, name: str) -> Any:
        """Finds everything else in the real module."""
        return getattr(_load(), name)

    def __dir__(self) -> list[str]:
        """Lists what the real module has."""
        return dir(_load())


class _Submodules:
    """Finder and loader of the compiler's submodules: whoever wants one needs the whole.

    The whole imports most of them by itself. Python has decided by then to load the one that was
    wanted, and goes by the spec of a module that has come meanwhile: it would execute it a second
    time. So that spec is exchanged for one that does nothing, until this import is done.
    """

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 - as finders are called
        target: types.ModuleType | None = None,  # noqa: ARG002 - as finders are called
    ) -> ModuleSpec | None:
        """Loads the real module for a submodule; None where ordinary finders shall look."""
        if not name.startswith(f"{_NAME}."):
            return None
        _load()
        module = sys.modules.get(name)
        if module is None:
            return None
        spec = ModuleSpec(name, self, loader_state=module.__spec__)  # type: ignore[arg-type]
        vars(module)["__spec__"] = spec  # past modules that let nothing else be set
        return spec

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        """Returns the module that is there."""
        return sys.modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        """Gives it back the spec that it was loaded with."""
        vars(module)["__spec__"] = vars(module)["__spec__"].loader_state


_submodules: Final = _Submodules()


def defer() -> None:
    """Puts the stand-in where the compiler would be, unless it is there already."""
    spec = None if _NAME in sys.modules else importlib.util.find_spec(_NAME)
    if spec is not None:
        sys.modules[_NAME] = torch._dynamo = _Compiler(spec)
        sys.meta_path.insert(0, _submodules)


def _load() -> types.ModuleType:
    """Imports the compiler in place of the stand-in; marked functions are marked anew by it."""
    stand_in = sys.modules.get(_NAME)
    if not isinstance(stand_in, _Compiler):
        return importlib.import_module(_NAME)
    with _replacing:
        if sys.modules.get(_NAME) is stand_in:  # not done by another thread meanwhile
            del sys.modules[_NAME]
            vars(torch).pop("_dynamo", None)
            sys.meta_path.remove(_submodules)
            for function in stand_in._marked:
                vars(function).pop(_MARK, None)
    real = importlib.import_module(_NAME)
    vars(stand_in).update(vars(real))  # for whoever imported the stand-in by a name of his own
    return real
