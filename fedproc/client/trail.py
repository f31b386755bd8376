"""Who was training when a worker was lost: one number that outlives the worker's process.

The parent makes it and reads it, the worker writes it. It lies in a file without a name, so a
kill of any process leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import Final

_BYTES: Final = 8
IDLE: Final = -1


class Trail:
    """The parent's side.

    Attributes:
        path: Where the worker finds it; empty where the system has no files without a name.
    """

    def __init__(self) -> None:
        """Makes the file; nobody trains yet."""
        self._fds: list[int] = []  # one, or none
        self.path = ""
        if hasattr(os, "memfd_create"):
            # in one step: a Ctrl-C right after it finds who closes the file
            self._fds.extend(map(os.memfd_create, ("fedproc-trail",)))
            os.pwrite(self._fds[0], _packed(IDLE), 0)
            self.path = f"/proc/{os.getpid()}/fd/{self._fds[0]}"

    def read(self) -> int:
        """Returns the place in the cohort of the client that trains, or IDLE."""
        if not self._fds:
            return IDLE
        return int.from_bytes(os.pread(self._fds[0], _BYTES, 0), "little", signed=True)

    def __del__(self) -> None:
        """Closes the file."""
        while self._fds:
            os.close(self._fds.pop())


class Footprint:
    """The worker's side; where the file cannot be opened, it does nothing."""

    def __init__(self, path: str) -> None:
        """Maps the file at ``path``."""
        self._map: mmap.mmap | None = None
        if path:
            with contextlib.suppress(OSError), open(path, "r+b") as file:  # noqa: PTH123 - no path to anything
                self._map = mmap.mmap(file.fileno(), _BYTES)

    def step(self, place: int) -> None:
        """Notes who trains from now on."""
        if self._map is not None:
            self._map[:] = _packed(place)


def _packed(place: int) -> bytes:
    return place.to_bytes(_BYTES, "little", signed=True)
