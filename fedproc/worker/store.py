"""The objects of a worker: id -> entry, and which of them are private. Runs in the worker.

One object may have several ids (a function that returns its argument gives the same object a
second one); taking it home removes them all. The id of a failed result holds a ``Tombstone``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fedproc.errors import ObjectGoneError

_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, type)


class Domain:
    """What may share memory, and is private together.

    Views are in the domain of their base. An object that may hold references to others (an
    optimizer to its parameters) has their domains as sources: it is private when one of them is.
    """

    __slots__ = ("_private", "_sources", "_tainted")

    def __init__(self, private: bool = False, sources: tuple["Domain", ...] = ()) -> None:
        """Private from the start, or when one of ``sources`` is."""
        self._private = private
        self._tainted = False
        self._sources = sources

    @property
    def private(self) -> bool:
        """Whether values of this domain may not leave."""
        if not self._private and self._sources and any(s.private for s in self._sources):
            self._private = True
        return self._private

    def taint(self) -> None:
        """A private value was written here, or into something that is referred to from here."""
        if not self._tainted:
            self._private = self._tainted = True
            for source in self._sources:
                source.taint()


@dataclass(slots=True, eq=False)
class Entry:
    """One object."""

    value: Any
    ids: list[int]
    domain: Domain
    tags: frozenset[str] = frozenset()
    description: str = ""
    open_shape: bool = True  # its shape, length and names do not depend on private values


@dataclass(frozen=True, slots=True)
class Tombstone:
    """Stands for a result that never came to be; ``cause``: number of the command that failed."""

    cause: int


class PoisonedError(Exception):
    """A command uses the result of a failed one."""

    def __init__(self, cause: int) -> None:
        """``cause``: number of the command that failed first."""
        super().__init__(cause)
        self.cause = cause


@dataclass(slots=True)
class ObjectStore:
    """id -> entry or tombstone."""

    worker: str
    _by_id: dict[int, Entry | Tombstone] = field(default_factory=dict)
    _by_object: dict[int, Entry] = field(default_factory=dict)

    def entry(self, oid: int) -> Entry:
        """The entry of an id.

        Raises:
            ObjectGoneError: there is none (any more).
            PoisonedError: the command that should have made it failed.
        """
        found = self._by_id.get(oid)
        if found.__class__ is Entry:
            return found
        if isinstance(found, Tombstone):
            raise PoisonedError(found.cause)
        raise ObjectGoneError(
            f"object {oid} is not on worker {self.worker!r} any more: it was taken home with "
            "get(), moved, freed or cleared. Send it again, or use fetch() to keep it there."
        )

    def add(self, oid: int, value: Any, domain: Domain, **labels: Any) -> Entry:
        """Keep ``value`` under ``oid``; an object that is here already gets a further id."""
        atom = type(value) is not torch.Tensor and isinstance(value, _ATOMS)
        known = None if atom else self._by_object.get(id(value))
        if known is not None:
            known.ids.append(oid)
            if domain.private:
                known.domain.taint()
            entry = known
        else:
            entry = Entry(value, [oid], domain, **labels)
            if not atom:
                self._by_object[id(value)] = entry
        self._by_id[oid] = entry
        return entry

    def bury(self, oid: int, cause: int) -> None:
        """The result ``oid`` will never be."""
        self._by_id[oid] = Tombstone(cause)

    def free(self, oid: int) -> None:
        """Nobody holds this id any more; freeing an unknown id does nothing."""
        entry = self._by_id.pop(oid, None)
        if isinstance(entry, Entry):
            entry.ids.remove(oid)
            if not entry.ids:
                self._by_object.pop(id(entry.value), None)

    def remove(self, oid: int) -> None:
        """The object was taken away: all its ids are gone."""
        entry = self._by_id.get(oid)
        if isinstance(entry, Entry):
            for each in list(entry.ids):
                self.free(each)

    def clear(self) -> None:
        """Forget everything."""
        self._by_id.clear()
        self._by_object.clear()

    def __iter__(self) -> Iterator[Entry]:
        """Every living object once, oldest id first."""
        seen: set[int] = set()
        for oid in sorted(self._by_id):
            entry = self._by_id[oid]
            if isinstance(entry, Entry) and id(entry) not in seen:
                seen.add(id(entry))
                yield entry

    def __len__(self) -> int:
        """How many objects live here."""
        return sum(1 for _ in self)
