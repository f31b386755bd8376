"""What left a worker although it is private, and what was refused. Runs in the worker.

Public objects are not logged, so they pay nothing. The log can be added to and read, nothing else.
It keeps the newest ``MOST_RECORDS``; records are numbered from 1, so a first number above 1 says
how many older ones are gone.
"""

import time
from collections import deque
from typing import Any, Final

import torch

from fedproc.memory.tensors import shape_of
from fedproc.worker.store import Entry

MOST_RECORDS: Final = 10_000
_LONGEST_TEXT: Final = 400
_WAYS: Final = {
    "evaluate": "evaluation",
    "evaluate_clients": "evaluation",
    "count": "metric",
    "failure": "error",
}
"""Method of fedproc's own client code -> the way out; any other gives updates to fold."""


class AuditLog:
    """The log of one worker."""

    def __init__(self) -> None:
        """Empty."""
        self._records: deque[tuple[Any, ...]] = deque(maxlen=MOST_RECORDS)
        self._count = 0

    def left(self, method: str, entry: Entry, command: int, nbytes: int) -> None:
        """The aggregator took what ``method`` of a private object, its client code, gave."""
        self._note("left", _WAYS.get(method, "fold"), command, entry, nbytes, method)

    def refused(self, way: str, command: int, entry: Entry | None, text: str) -> None:
        """A way out, or a function, was refused; ``text`` is ours and holds no values."""
        self._note("refused", way, command, entry, 0, text[:_LONGEST_TEXT])

    def _note(
        self, event: str, way: str, command: int, entry: Entry | None, nbytes: int, detail: str
    ) -> None:
        self._count += 1
        told = (None, "", None) if entry is None else _told(entry)
        self._records.append(
            (self._count, time.time(), event, way, command, *told, nbytes, "parent", detail)
        )

    def records(self) -> list[tuple[Any, ...]]:
        """All that are kept, oldest first."""
        return list(self._records)


def _told(entry: Entry) -> tuple[int | None, str, tuple[int, ...] | None]:
    """Id, kind and shape of an object: no value, and no shape that would tell one."""
    value = entry.value
    oid = entry.ids[0] if entry.ids else None
    if isinstance(value, torch.Tensor):
        return oid, "Tensor", shape_of(value) if entry.open_shape else None
    return oid, type(value).__name__ if entry.open_shape else "object", None
