"""PendingPointer: a pointer whose kind only the worker can tell. Runs in the parent.

The result of ``run`` may be a tensor, a module or anything. Operators, calls and passing it on do
not need to know; attribute names, ``isinstance``, ``len`` and iteration do. They wait, and then
the pointer *becomes* one of its kind: the class of the very object changes.
"""

from collections.abc import Iterator
from typing import Any

from fedproc.remote.calls import Operand, order, run_there
from fedproc.remote.facts import facts
from fedproc.remote.object import call
from fedproc.remote.operators import BINARY, COMPARISONS, with_operators
from fedproc.remote.pointer import KINDS, Pointer

_set_class = object.__dict__["__class__"].__set__


def _operate(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if name in ("operator.setitem", "operator.delitem"):
        return order(name, args, kwargs, what=name)
    return run_there(PendingPointer, name, args, kwargs, what=name, operation=True)


@with_operators(_operate, comparisons=False, in_place=False)
class PendingPointer(Operand, kind="pending"):
    """A pointer that does not know yet what it points to."""

    __slots__ = ()
    _fedproc_pending = True

    def _resolved(self) -> Any:
        """This very pointer, as one of its kind."""
        _set_class(self, self._kind())
        return self

    def _kind(self) -> type[Pointer]:
        return KINDS[facts(self)["kind"]]

    def __getattr__(self, name: str) -> Any:
        """Names depend on the kind: wait for it."""
        if name.startswith("_"):
            raise AttributeError(f"a pointer has no attribute {name!r}")
        return getattr(self._resolved(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Own slots at once; what else can be set depends on the kind."""
        if name in ("_handle", "_owner", "_chain"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._resolved(), name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the object in its worker."""
        return call(self, args, kwargs)

    def __len__(self) -> int:
        """Wait for the kind."""
        return len(self._resolved())

    def __iter__(self) -> Iterator[Any]:
        """Wait for the kind."""
        return iter(self._resolved())

    def __contains__(self, value: Any) -> bool:
        """Wait for the kind."""
        return value in self._resolved()

    def __bool__(self) -> bool:
        """Wait for the kind."""
        return bool(self._resolved())

    def __float__(self) -> float:
        """Wait for the kind."""
        return float(self._resolved())

    def __int__(self) -> int:
        """Wait for the kind."""
        return int(self._resolved())

    def __complex__(self) -> complex:
        """Wait for the kind."""
        return complex(self._resolved())

    def __index__(self) -> int:
        """Wait for the kind."""
        return int(self._resolved().__index__())

    __hash__ = object.__hash__


def _comparison(name: str) -> Any:
    def method(self: PendingPointer, other: Any) -> Any:
        return getattr(self._resolved(), name)(other)

    return method


for _name in COMPARISONS:
    setattr(PendingPointer, f"__{_name}__", _comparison(f"__{_name}__"))
for _name in BINARY:
    # += changes a tensor in place and makes a new number of a number: the kind decides
    def _in_place(self: PendingPointer, other: Any, _dunder: str = _name) -> Any:
        resolved = self._resolved()
        change = getattr(type(resolved), f"__i{_dunder}__", None)
        if change is None:
            return getattr(resolved, f"__{_dunder}__")(other)
        return change(resolved, other)

    setattr(PendingPointer, f"__i{_name}__", _in_place)
