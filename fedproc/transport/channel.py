"""A duplex stream of frames over a socket, never blocking. Used by parent and worker.

Everything half done lives in the channel object, and every step ends in one assignment of a
tuple. The reason is Ctrl-C: KeyboardInterrupt may be raised between any two bytecodes of the main
thread, and a count of bytes that was read but not yet written down would put the stream out of
step for good. The same reason makes ``recv`` and ``send`` run inside ``list.extend(map(...))``:
the call and the note of its result are one step of the interpreter. What is appended, by any
thread and by signal handlers in the middle of anything, is one step of a deque.
"""

import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import repeat

from fedproc.wire.frames import Frame, cut, missing

READ_BYTES = 65536
BATCH_BYTES = 1 << 20
SOCKET_BUFFER_BYTES = 4 << 20
SPIN_SECONDS = 150e-6
"""How long to look for an answer before sleeping: being woken costs as much, on both sides of a
call. A third of it is enough on an idle machine, but not where cores are shared and slow."""
_MOST_IN_VAIN = 4


class Lookout:
    """Looks for what is about to come without sleeping, as long as that pays.

    It pays while the two processes run on two cores. Linux likes to wake a process on the core of
    whoever woke it, and there the one that looks keeps the other from answering: a call then took
    four times as long, for thousands of calls. So a look that saw nothing is followed by waits
    without one, more of them each time, until a look pays again.
    """

    def __init__(self, seconds: float = SPIN_SECONDS) -> None:
        """Look for so many seconds."""
        self._seconds = seconds
        self._in_vain = 0  # looks since the last that paid, up to a limit
        self._waits = 0  # to come without a look

    def look(self, poll: "select.poll", most: float = SPIN_SECONDS) -> list[tuple[int, int]]:
        """What a poll object sees now, or within ``most`` seconds if looking pays."""
        events = poll.poll(0)
        if events:
            return events
        if self._waits:
            self._waits -= 1
            return events
        until = time.perf_counter() + min(self._seconds, most)
        while not events and time.perf_counter() < until:
            events = poll.poll(0)
        self._in_vain = 0 if events else min(self._in_vain + 1, _MOST_IN_VAIN)
        self._waits = 0 if events else 1 << self._in_vain
        return events


def open_channel(sock: socket.socket, side: str, worker: str, *, inline: bool) -> "Channel":
    """The channel of a connection; with faults in it if a test asks for them.

    Whether one does is asked here, once: a channel without faults knows nothing of them.

    Args:
        sock: one end of a connected stream.
        side: whose end it is: ``"parent"`` or ``"worker"``.
        worker: name of the worker.
        inline: the worker is a thread of the parent.
    """
    found = None
    if "FEDPROC_FAULT" in os.environ:
        from fedproc.transport.faults import faulty

        found = faulty(sock, side, worker, inline=inline)
    return found or Channel(sock)


class Channel:
    """Frames in, frames out. Any thread may append and flush; one at a time may receive."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over ``sock`` (a connected stream)."""
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        self._sock = sock
        self._frames: deque[bytes] = deque()  # appended and not yet taken
        self._write_lock = threading.Lock()
        self.writer = 0  # the thread that has the lock for writing, as long as it has it
        # frames taken for the next batch, batch being written, byte counts that send() has
        # returned for it
        self._output: tuple[list[bytes], memoryview | None, list[int]] = ([], None, [])
        # bytes received, how many of them are parsed, chunks received since; while a frame is not
        # whole: how many of these chunks are counted, and their bytes
        self._input: tuple[bytes, int, list[bytes], int, int] = (b"", 0, [], 0, 0)
        self.ended = False
        self.moved_bytes = 0  # written and read so far

    def fileno(self) -> int:
        """Descriptor for ``poll``; -1 once closed."""
        return self._sock.fileno()

    @property
    def unsent(self) -> bool:
        """Whether appended frames are still to be written."""
        taken, batch, _ = self._output
        return bool(self._frames or taken) or batch is not None

    def append(self, frame: bytes) -> int:
        """Queue a frame; returns how many wait."""
        self._frames.append(frame)
        return len(self._frames)

    def flush(self) -> bool:
        """Write what can be written without blocking.

        Returns:
            Whether everything is written (or will be by the thread that is writing now). After
            the peer is gone, True: nobody will read it.
        """
        while self.unsent and not self.ended:
            tried: list[bool] = []
            try:
                tried.extend(map(self._write_lock.acquire, (False,)))
                if not tried[0]:
                    # The writer looks again after it lets go of the lock: it takes ours along.
                    return True
                self.writer = threading.get_ident()
                if not self._write_batch():
                    return False
            finally:
                if tried and tried[0]:
                    self.writer = 0
                    self._write_lock.release()
        return True

    def _write_batch(self) -> bool:
        taken, batch, counts = self._output
        if batch is None:
            self._take(taken)
            batch, counts = memoryview(taken[0] if len(taken) == 1 else b"".join(taken)), []
            self._output = ([], batch, counts)
        try:
            while sum(counts) < len(batch):
                counts.extend(map(self._sock.send, (batch[sum(counts) :],)))
        except BlockingIOError:
            return False
        except OSError:
            self.ended = True
            return True
        self._output = ([], None, [])
        self.moved_bytes += len(batch)
        return True

    def _take(self, taken: list[bytes]) -> None:
        """Fill up what is taken for a batch."""
        frames, count, size = self._frames, 0, sum(map(len, taken))
        while count < len(frames) and size < BATCH_BYTES:  # by index: others append meanwhile
            size += len(frames[count])
            count += 1
        taken.extend(map(deque.popleft, repeat(frames, count)))

    def receive(self, handle: Callable[[Frame], None]) -> None:
        """Read what has arrived and hand over every whole frame; sets ``ended`` at the end.

        ``handle`` may see a frame twice if it is interrupted: it must not mind.

        Raises:
            ProtocolError: the bytes are no frames.
        """
        try:
            while True:
                chunks = self._input[2]
                chunks.extend(map(self._sock.recv, (READ_BYTES,)))
                if not chunks[-1]:
                    self.ended = True
                    break
                if len(chunks[-1]) < READ_BYTES:
                    break
        except BlockingIOError:
            pass
        except OSError:
            self.ended = True
        self._parse(handle)

    def resume(self, handle: Callable[[Frame], None]) -> None:
        """Hand over what an interrupted ``receive`` left behind: nothing more may ever arrive."""
        data, start, chunks, _, _ = self._input
        if chunks or start < len(data):
            self._parse(handle)

    def _parse(self, handle: Callable[[Frame], None]) -> None:
        data, start, chunks, counted, nbytes = self._input
        if chunks:
            if start < len(data):
                # Joined at every wake-up, a large frame would be copied once for each of them.
                nbytes += sum(map(len, chunks[counted:]))
                if nbytes < missing(data, start):
                    self._input = (data, start, chunks, len(chunks), nbytes)
                    return
                data = b"".join([data[start:], *chunks])
            else:
                data = b"".join(chunks)
            start = 0
            self._input = (data, start, [], 0, 0)
            self.moved_bytes += sum(map(len, chunks))
            chunks.clear()  # what is handed over may be at work for long
        while (found := cut(data, start)) is not None:
            frame, start = found
            handle(frame)
            if start == len(data):  # it may be large, and nothing else may come for long
                data, start = b"", 0
            self._input = (data, start, self._input[2], 0, 0)

    def hang_up(self) -> None:
        """End the stream for both sides; whoever polls either end wakes up."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side was first
            self.ended = True

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self.ended = True
        self._sock.close()
