"""What a worker does between commands: give memory that nobody needs back to the system."""

import time

from fedproc.memory.arena import Arena
from fedproc.memory.spares import SPARES

LOOK_SECONDS = 15.0
"""Free memory is looked at this often: what was not needed since the last look goes back.

Not sooner: who evaluates or saves between two rounds would pay for clearing the same pages again,
which costs a large model more than training it does.
"""
LOOKS_WHEN_IDLE = 2
"""The first finds what the last command needed, the second that nothing was needed since."""


class Upkeep:
    """Looks at an arena now and then, and when nothing happens twice more."""

    def __init__(self, arena: Arena) -> None:
        """``arena``: of this worker."""
        self._arena = arena
        self._next = time.monotonic() + LOOK_SECONDS
        self._left = LOOKS_WHEN_IDLE

    @property
    def wait_ms(self) -> float | None:
        """How long to wait for a command before the next look; None: for ever."""
        return LOOK_SECONDS * 1000 if self._left else None

    def look(self, *, busy: bool) -> None:
        """Give back what was not needed lately; ``busy``: a command has come."""
        if busy:
            self._left = LOOKS_WHEN_IDLE
            if time.monotonic() < self._next:
                return
        else:
            self._left -= 1
        SPARES.collect()
        self._arena.collect()
        self._next = time.monotonic() + LOOK_SECONDS
