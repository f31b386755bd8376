"""Shared memory of one process, from which other processes read tensors without a copy.

Runs in parent and workers. An ``Arena`` belongs to the process that made it: only that one
allocates and writes. Others map its descriptor with ``Mapped`` and read. The file is sparse and
has no name: it costs what was touched, and nothing is left when the last process using it ends.

A memfd has no bound of its own, and touching more than the machine has wakes the OOM killer: fresh
pages are handed out only after a look at the limit, the machine's memory and the cgroup's. The
reserve is for what *other* processes were promised and have not touched yet: it cannot be seen.
A forked child shares the pages (they are not copied on write) and may not allocate.
"""

import mmap
import os
import weakref
from collections import deque
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import psutil

from fedproc.errors import ArenaFullError, ClosedError
from fedproc.memory import pages
from fedproc.memory.heap import Chunk, Heap, whole_pages
from fedproc.memory.undisturbed import SteadyLock

Bytes = npt.NDArray[np.uint8]

_CREDIT_BYTES = 16 << 20  # fresh memory handed out between two looks at the machine


class Block(NamedTuple):
    """A piece of an arena: where it starts, and how many bytes were asked for."""

    offset: int
    nbytes: int


class Arena:
    """One process's shared memory: a sparse sealed memfd. Only its owner writes and allocates.

    Args:
        name: shown by the system's tools (``fedproc-<name>``) and in errors.
        limit_bytes: the most its blocks may take; at most, and if None, twice the machine's memory.

    Attributes:
        fd: read-only descriptor to pass to others (SCM_RIGHTS); -1 once closed.
        size_bytes: what blocks may take of the sparse file; one page follows, for ``done``.
        done: its first number is for the owner to write, ``pages.number_at`` reads it.

    Raises:
        ValueError: the limit is not positive.
    """

    def __init__(self, name: str, limit_bytes: int | None = None) -> None:
        if limit_bytes is not None and limit_bytes <= 0:
            raise ValueError(f"limit_bytes must be positive, not {limit_bytes}")
        most = 2 * psutil.virtual_memory().total
        self.size_bytes = whole_pages(min(most, limit_bytes or most))
        self._name = name
        self._owner = os.getpid()
        self._writable, self.fd, self._must_reserve = pages.create_file(name)
        self._close = pages.closer(self, self._writable, self.fd)
        os.ftruncate(self._writable, self.size_bytes + mmap.PAGESIZE)
        self._map: mmap.mmap | None = mmap.mmap(self._writable, self.size_bytes + mmap.PAGESIZE)
        self.done = memoryview(self._map)[self.size_bytes :].cast("Q")
        self._address = pages.address_of(self._map)
        pages.seal(self._writable, self.fd)
        self._lock = SteadyLock()
        self._heap = Heap(self.size_bytes)
        self._live: dict[Block, Chunk | int] = {}
        self._leases: dict[Block, _Lease] = {}
        self._dead: deque[_Lease] = deque()
        self._credit_bytes = 0

    def allocate(self, nbytes: int) -> Block:
        """Reserve ``nbytes`` (0 is fine), aligned to 64 bytes, to pages from 4 KiB on.

        Raises:
            ArenaFullError: the limit or the machine's memory does not allow it.
            ClosedError: closed, or called in a forked child.
            ValueError: ``nbytes`` is negative.
        """
        if nbytes < 0:
            raise ValueError(f"a block cannot have {nbytes} bytes")
        if os.getpid() != self._owner:
            raise self._unusable()
        with self._lock.held():
            if self._dead:
                self._drain()
            taken = self._heap.take(nbytes, self._admit)
            if taken is None:
                raise self._full(nbytes)
            block = Block(taken[0], nbytes)
            self._live[block] = taken[1]
            return block

    def free(self, block: Block) -> None:
        """Take a block back. What it held stays there until the memory is used again.

        Raises:
            ValueError: it is not allocated (freed twice?), or leased: then it frees itself.
        """
        with self._lock.held():
            if self._dead:
                self._drain()
            if block in self._leases:
                raise ValueError(f"{block} is leased: it is freed when its last view dies")
            self._release(block)

    def lease(self, block: Block) -> Bytes:
        """A writable view, shape ``(nbytes,)``; the block is freed when all views of it have died.

        Raises:
            ClosedError: the arena was closed.
            ValueError: the block is not allocated, or already leased.
        """
        with self._lock.held():
            self._drain()
            if block in self._leases:
                raise ValueError(f"{block} is already leased")
            array = self.write_view(block)
            # The callback is C code that takes no lock. It may run in any thread, in the middle
            # of allocate(), at interpreter exit, or in a forked child, whose deque is a copy.
            lease = self._leases[block] = _Lease(array, self._dead.append)
            lease.block = block
            return array

    def write_view(self, block: Block) -> Bytes:
        """A writable view, shape ``(nbytes,)``, not to be used after ``free``.

        Raises:
            ClosedError: the arena was closed.
            ValueError: the block is not allocated.
        """
        if self._map is None:
            raise self._unusable()
        if block not in self._live:
            raise self._not_allocated(block)
        return np.frombuffer(self._map, np.uint8, block.nbytes, block.offset)

    def offset_of(self, address: int) -> int | None:
        """Where in the arena an address in this process's memory lies; None: outside of it."""
        offset = address - self._address
        return offset if self._map is not None and 0 <= offset < self.size_bytes else None

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks now allocated, each rounded up to its size class."""
        with self._lock.held():
            self._drain()
            return self._heap.used_bytes

    def collect(self) -> None:
        """Free what died; give the system free pages above the peak of use since the last call.

        For idle moments, seconds apart: two calls in a row give back every free page.

        Raises:
            ClosedError: closed, or called in a forked child.
        """
        if os.getpid() != self._owner or self._map is None:
            raise self._unusable()
        with self._lock.held():
            self._drain()
            for start, nbytes in self._heap.excess():
                try:
                    self._map.madvise(mmap.MADV_REMOVE, start, nbytes)
                except (AttributeError, OSError):
                    return  # not Linux, or a file that cannot have holes: the pages stay warm
                self._heap.forget(start, nbytes)

    def close(self) -> None:
        """Close the descriptors. The memory stays valid under the views that still exist."""
        self._owner = self.fd = -1
        self._map = None
        self.done.release()
        self._close()

    def _drain(self) -> None:
        while self._dead:
            block = self._dead.popleft().block
            del self._leases[block]
            self._release(block)

    def _release(self, block: Block) -> None:
        home = self._live.pop(block, None)
        if home is None:
            raise self._not_allocated(block)
        self._heap.give(block.offset, home)

    def _admit(self, start: int, nbytes: int, fresh_bytes: int) -> bool:
        """Whether a span may be handed out of which so many bytes were never touched."""
        if fresh_bytes > self._credit_bytes:
            room = self._room_bytes()
            if fresh_bytes > room:
                return False
            self._credit_bytes = min(room, fresh_bytes + _CREDIT_BYTES)
        if self._must_reserve:
            try:
                os.posix_fallocate(self._writable, start, nbytes)
            except OSError:  # the file system is full
                return False
        self._credit_bytes -= fresh_bytes
        return True

    def _room_bytes(self) -> int:
        # Pages of this arena that were handed out but not written yet are not missing from the
        # machine's free memory so far; they will be.
        written = os.fstat(self._writable).st_blocks * 512
        return pages.machine_room_bytes() - max(0, self._heap.touched_bytes - written)

    def _full(self, nbytes: int) -> ArenaFullError:
        used, room = self._heap.used_bytes, max(0, self._room_bytes())
        if used + nbytes > self.size_bytes:
            remedy = "Free objects (drop their pointers), or raise Cluster(memory_limit=...)."
        elif nbytes > room:
            remedy = "Free objects, run fewer workers, or use a machine with more memory."
        else:
            remedy = pages.FULL_FILE if self._must_reserve else pages.SCATTERED
        wanted, used_text, limit, rest = map(pages.size_text, (nbytes, used, self.size_bytes, room))
        return ArenaFullError(
            f"the shared memory {self._name!r} has no room for {wanted}: {used_text} of its limit "
            f"of {limit} are used, and {rest} of the memory available here may be touched. {remedy}"
        )

    def _not_allocated(self, block: Block) -> ValueError:
        return ValueError(f"{block} is not allocated in {self._name!r}: freed before?")

    def _unusable(self) -> ClosedError:
        cause = "is closed"
        if self._map is not None:
            cause = f"belongs to process {self._owner}; a child forked from it must make its own"
        return ClosedError(f"the shared memory {self._name!r} {cause}")


class Mapped:
    """Another process's arena, mapped by its descriptor for reading.

    Args:
        fd: what ``Arena.fd`` is over there; duplicated here, so the caller may close it.
        size_bytes: its ``Arena.size_bytes``.

    Raises:
        ValueError: the file is shorter than that; touching the difference would kill the process.
    """

    def __init__(self, fd: int, size_bytes: int) -> None:
        if os.fstat(fd).st_size < size_bytes:
            raise ValueError(f"the descriptor's file is shorter than {size_bytes} bytes")
        self.size_bytes = size_bytes
        self.fd = os.dup(fd)
        self._close = pages.closer(self, self.fd)
        self._map: mmap.mmap | None = pages.map_private(self.fd, size_bytes, 0)

    def view(self, block: Block) -> Bytes:
        """What the owner writes there, shape ``(nbytes,)``; for fedproc itself, which never writes.

        A write would not reach the owner, but would detach the page from the owner's later writes.

        Raises:
            ClosedError: closed.
            ValueError: the block is not inside the arena.
        """
        return np.frombuffer(self._checked(block), np.uint8, block.nbytes, block.offset)

    def borrow(self, block: Block) -> Bytes:
        """The same in a mapping of its own, for users: what they write there, only they see.

        Raises:
            ClosedError: closed.
            ValueError: the block is not inside the arena.
        """
        self._checked(block)
        if not block.nbytes:
            return np.empty(0, np.uint8)
        lead = block.offset % mmap.PAGESIZE
        own = pages.map_private(self.fd, lead + block.nbytes, block.offset - lead)
        return np.frombuffer(own, np.uint8, block.nbytes, lead)

    def close(self) -> None:
        """Close the descriptor. The memory stays valid under the views that still exist."""
        self._map = None
        self._close()

    def _checked(self, block: Block) -> mmap.mmap:
        if self._map is None:
            raise ClosedError("this mapping of another process's shared memory is closed")
        if min(block) < 0 or sum(block) > self.size_bytes:
            raise ValueError(f"{block} is not inside an arena of {self.size_bytes} bytes")
        return self._map


class _Lease(weakref.ref[Bytes]):
    """Tells its arena when the last view of a block has died: they all keep the array alive."""

    __slots__ = ("block",)
    block: Block
