"""Private memory of large copies, used again once nobody holds it. Runs in parent and workers.

The kernel clears every page of new memory, which costs as much as the copy into it. So a storage
in which a large result is given is noted here as well, and given again when this is its only
holder. For its users it is one of torch's own: it can be resized and moved to shared memory, and
a forked child has a copy of its own.

Nobody tells when a storage is let go: its holders are counted when memory is wanted. No lock is
taken, since a finalizer may ask for memory in the middle of anything: whoever looks at a storage
takes it off its shelf meanwhile, and one that is lost on the way (Ctrl-C) ends with its last
holder.

What is kept was in use before, so the peak stays what it was: new memory is made only after as
much that is free was let go. ``collect`` gives back what was not used for a while.
"""

import contextlib
import functools
import os
import sys
import time
from collections import deque

import torch

from fedproc.memory import pages

IDLE_SECONDS = 14.0
"""Found free this long ago: given back. Less than the time between two looks."""
IN_USE_SECONDS = 60.0
"""Held for this long: not noted any more, so that it ends with its holder."""
ROOM_SECONDS = 1.0
"""How long it counts what the machine had to spare; asking takes as long as clearing 2 MB."""
_LOOKS = 2  # at storages in use, each time one is taken: so all are looked at sooner or later
_KEPT_PART = 4  # no more is noted than one part in so many of what may still be touched


class Spare:
    """A storage of torch's own that others may hold."""

    __slots__ = ("_address", "_alone", "nbytes", "since", "storage")

    def __init__(self, nbytes: int) -> None:
        """New memory, uninitialised, in large pages where the system has them."""
        self.nbytes = nbytes
        self.since = 0.0  # when it was given, or found free
        self.storage = torch.UntypedStorage(nbytes, device="cpu")  # type: ignore[no-untyped-call]
        self._address = self.storage.data_ptr()
        self._alone = self._holders()
        pages.prefer_large(self._address, nbytes)

    def _holders(self) -> tuple[int, int]:
        """How many hold it: of torch's objects, and of Python's the wrapper they share."""
        storage = self.storage
        return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)

    @property
    def free(self) -> bool:
        """Whether nobody else holds it, and so nobody can come by it any more."""
        return self._holders() == self._alone

    @property
    def unchanged(self) -> bool:
        """Whether its memory is the first one: a user may resize it, or move it elsewhere."""
        return (self.storage.nbytes(), self.storage.data_ptr()) == (self.nbytes, self._address)

    def tensor(self) -> torch.Tensor:
        """All of it, uint8, 1-d."""
        self.since = time.monotonic()
        return torch.empty(0, dtype=torch.uint8, device="cpu").set_(self.storage)


class _Shelf:
    """Storages of one size: those in use, as far as is known, and those that rest."""

    def __init__(self) -> None:
        self.used: deque[Spare] = deque()  # given last: right
        self.resting: deque[Spare] = deque()  # found free last: right

    def look(self, most: int) -> None:
        """Find out which are free by now, of so many that are in use for longest."""
        for _ in range(min(most, len(self.used))):
            try:
                spare = self.used.popleft()
            except IndexError:  # other threads look, too
                return
            free = spare.free  # asked first: what nobody holds nobody changes meanwhile
            if not spare.unchanged:
                continue
            if free:
                spare.since = time.monotonic()
                self.resting.append(spare)
            else:
                self.used.append(spare)

    def take(self) -> torch.Tensor | None:
        """What was used last of all that is free: the others may go back."""
        self.look(_LOOKS)
        if not self.resting:
            self.look(len(self.used))
        try:
            spare = self.resting.pop()
        except IndexError:
            return None
        tensor = spare.tensor()
        self.used.append(spare)
        return tensor

    def let_go(self, spare: Spare) -> None:
        """It ends with its last holder."""
        for shelf in (self.resting, self.used):
            with contextlib.suppress(ValueError):
                shelf.remove(spare)


class Spares:
    """The memory that this process makes large copies in."""

    def __init__(self) -> None:
        """Nothing is kept before there is a user."""
        self._users: set[object] = set()
        self._shelves: dict[int, _Shelf] = {}  # by bytes
        self._room_bytes, self._room_until = 0, 0.0

    def open(self, user: object) -> None:
        """Memory is kept from now on: ``user`` will call ``collect`` now and then."""
        self._users.add(user)

    def close(self, user: object) -> None:
        """After its last user nothing is kept; what is in use ends with its holders."""
        self._users.discard(user)
        if not self._users:
            self._shelves.clear()

    def take(self, nbytes: int) -> torch.Tensor:
        """Memory that nobody else holds (uint8, 1-d, uninitialised), used before if possible."""
        shelf = self._shelves.get(nbytes)
        found = None if shelf is None else shelf.take()
        return self._new(nbytes) if found is None else found

    def _new(self, nbytes: int) -> torch.Tensor:
        if not self._users or not counts_holders():
            return Spare(nbytes).tensor()
        self._make_way(nbytes)
        spare = Spare(nbytes)
        tensor = spare.tensor()
        if self._noted_bytes() + nbytes <= self._most_bytes():
            self._shelves.setdefault(nbytes, _Shelf()).used.append(spare)
        return tensor

    def _make_way(self, nbytes: int) -> None:
        """Let go of as much that rests, or all there is; first what rests for longest."""
        resting: list[tuple[float, Spare, _Shelf]] = []
        for shelf in list(self._shelves.values()):
            shelf.look(len(shelf.used))
            resting += [(spare.since, spare, shelf) for spare in [*shelf.resting]]
        for _, spare, shelf in sorted(resting, key=lambda found: found[0]):
            if nbytes <= 0:
                return
            nbytes -= spare.nbytes
            shelf.let_go(spare)

    def _noted_bytes(self) -> int:
        shelves = list(self._shelves.items())
        return sum(n * (len(shelf.used) + len(shelf.resting)) for n, shelf in shelves)

    def _most_bytes(self) -> int:
        now = time.monotonic()
        if now >= self._room_until:
            self._room_bytes = pages.machine_room_bytes() // _KEPT_PART
            self._room_until = now + ROOM_SECONDS
        return self._room_bytes

    def collect(self, now: float | None = None) -> None:
        """Give back what was not used lately, and forget what is in use for long.

        For idle moments, 15 s apart. Any number of users may call it: what counts is the time.

        Args:
            now: the time, of ``time.monotonic``.
        """
        now = time.monotonic() if now is None else now
        for nbytes, shelf in list(self._shelves.items()):
            shelf.look(len(shelf.used))
            for spare in [*shelf.resting]:
                if now - spare.since >= IDLE_SECONDS:
                    shelf.let_go(spare)
            for spare in [*shelf.used]:
                if now - spare.since >= IN_USE_SECONDS:
                    shelf.let_go(spare)
            if not (shelf.used or shelf.resting):
                self._shelves.pop(nbytes, None)

    def start_anew(self) -> None:
        """In a forked child: the parent's users are not here, nobody would call ``collect``."""
        self._users.clear()
        self._shelves.clear()


@functools.cache
def counts_holders() -> bool:
    """Whether holders are counted as this file takes for granted; else nothing is used again."""
    spare = Spare(64)
    tensor = spare.tensor()
    told = [spare.free]
    wrapper = tensor.untyped_storage()
    del tensor
    told.append(spare.free)
    del wrapper
    return [*told, spare.free] == [False, False, True]


SPARES = Spares()
"""Of this process."""
os.register_at_fork(after_in_child=SPARES.start_anew)
