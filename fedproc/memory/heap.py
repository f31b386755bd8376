"""Which bytes of an arena are free, and which of its pages were ever touched: numbers, no memory.

Runs in parent and workers. Blocks have size classes (powers of two split in 4) with
last-in-first-out free lists, because pages touched before fill 13 times faster than fresh ones. Up
to 32 KiB they are slots of a chunk, so that a small survivor makes no hole between large ones;
above, spans of pages, best fit.
"""

import functools
import mmap
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

_PAGE = mmap.PAGESIZE
_SLOT_MAX_BYTES = 32 << 10
_CLASS_MAX_BYTES = 32 << 20
_CHUNK_MIN_BYTES = 64 << 10
_CANDIDATES = 32  # free ranges looked at for one without fresh pages


class Chunk:
    """A span cut into slots of one size."""

    __slots__ = ("free", "nbytes", "slot_bytes", "slots", "start")

    def __init__(self, start: int, nbytes: int, slot_bytes: int) -> None:
        self.start = start
        self.nbytes = nbytes
        self.slot_bytes = slot_bytes
        self.slots = nbytes // slot_bytes
        self.free = [start + index * slot_bytes for index in reversed(range(self.slots))]

    @property
    def empty(self) -> bool:
        """Whether no slot is taken."""
        return len(self.free) == self.slots


