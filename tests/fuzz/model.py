"""What pointers should do, as plain Python: objects are local tensors, workers are names.

PyTorch itself is the oracle for values, shapes, views and errors of operations; this module knows
who owns what, where it is, and which error a use must raise.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

import fedproc as fp


@dataclass(eq=False)
class Place:
    """One incarnation of a worker."""

    worker: fp.Worker
    alive: bool = True


@dataclass(eq=False)
class Thing:
    """An object of a worker: a tensor, or an error where it never came to be."""

    tensor: torch.Tensor | None
    site: Place
    error: type[Exception] | None = None


@dataclass(eq=False)
class Handle:
    """An id of an object. ``gone``: the parent knows; ``dead``: only the worker knows."""

    thing: Thing
    gone: bool = False
    dead: bool = False

    def errors(self) -> set[type[Exception]]:
        """What a use raises, at once or when its result is waited for."""
        if self.gone:
            return {fp.ObjectGoneError}
        if not self.thing.site.alive:
            return {fp.WorkerLostError}
        if self.dead:
            return {fp.ObjectGoneError}
        return {self.thing.error} if self.thing.error else set()


@dataclass(eq=False)
class Slot:
    """The record of a chain in the worker it was sent to."""

    inner: "Held"
    site: Place
    cleared: bool = False


@dataclass(eq=False)
class Held:
    """A pointer, and what it should be."""

    pointer: Any
    handle: Handle
    owns: bool = True
    slot: Slot | None = None

    @property
    def tensor(self) -> torch.Tensor:
        assert self.handle.thing.tensor is not None
        return self.handle.thing.tensor

    def site(self) -> Place:
        """Where ``pointer.worker`` is."""
        return self.slot.site if self.slot else self.handle.thing.site


@dataclass
class Model:
    """Everything held; whatever is not reached from here has been freed."""

    held: list[Held] = field(default_factory=list)
    handles: list[Handle] = field(default_factory=list)

    def handle(self, thing: Thing) -> Handle:
        """A further id of an object."""
        self.handles.append(Handle(thing))
        return self.handles[-1]

    def result(self, tensor: torch.Tensor, site: Place) -> Handle:
        """The id of a result: of a known object if it is one of those."""
        for known in self.handles:
            if known.thing.tensor is tensor and not known.dead and not known.gone:
                return self.handle(known.thing)
        return self.handle(Thing(tensor, site))

    def reached(self) -> list[Held]:
        """All pointers that live: those held, and those that chains were made from."""
        found: list[Held] = []
        todo = list(self.held)
        while todo:
            one = todo.pop()
            if one not in found:
                found.append(one)
                if one.slot:
                    todo.append(one.slot.inner)
        return found

    def drop(self, held: Held) -> None:
        """Somebody lets go of a pointer."""
        self.held.remove(held)
        self.sweep()

    def sweep(self) -> None:
        """Ids that no pointer owns are freed."""
        owned = {one.handle for one in self.reached() if one.owns}
        seen = {one.handle for one in self.reached()}
        for handle in self.handles:
            handle.dead |= handle not in owned
        self.handles = [handle for handle in self.handles if handle in seen]

    def take(self, handle: Handle) -> None:
        """An object went home: all its ids are gone, and the parent is told of those."""
        for other in self.handles:
            if other.thing is handle.thing:
                other.gone |= not other.dead
                other.dead = True
        handle.gone = True

    def move(self, handle: Handle, site: Place) -> None:
        """An object is elsewhere; views of it stay behind, not connected any more."""
        handle.thing.tensor = handle.thing.tensor.clone()
        handle.thing.site = site

    def clear(self, site: Place) -> None:
        """A worker forgot everything."""
        owned = {one.handle for one in self.reached() if one.owns}
        for handle in self.handles:
            if handle.thing.site is site:
                handle.gone |= handle in owned
                handle.dead = True
        for one in self.reached():
            if one.slot and one.slot.site is site:
                one.slot.cleared = True

    def count(self, site: Place) -> int:
        """How many objects a worker has: what is owned there, and records of chains."""
        living = {
            handle.thing
            for handle in self.handles
            if handle.thing.site is site and not handle.dead and handle.thing.error is None
        }
        slots = [one for one in self.reached() if one.slot and one.slot.site is site]
        return len(living) + sum(not one.slot.cleared for one in slots)
