"""What a worker may run whose cluster was given ``functions=[...]``. Runs in the worker.

Beside the registered functions and classes: operations of torch on tensors (all that torch itself
lists as overridable, with the factories, less what takes a callback, a file or the storage),
operators, a few functions of Python that only compute, modules of ``torch.nn``, optimizers and
schedulers of ``torch.optim``, and fedproc's own client code. Nothing is found by its name alone:
what is found must be defined under that name.
"""

import functools
import importlib
import types
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fedproc.errors import NotPermittedError
from fedproc.wire.names import resolve
from fedproc.worker import parts
from fedproc.worker.permitted import (
    COMPUTING,
    CONSTANTS,
    DATA,
    LOOKING,
    MODULE_METHODS,
    OPERATORS,
    OPTIMIZER_METHODS,
    OWN,
    TYPES,
    torch_functions,
)

_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type,
         types.MethodWrapperType, types.MethodDescriptorType, types.CodeType)  # fmt: skip


class Registered:
    """The functions and classes that one worker may run."""

    def __init__(self, worker: str, functions: Sequence[tuple[str, str, bytes, bytes]]) -> None:
        """Load them.

        Args:
            worker: its name, for errors.
            functions: (module, qualified name, digest, code); without code it is imported.

        Raises:
            ImportError, AttributeError: one is not found here.
        """
        self._worker = worker
        self._named: dict[tuple[str, str], Any] = {}
        self._known: set[Any] = set()
        self._code: dict[bytes, Any] = {}
        for module, name, digest, code in functions:
            # Loaded once, unlike other code: what it keeps in its globals is the owner's business.
            found = cloudpickle.loads(code) if code else _found(module, name)
            if code:
                self._code[digest] = found
            else:
                self._named[module, name] = found
            self._known.add(found)

    def code(self, digest: bytes, name: str) -> Any:
        """The registered function or class that travelled by value.

        Raises:
            NotPermittedError: there is none; ``name`` is what the parent calls it.
        """
        if digest not in self._code:
            raise self.refused(name)
        return self._code[digest]

    def digests(self) -> dict[Any, bytes]:
        """Functions and classes that travelled by value -> digest."""
        return {found: digest for digest, found in self._code.items()}

    def refused(self, name: str) -> NotPermittedError:
        """The error for a function that is not registered."""
        return NotPermittedError(
            f"run: {name} is not registered on worker {self._worker!r}, which runs registered "
            "functions and torch operations only; nothing was run. Register it when the cluster is "
            f"made: Cluster(..., functions=[{name.rpartition('.')[2]}])."
        )

    # ---- what a message may name

    def find(self, module: str, name: str) -> Any:
        """What a message means by this name.

        Raises:
            NotPermittedError: it may not be named.
        """
        if (module, name) in self._named:
            return self._named[module, name]
        if _may_be_named(module, name):
            try:
                found = _found(module, name)
            except (ImportError, AttributeError):
                raise self.refused(f"{module}.{name}") from None
            if name in DATA.get(module, ()) or isinstance(found, CONSTANTS):
                return found
            if _is_defined_as(found, module, name) and self._is_permitted(found):
                return found
        raise self.refused(f"{module}.{name}")

    def require_maker(self, function: Any, *, new: bool = False) -> None:
        """Raises NotPermittedError for what a message may not call to make an object."""
        name = getattr(function, "__name__", "")
        data = name in DATA.get(getattr(function, "__module__", None) or "", ())
        own = isinstance(function, type) and self._is_permitted(function)
        if not (data or (own and (new or function in self._known or _is_client(function)))):
            raise self.refused(f"a pickle that calls {_name_of(function)}")

    # ---- what a command may run

    def require(self, name: str, function: Any, args: tuple[Any, ...]) -> None:
        """Raises NotPermittedError for what a command may not run.

        Args:
            name: dotted name it travelled by, or empty.
            function: the function.
            args: its arguments; for ``parts`` they say what is really called.
        """
        if name.startswith(f"{parts.__name__}."):
            self._require_part(name.rpartition(".")[2], args)
        elif name == "builtins.getattr":
            self.require_attribute(args[0], args[1])
        elif not self._is_permitted(function) and not self._may_be_called(function):
            raise self.refused(_name_of(function))

    def function(self, name: str) -> Callable[..., Any]:
        """The function that a dotted name stands for; modules other than torch are not imported."""
        if name[0] == ":":
            _, module, path = name.split(":")
            return self.find(module, path)  # type: ignore[no-any-return]
        if name in LOOKING:
            return LOOKING[name]  # type: ignore[no-any-return]
        if name == "builtins.getattr":
            return getattr
        if name.partition(".")[0] in ("torch", "Tensor", "operator", "builtins"):
            try:
                return resolve(name)
            except (AttributeError, TypeError):
                raise self.refused(name) from None
        module, _, last = name.rpartition(".")
        return self.find(module, last)  # type: ignore[no-any-return]

    def require_attribute(self, target: Any, name: Any) -> None:
        """Raises NotPermittedError for an attribute that leads into Python itself."""
        hidden = str(name).startswith("_") and not (
            isinstance(target, nn.Module)
            and any(
                name in getattr(target, kept) for kept in ("_parameters", "_buffers", "_modules")
            )
        )
        value = None if hidden and name != "_extra_state" else getattr(target, str(name), None)
        if (hidden and name != "_extra_state") or isinstance(value, _CODE):
            raise self.refused(f"attribute {name!r} of a {type(target).__name__}")

    def require_result(self, value: Any) -> None:
        """Raises NotPermittedError for a function, method, class or module as a result."""
        if isinstance(value, _CODE):
            raise self.refused(f"a call that gives the {type(value).__name__} {_name_of(value)}")

    def may_fold(self, target: Any) -> bool:
        """Whether what this object returns may leave for an aggregator: fedproc's own code does."""
        return _is_client(type(target)) or type(target).__qualname__ == "_Counter"

    def _require_part(self, what: str, args: tuple[Any, ...]) -> None:
        target, name = args[0], args[1] if len(args) > 1 else None
        if what == "method":
            if not self._has_method(target, str(name)):
                raise self.refused(f"method {type(target).__qualname__}.{name}")
        elif what == "attribute":
            self.require_attribute(target, name)
        elif what == "kind_of":
            if str(name).startswith("_"):
                raise self.refused(f"attribute {name!r} of a {type(target).__name__}")
        elif what == "set_attribute":
            if not isinstance(target, torch.Tensor) or name not in (
                "grad",
                "requires_grad",
                "data",
            ):
                raise self.refused(f"setting {name!r} of a {type(target).__name__}")
        elif what == "call" and not self._may_be_called(target):
            raise self.refused(f"calling a {type(target).__qualname__}")

    def _has_method(self, target: Any, name: str) -> bool:
        if name.startswith("_"):
            return False
        if type(target) in self._known or _is_client(type(target)):
            return True
        if isinstance(target, torch.Tensor):
            return getattr(torch.Tensor, name, None) in torch_functions()
        if isinstance(target, nn.Module):
            return name in MODULE_METHODS
        if isinstance(target, (Optimizer, LRScheduler)):
            return name in OPTIMIZER_METHODS
        return type(target).__module__ == "fedproc.federated.summary" and name == "count"

    def _may_be_called(self, target: Any) -> bool:
        if isinstance(target, functools.partial):
            return self._is_permitted(target.func) or self._may_be_called(target.func)
        return isinstance(target, nn.Module) or type(target) in self._known

    def _is_permitted(self, found: Any) -> bool:
        """Whether a function or class may be run, or held and called by what is run."""
        try:
            if found in self._known or found in torch_functions():
                return True
        except TypeError:  # an object that cannot be hashed
            return False
        if not isinstance(found, (type, types.FunctionType)):
            return False
        module = found.__module__
        bases = (nn.Module, Optimizer, LRScheduler)
        of_torch = isinstance(found, type) and issubclass(found, bases)
        if of_torch and module.startswith(("torch.nn.modules.", "torch.optim.")):
            return True
        own = found.__qualname__ in OWN.get(module, ()) or _is_client(found)
        return own and _is_defined_as(found, module, found.__qualname__)


def _may_be_named(module: str, name: str) -> bool:
    """Whether a module may be imported because a message says so."""
    if name in DATA.get(module, ()) or name in OWN.get(module, ()):
        return True
    if module == "builtins":
        return name in COMPUTING | TYPES | {"Ellipsis", "NotImplemented"}
    if module in ("operator", "_operator"):
        return name.strip("_") in {each.strip("_") for each in OPERATORS}
    of_torch = module.partition(".")[0] == "torch" and "." not in name
    return of_torch or _of_client(module)


def _of_client(module: str) -> bool:
    return module.startswith("fedproc.client.")


def _is_client(found: Any) -> bool:
    return _of_client(getattr(found, "__module__", None) or "")


def _found(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _is_defined_as(found: Any, module: str, name: str) -> bool:
    """Whether ``module`` defines it under ``name``, and has not only imported it."""
    if found in torch_functions() or module == "builtins":
        return True
    return (getattr(found, "__module__", None), getattr(found, "__qualname__", "")) == (
        module,
        name,
    )


def _name_of(function: Any) -> str:
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    module = getattr(function, "__module__", None)
    return f"{module}.{name}" if module else str(name)