class Heap:
    """Which bytes are free, which pages were touched; knows nothing of files. Not thread-safe."""

    def __init__(self, nbytes: int) -> None:
        self.used_bytes = 0
        self.touched_bytes = 0
        self._end_touched = 0
        self._peak_bytes = 0  # of used_bytes, since excess() was asked last
        self._touched = np.zeros(nbytes // _PAGE, np.bool_)  # by page
        self._spans = _Spans(nbytes)
        self._warm: dict[int, list[int]] = {}  # bytes of a span -> starts, last freed last
        self._partial: dict[int, dict[Chunk, None]] = {}  # bytes of a slot -> chunks with room
        self._idle: dict[int, Chunk] = {}  # bytes of a slot -> the one chunk kept though empty

    def take(
        self, nbytes: int, admit: Callable[[int, int, int], bool]
    ) -> tuple[int, "Chunk | int"] | None:
        """Offset and home (chunk, or bytes of a span) of a new block; None: no room."""
        size = _rounded(nbytes)
        if size > _SLOT_MAX_BYTES:
            start = self._take_span(size, admit)
            if start is None:
                return None
            home: Chunk | int = size
        else:
            partial = self._partial.get(size)
            chunk = next(reversed(partial)) if partial else self._new_chunk(size, admit)
            if chunk is None:
                return None
            home, start = chunk, chunk.free.pop()
            if not chunk.free:
                del self._partial[size][chunk]
        self.used_bytes += size
        self._peak_bytes = max(self._peak_bytes, self.used_bytes)
        return start, home

    def give(self, offset: int, home: "Chunk | int") -> None:
        """Take back what ``take`` returned."""
        if isinstance(home, int):
            self.used_bytes -= home
            self._give_span(offset, home)
            return
        self.used_bytes -= home.slot_bytes
        home.free.append(offset)
        self._partial[home.slot_bytes][home] = None
        if len(home.free) < home.slots:
            return
        # One empty chunk of a size stays, or a block made and freed in turn would cut a new one
        # each time.
        idle = self._idle.setdefault(home.slot_bytes, home)
        if idle is not home and idle.empty:
            self._dissolve(home)
        else:
            self._idle[home.slot_bytes] = home

    def excess(self) -> Iterator[tuple[int, int]]:
        """Ranges of touched free pages (start, bytes) beyond the peak of use, highest first."""
        pages = (self.touched_bytes - self._peak_bytes) // _PAGE
        self._peak_bytes = self.used_bytes
        if pages > 0:
            self._recycle()
        for start, nbytes in self._spans.descending():
            if pages <= 0:
                return
            known = max(0, min(nbytes, self._end_touched - start))
            warm = start // _PAGE + np.flatnonzero(self._pages(start, known))[-pages:]
            if warm.size:
                pages -= warm.size
                yield int(warm[0]) * _PAGE, int(warm[-1] + 1 - warm[0]) * _PAGE

    def forget(self, start: int, nbytes: int) -> None:
        """The pages of a free range have no memory any more."""
        pages = self._pages(start, nbytes)
        self.touched_bytes -= int(np.count_nonzero(pages)) * _PAGE
        pages[:] = False

    def _new_chunk(self, size: int, admit: Callable[[int, int, int], bool]) -> "Chunk | None":
        # A full-grown chunk, or, near the limit, the smallest that holds a block.
        for wanted in (max(_CHUNK_MIN_BYTES, 8 * size), max(_PAGE, size)):
            nbytes = _rounded(wanted)
            start = self._take_span(nbytes, admit)
            if start is not None:
                chunk = Chunk(start, nbytes, size)
                self._partial.setdefault(size, {})[chunk] = None
                return chunk
        return None

    def _take_span(self, size: int, admit: Callable[[int, int, int], bool]) -> int | None:
        warm = self._warm.get(size)
        if warm:
            return warm.pop()
        start, fresh = self._fitting(size)
        if fresh:
            # Rather than touch new pages, join what waits in free lists of other sizes. Each
            # freed span is joined once, so this costs a constant per free.
            self._recycle()
            start, fresh = self._fitting(size)
        if start < 0 or (fresh and not admit(start, size, fresh)):
            return None
        self._spans.take(start, size)
        if fresh:
            self._pages(start, size)[:] = True
            self.touched_bytes += fresh
            self._end_touched = max(self._end_touched, start + size)
        return start

    def _fitting(self, size: int) -> tuple[int, int]:
        """Start of the best free range, and its untouched bytes; (-1, size) if there is none."""
        best = (-1, size)
        for start in self._spans.fitting(size):
            fresh = size - int(np.count_nonzero(self._pages(start, size))) * _PAGE
            if not fresh:
                return start, 0
            if best[0] < 0:
                best = (start, fresh)
        return best

    def _give_span(self, start: int, size: int) -> None:
        if size <= _CLASS_MAX_BYTES:
            self._warm.setdefault(size, []).append(start)
        else:
            self._spans.give(start, size)

    def _recycle(self) -> None:
        for chunk in self._idle.values():
            if chunk.empty:
                self._dissolve(chunk)
        self._idle.clear()
        for size, starts in self._warm.items():
            for start in starts:
                self._spans.give(start, size)
        self._warm.clear()

    def _dissolve(self, chunk: Chunk) -> None:
        del self._partial[chunk.slot_bytes][chunk]
        self._give_span(chunk.start, chunk.nbytes)

    def _pages(self, start: int, nbytes: int) -> npt.NDArray[np.bool_]:
        return self._touched[start // _PAGE : (start + nbytes) // _PAGE]


class _Spans:
    """Free ranges of whole pages, best fit; neighbours are joined."""

    def __init__(self, nbytes: int) -> None:
        self._by_size: list[tuple[int, int]] = []  # (bytes, start), sorted
        self._bytes_from: dict[int, int] = {}  # start -> bytes
        self._start_before: dict[int, int] = {}  # end -> start
        self._insert(0, nbytes)

    def fitting(self, nbytes: int) -> Iterator[int]:
        """Starts of ranges large enough, the smallest range first."""
        first = bisect_left(self._by_size, (nbytes, 0))
        last = min(len(self._by_size), first + _CANDIDATES)
        return (self._by_size[index][1] for index in range(first, last))

    def descending(self) -> list[tuple[int, int]]:
        """All ranges (start, bytes), the highest first."""
        return sorted(self._bytes_from.items(), reverse=True)

    def take(self, start: int, nbytes: int) -> None:
        """Cut ``nbytes`` off the beginning of the range at ``start``."""
        rest = self._remove(start) - nbytes
        if rest:
            self._insert(start + nbytes, rest)

    def give(self, start: int, nbytes: int) -> None:
        """Add a range."""
        before = self._start_before.get(start)
        if before is not None:
            nbytes += self._remove(before)
            start = before
        if start + nbytes in self._bytes_from:
            nbytes += self._remove(start + nbytes)
        self._insert(start, nbytes)

    def _insert(self, start: int, nbytes: int) -> None:
        insort(self._by_size, (nbytes, start))
        self._bytes_from[start] = nbytes
        self._start_before[start + nbytes] = start

    def _remove(self, start: int) -> int:
        nbytes = self._bytes_from.pop(start)
        del self._start_before[start + nbytes]
        del self._by_size[bisect_left(self._by_size, (nbytes, start))]
        return nbytes


@functools.lru_cache(maxsize=1024)  # sizes repeat: the parameters of a model, again and again
def _rounded(nbytes: int) -> int:
    """Bytes a block takes: its size class, above the classes whole pages."""
    if nbytes <= 64:
        return 64
    if nbytes > _CLASS_MAX_BYTES:
        return whole_pages(nbytes)
    step = 1 << max((nbytes - 1).bit_length() - 3, 6)
    return -(-nbytes // step) * step if nbytes < 4096 else whole_pages(-(-nbytes // step) * step)


def whole_pages(nbytes: int) -> int:
    """Bytes rounded up to pages."""
    return -(-nbytes // _PAGE) * _PAGE
