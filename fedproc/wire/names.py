"""Functions by dotted name: how an operation travels. Runs in the parent and in workers.

``"operator.add"``, ``"Tensor.add_"``, ``"torch.nn.functional.relu"`` are functions that both sides
can import, so the name alone is sent. The module does not import torch; resolving a name of torch
does.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_ALIASES = {"Tensor": ("torch", "Tensor")}


def function_named(name: str) -> Callable[..., Any]:
    """The function of a command: of ``resolve``, or a user's as ``":module:qualified.name"``.

    A user's is looked up each time: its module may have been loaded anew.
    """
    place = place_of(name)
    if place is None:
        return resolve(name)
    module, path = place
    found: Any = sys.modules.get(module) or importlib.import_module(module)
    for part in path:
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


@functools.cache
def place_of(name: str) -> tuple[str, list[str]] | None:
    """Module and attributes of a user's function, None of any other."""
    if name[0] != ":":
        return None
    _, module, path = name.split(":")
    return module, path.split(".")


# Names are those of functions, so there are at most some thousands: no bound is needed. Failures
# are not kept.
@functools.cache
def resolve(name: str) -> Callable[..., Any]:
    """Find the function that a dotted name stands for.

    Args:
        name: Module, then attributes: ``"torch.linalg.svd"``. ``"Tensor."`` at the beginning
            stands for ``"torch.Tensor."``.

    Returns:
        The function, method, or getter (``"Tensor.shape.__get__"``).

    Raises:
        AttributeError: There is no such function here; the other side may have another version.
        TypeError: The name stands for something that cannot be called.
    """
    first, *rest = name.split(".")
    first, *alias = _ALIASES.get(first, (first,))
    try:
        found: Any = importlib.import_module(first)
        path = first
        for part in (*alias, *rest):
            path = f"{path}.{part}"
            found = _attribute(found, part, path)
    except (ImportError, AttributeError, ValueError) as cause:
        raise AttributeError(f"no function is named {name!r} in this process: {cause}") from cause
    if not callable(found):
        raise TypeError(f"{name!r} is not a function but {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _attribute(owner: Any, part: str, path: str) -> Any:
    """Attribute ``part`` of ``owner``; a submodule that nobody imported yet is imported."""
    try:
        return getattr(owner, part)
    except AttributeError:
        if not isinstance(owner, ModuleType):
            raise
        return importlib.import_module(path)
