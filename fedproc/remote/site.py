"""Where in the user's code a command was issued. Runs in the parent."""

import sys
from pathlib import Path
from types import CodeType
from typing import NamedTuple

_PACKAGE = str(Path(__file__).resolve().parent.parent) + "/"
_FOREIGN = (
    "/contextlib.py",
    "/torch/_tensor.py",
    "/torch/functional.py",
    "/torch/nn/functional.py",
)
KNOWN_FILES: dict[str, bool] = {}
"""Whether a file is ours, of those that were asked for."""


class Site(NamedTuple):
    """An instruction; the line it is on is looked for when somebody wants to see it."""

    code: CodeType | None
    instruction: int

    @property
    def line(self) -> int:
        """The line, 0 if there is none."""
        for start, end, line in () if self.code is None else self.code.co_lines():
            if start <= self.instruction < end and line is not None:
                return line
        return 0

    def __str__(self) -> str:
        """``file:line in function``."""
        if self.code is None:
            return "unknown place"
        return f"{self.code.co_filename}:{self.line} in {self.code.co_name}"

    @classmethod
    def nowhere(cls) -> "Site":
        """For commands that no user issued."""
        return _NOWHERE


_NOWHERE = Site(None, 0)
_new = tuple.__new__  # half the cost of calling the class, in every command


def is_ours(file: str) -> bool:
    """Whether the code of this file is fedproc's, or torch's way to us; remembered."""
    known = KNOWN_FILES[file] = file.startswith(_PACKAGE) or file.endswith(_FOREIGN)
    return known


def caller(ours: int = 2) -> Site:
    """The innermost frame that is neither fedproc's nor torch's way to us.

    ``ours``: frames that are ours for sure, from here up. It is cheaper not to look at them.
    """
    try:
        frame = sys._getframe(ours)
    except ValueError:  # a method of ours is all that a thread runs
        return _NOWHERE
    while frame is not None:
        code = frame.f_code
        file = code.co_filename
        known = KNOWN_FILES.get(file)
        if not (is_ours(file) if known is None else known):
            return _new(Site, (code, frame.f_lasti))
        frame = frame.f_back  # type: ignore[assignment]
    return _NOWHERE
