"""Nothing is printed while a private object is in use. Runs in the worker."""

import contextlib
import ctypes
import io
import os
import sys
from collections.abc import Iterator, Sequence

_libc = ctypes.CDLL(None)


@contextlib.contextmanager
def silence(*, process: bool) -> Iterator[None]:
    """Standard output and errors go nowhere.

    Args:
        process: this process is a worker and nothing else, so its descriptors can be turned away
            as well: C code, child processes and old references to ``sys.stderr`` write there. In
            an inline worker they are the parent's.
    """
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        if not process:
            yield
            return
        with _descriptors_turned_away():
            yield


@contextlib.contextmanager
def _descriptors_turned_away() -> Iterator[None]:
    streams = [sys.__stdout__, sys.__stderr__]
    _flush(streams)
    kept = [os.dup(1), os.dup(2)]
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            yield
        finally:
            _flush(streams)  # what is still buffered goes nowhere, too
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
    finally:
        for fd in (*kept, null):
            os.close(fd)


def _flush(streams: Sequence[io.TextIOBase | None]) -> None:
    for stream in streams:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()  # type: ignore[union-attr]
    _libc.fflush(None)
