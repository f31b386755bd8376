"""A progress bar for rounds. Runs in the parent; listens to events and writes one line.

::

    round  3/20 [#########---] 8/10  loss 0.4183  accuracy 0.9111  12 s

Where there is no terminal, such as in a log file, every round is one plain line.
"""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING, Final, TextIO

from fedproc.events import ClientFinished, Event, RoundFinished, RoundStarted

if TYPE_CHECKING:
    from collections.abc import Callable

_BAR_WIDTH: Final = 12
# A redraw costs a system call; the eye does not see more than this many a second.
_REDRAWS_PER_S: Final = 20.0


class ProgressBar:
    """Shows round, clients, loss, accuracy and the time left: one line, or one line per round."""

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Prepares; nothing is written before the first event.

        Args:
            stream: Where to write; standard error by default.
            clock: Seconds that never go back.
        """
        self._stream = sys.stderr if stream is None else stream
        self._redraws = self._stream.isatty()
        self._clock = clock
        self._started: float | None = None
        self._drawn = -1.0
        self._first = self._round = self._last = 0
        self._clients = self._finished = self._failed = 0
        self._facts = ""

    def __call__(self, event: Event) -> None:
        """Takes an event and redraws."""
        if isinstance(event, RoundStarted):
            if self._started is None:
                self._started, self._first = self._clock(), event.round
            self._round, self._last, self._clients = event.round, event.last_round, event.clients
            self._finished = self._failed = 0
            self._draw(force=True)
        elif isinstance(event, ClientFinished):
            self._finished += 1
            self._failed += event.failed
            self._draw()
        elif isinstance(event, RoundFinished):
            loss = "" if event.loss is None else f"  loss {event.loss:.4f}"
            accuracy = "" if event.accuracy is None else f"  accuracy {event.accuracy:.4f}"
            self._facts = loss + accuracy
            self._draw(force=True)
            if not self._redraws:
                self._stream.write(self._line(self._clock()) + "\n")
                self._stream.flush()

    def close(self) -> None:
        """Ends the line; does nothing if nothing was written."""
        if self._started is not None:
            if self._redraws:
                self._draw(force=True)
                self._stream.write("\n")
                self._stream.flush()
            self._started = None

    def _draw(self, *, force: bool = False) -> None:
        now = self._clock()
        if not self._redraws:
            return
        if not force and now - self._drawn < 1 / _REDRAWS_PER_S:
            return
        self._drawn = now
        width = shutil.get_terminal_size().columns - 1
        self._stream.write("\r" + self._line(now)[:width].ljust(width))
        self._stream.flush()

    def _line(self, now: float) -> str:
        part = self._finished / max(1, self._clients)
        bar = ("#" * int(part * _BAR_WIDTH)).ljust(_BAR_WIDTH, "-")
        digits = len(str(self._last))
        failed = f" ({self._failed} failed)" if self._failed else ""
        return (
            f"round {self._round:{digits}d}/{self._last} [{bar}] "
            f"{self._finished}/{self._clients}{failed}{self._facts}{self._left(now, part)}"
        )

    def _left(self, now: float, part: float) -> str:
        """Estimates the time left from the rounds done since the start."""
        done = self._round - self._first + part
        if self._started is None or done <= 0:
            return ""
        left = (now - self._started) / done * (self._last - self._first + 1 - done)
        return f"  {left:.0f} s"
