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
_known: dict[str, bool] = {}  # file: whether it is ours


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


def caller() -> Site:
    """The innermost frame that is neither fedproc's nor torch's way to us."""
    # Whoever calls us was called by a method of ours: it is cheaper not to look at these two.
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        file = code.co_filename
        ours = _known.get(file)
        if ours is None:
            ours = _known[file] = file.startswith(_PACKAGE) or file.endswith(_FOREIGN)
        if not ours:
            return _new(Site, (code, frame.f_lasti))
        frame = frame.f_back  # type: ignore[assignment]
    return _NOWHERE
