"""Several pointers at once: groups. Runs in the parent."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from fedproc.errors import PlacementError
from fedproc.ranges import deadline_of
from fedproc.remote.calls import torch_function
from fedproc.remote.gathering import bring_home, gather, pointers_among
from fedproc.remote.operations import function_name
from fedproc.remote.operators import with_operators
from fedproc.remote.pointer import Pointer
from fedproc.wire.names import resolve


def _operate(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    function = resolve(name)
    return _each(function, args, kwargs)


class PointerGroup:
    """One pointer on each of several workers: an operation on it runs on all of them at once."""

    __slots__ = ("_members",)
    _members: tuple[Pointer, ...]
    __array_ufunc__ = None

    def __init__(self, members: Iterable[Pointer]) -> None:
        """Bind pointers.

        Raises:
            ValueError: none, or two on the same worker.
            TypeError: something that is no pointer.
        """
        self._members = tuple(pointers_among(members, "a group binds"))
        if not self._members:
            raise ValueError("a group needs at least one pointer")
        names = [member.worker for member in self._members]
        for worker in names:
            if sum(worker is other for other in names) > 1:
                raise ValueError(
                    f"two pointers of the group are on worker {worker.name!r}: a group has one "
                    "pointer per worker"
                )

    @property
    def workers(self) -> tuple[Any, ...]:
        """Where the members are, in their order."""
        return tuple(member.worker for member in self._members)

    def get(self, timeout: float | None = None) -> list[Any]:
        """The values of all members, brought home: all of them, or none if one is not to be had."""
        return bring_home(self._members, timeout)

    def fetch(self, timeout: float | None = None) -> list[Any]:
        """Copies of the values of all members."""
        return gather(self._members, timeout)

    def wait(self, timeout: float | None = None) -> "PointerGroup":
        """Wait for all members."""
        deadline = deadline_of(timeout)
        for member in self._members:
            member.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return self

    def done(self) -> bool:
        """Whether all members are there."""
        return all(member.done() for member in self._members)

    def copy(self) -> "PointerGroup":
        """A group of copies."""
        return PointerGroup(member.copy() for member in self._members)

    def move(self, _: Any) -> NoReturn:
        """Refuse: a group has one member per worker."""
        raise PlacementError(
            "a group cannot move to one worker: move its members, group[i].move(w)"
        )

    send = move

    def __len__(self) -> int:
        """Number of members."""
        return len(self._members)

    def __getitem__(self, place: int) -> Pointer:
        """One member."""
        return self._members[place]

    def __iter__(self) -> Iterator[Pointer]:
        """The members."""
        return iter(self._members)

    def __bool__(self) -> NoReturn:
        """Refuse: there is one truth per member."""
        raise TypeError("a group has one truth per member: use [bool(p) for p in group]")

    def __getattr__(self, name: str) -> Any:
        """A method of all members: calling it gives a group (or a list of plain answers)."""
        if name.startswith("_"):
            raise AttributeError(f"PointerGroup has no attribute {name!r}")
        found = [getattr(member, name) for member in self._members]
        if all(callable(one) and not issubclass(type(one), Pointer) for one in found):
            return _Method(self.workers, found)
        return _bind(found)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call every member."""
        return _each(lambda member, *a, **k: member(*a, **k), (self, *args), kwargs)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be pickled, and to be mixed with single pointers."""
        raise PlacementError(
            f"{self!r} has members on several workers: it can be combined with numbers and with "
            "groups on the same workers. Use one member, group[i], with a single pointer. The "
            "group itself cannot be pickled or copied; save group.fetch()."
        )

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        """The members; never a value."""
        return f"<PointerGroup {' '.join(map(repr, self._members))}>"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch for every member."""
        if function_name(func) is None:
            return torch_function(func, args, kwargs)
        return _each(func, args, kwargs or {})


_getitem = PointerGroup.__getitem__
with_operators(_operate)(PointerGroup)
PointerGroup.__getitem__ = _getitem  # type: ignore[method-assign]  # a member, not its items


class _Method:
    """A method of every member."""

    def __init__(self, workers: tuple[Any, ...], methods: list[Callable[..., Any]]) -> None:
        self._workers = workers
        self._methods = methods

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        shares = _shares(self._workers, args, kwargs)
        return _bind(
            [method(*a, **k) for method, (a, k) in zip(self._methods, shares, strict=True)]
        )


def _each(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    workers = next(_groups((args, kwargs))).workers
    return _bind([function(*a, **k) for a, k in _shares(workers, args, kwargs)])


def _shares(workers: tuple[Any, ...], args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    for group in _groups((args, kwargs)):
        theirs = group.workers
        if len(theirs) != len(workers) or any(w not in theirs for w in workers):
            raise PlacementError(
                f"groups on different workers: {[w.name for w in workers]} and "
                f"{[w.name for w in theirs]}. Groups combine worker by worker."
            )
    return [(_share(args, worker), _share(kwargs, worker)) for worker in workers]


def _share(value: Any, worker: Any) -> Any:
    """``value`` with every group replaced by its member on ``worker``."""
    if type(value) is PointerGroup:
        return value[value.workers.index(worker)]
    if type(value) in (list, tuple):
        return type(value)(_share(item, worker) for item in value)
    if type(value) is dict:
        return {key: _share(item, worker) for key, item in value.items()}
    return value


def _groups(value: Any) -> Iterator[PointerGroup]:
    if type(value) is PointerGroup:
        yield value
    elif type(value) in (list, tuple):
        for item in value:
            yield from _groups(item)
    elif type(value) is dict:
        yield from _groups(list(value.values()))


def _bind(results: list[Any]) -> Any:
    """A group of pointers; a tuple of groups of tuples; a list of anything else."""
    if all(issubclass(type(result), Pointer) for result in results):
        return PointerGroup(results)
    if all(_holds_pointers(result) for result in results):
        columns = [_bind(list(column)) for column in zip(*results, strict=True)]
        kind = type(results[0])
        return kind(columns) if kind is not tuple else tuple(columns)
    return None if all(result is None for result in results) else results


def _holds_pointers(result: Any) -> bool:
    return isinstance(result, tuple) and any(issubclass(type(one), Pointer) for one in result)


def group(*pointers: Pointer) -> PointerGroup:
    """Bind pointers on different workers: operations on the group run on all of them at once.

    Raises:
        ValueError: none, or two on the same worker.
    """
    return PointerGroup(pointers)
