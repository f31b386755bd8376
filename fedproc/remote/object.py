"""ObjectPointer: a pointer to anything that is neither tensor nor module. Runs in the parent."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fedproc.remote.calls import Operand, compute, order, part, run_there
from fedproc.remote.facts import facts
from fedproc.remote.operators import COMPARISONS, with_operators
from fedproc.remote.pointer import KINDS, Pointer

if TYPE_CHECKING:
    from fedproc.remote.worker import Worker


def operate_on_object(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator on objects: what kind of thing comes of it, only the worker knows."""
    if name in ("operator.setitem", "operator.delitem"):
        return order(name, args, kwargs, what=name)
    return run_there(KINDS["pending"], name, args, kwargs, what=name)


@with_operators(operate_on_object, comparisons=False, in_place=False)
class ObjectPointer(Operand, kind="object"):
    """A pointer to an object.

    ``p.name(...)`` calls a method in the worker, ``p.name.get()`` brings an attribute home. The
    pointer's own names win; the object's are reached by ``worker.run(getattr, p, "id")``.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> "Attribute":
        """An attribute or method of the object, looked up when it is used."""
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return Attribute(self, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the object in its worker."""
        return call(self, args, kwargs)

    def __len__(self) -> int:
        """Length of the object."""
        return int(compute("builtins.len", (self,), what="len"))

    def __bool__(self) -> bool:
        """Truth of the object."""
        return bool(compute("fedproc.worker.parts.truth", (self,), what="bool"))

    def __float__(self) -> float:
        """The number it is."""
        return float(compute("builtins.float", (self,), what="float"))

    def __int__(self) -> int:
        """The number it is."""
        return int(compute("builtins.int", (self,), what="int"))

    def __iter__(self) -> Iterator[Any]:
        """Pointers to the items of a sequence, one at a time."""
        return items(self)

    def __contains__(self, value: Any) -> bool:
        """Whether the object contains ``value``."""
        return bool(compute("operator.contains", (self, value), what="in"))

    def __setattr__(self, name: str, value: Any) -> None:
        """Own slots only: nothing is set in the object behind the user's back."""
        set_own(self, name, value)


def items(whole: Pointer) -> Iterator[Any]:
    """Pointers to the items of a sequence, each made when it is its turn.

    Raises:
        TypeError: it is no sequence.
    """
    kind, count = kind_of_items(whole), len(whole)  # type: ignore[arg-type]
    return (part(kind, whole, (place,)) for place in range(count))


def kind_of_items(whole: Pointer) -> type[Pointer]:
    """The class of the pointers to items of a sequence.

    Raises:
        TypeError: it is no sequence.
    """
    told = facts(whole)
    if not told["items"]:
        raise TypeError(
            f"{whole!r} points to a {told['type']}, which is no sequence: it has no items 0, 1, 2 "
            "... that pointers could point to. Make one of it there: worker.run(list, pointer)."
        )
    return KINDS[told["items"]]


def set_own(pointer: Pointer, name: str, value: Any) -> None:
    """Set a slot of the pointer itself.

    Raises:
        AttributeError: it has none of that name.
    """
    if name not in Pointer.__slots__:
        raise AttributeError(
            f"{name!r} of {pointer!r} cannot be set through the pointer. Set it where the object "
            f"is: worker.run(setattr, pointer, {name!r}, value)."
        )
    object.__setattr__(pointer, name, value)


def call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an object or module in its worker."""
    return run_there(
        KINDS["pending"], "fedproc.worker.parts.call", (target, *args), kwargs, what="call"
    )


@with_operators(operate_on_object, comparisons=False, in_place=False)
class Attribute(Operand):
    """``p.name`` of an ObjectPointer: call it, get it, or use it as the pointer it stands for."""

    __slots__ = ("_made", "_name", "_of")
    _of: Pointer
    _name: str
    _made: Any

    def __init__(self, of: Pointer, name: str) -> None:
        """Attribute ``name`` of the object of ``of``."""
        of._data().check()
        self._of = of
        self._name = name
        self._made = None
        self._chain = None
        self._owner = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method in the worker; a pointer to what it returns."""
        every = (self._of, self._name, *args)
        return run_there(
            KINDS["pending"], "fedproc.worker.parts.method", every, kwargs, what=self._name
        )

    def _pointer(self) -> Any:
        """The pointer to the attribute's value, made when it is first needed."""
        if self._made is None:
            every = (self._of, self._name)
            self._made = run_there(
                KINDS["pending"],
                "fedproc.worker.parts.attribute",
                every,
                what=self._name,
                writes=False,
            )
        return self._made

    def _data(self) -> Any:
        return self._pointer()._data()

    @property
    def _handle(self) -> Any:  # type: ignore[override]
        return self._pointer()._handle

    def get(self, timeout: float | None = None) -> Any:
        """The value of the attribute; it stays in the object."""
        return self.fetch(timeout)

    def fetch(self, timeout: float | None = None) -> Any:
        """The value of the attribute."""
        return self._pointer().fetch(timeout)

    def __getattr__(self, name: str) -> Any:
        """An attribute of the attribute's value."""
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self._pointer(), name)

    def copy(self) -> Any:
        """A second, independent remote object."""
        return self._pointer().copy()

    def send(self, worker: "Worker") -> Any:
        """Make a chain: ``worker`` holds a pointer to the attribute's value."""
        return self._pointer().send(worker)

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        """Which attribute of what."""
        return f"<attribute {self._name} of {self._of!r}>"


def _of_value(name: str) -> Callable[..., Any]:
    def method(self: Attribute, *args: Any) -> Any:
        return getattr(self._pointer(), name)(*args)

    method.__name__ = name
    method.__doc__ = f"``{name}`` of the attribute's value."
    return method


for _name in (
    *("len", "iter", "contains", "bool", "float", "int"),
    *COMPARISONS,
):
    setattr(Attribute, f"__{_name}__", _of_value(f"__{_name}__"))
