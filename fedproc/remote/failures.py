"""What failed on one worker, and whether anybody has been told. Runs in the parent."""

import pickle
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from fedproc.errors import FedprocError, remote_error
from fedproc.remote.site import Site
from fedproc.wire.commands import Failure

MOST_SEEN = 256
"""Failures that are kept after somebody has seen them, for results that depend on them."""
MOST_CAUSES = 1024
"""Failed commands whose cause is kept, before it is looked which results somebody still holds."""


class Failures:
    """The failures of one worker, by the number of the command that failed."""

    def __init__(self, worker: str, held: Callable[[int], object]) -> None:
        """Of the worker of that name; ``held``: its object of a number, if somebody has it."""
        self._worker = worker
        self._held = held
        self._known: dict[int, tuple[Failure, Site]] = {}
        self._unseen: dict[int, None] = {}
        # Commands that failed by a cause, or by themselves and were seen long ago.
        self._causes: dict[int, int] = {}
        self._most_causes = MOST_CAUSES
        self._sites: dict[int, Site] = {}
        self._seen: deque[int] = deque()

    def add(self, number: int, site: Site, cause: int, failure: tuple[Any, ...] | None) -> None:
        """A command without an answer has failed, by itself or by a cause; may be told twice."""
        if failure is None:
            self._note_cause(number, cause)
        elif number not in self._known:
            self._known[number] = (Failure(*failure), site)
            self._unseen[number] = None

    def _note_cause(self, number: int, cause: int) -> None:
        """Keep it as long as somebody may ask: not for results that were dropped, or are none."""
        self._causes[number] = cause
        if len(self._causes) > self._most_causes:
            # The newest stay: whoever has just submitted one may be about to hold its result.
            for old in list(self._causes)[:-MOST_SEEN]:
                if self._held(old) is None:
                    self._causes.pop(old, None)
            self._most_causes = max(MOST_CAUSES, 2 * len(self._causes))

    def note_site(self, number: int, site: Site) -> None:
        """Where the query was issued that is refused."""
        if site.code is not None:
            self._sites[number] = site

    def refused(self, number: int, cause: int, failure: tuple[Any, ...] | None) -> NoReturn:
        """Raise what made query ``number`` fail."""
        site = self._sites.pop(number, Site.nowhere())
        if failure is not None:
            raise self._exception(Failure(*failure), site)
        self.raise_for(cause)
        raise self._long_ago(cause)

    def _long_ago(self, number: int) -> FedprocError:
        return FedprocError(
            f"command {number} on worker {self._worker!r}, which this depends on, failed long ago; "
            "its error was raised then."
        )

    def failed(self, number: int) -> bool:
        """Whether command ``number`` failed."""
        return number in self._known or number in self._causes

    def cause(self, number: int) -> int:
        """The first command that failed of those that made ``number`` fail, if it did."""
        return self._causes.get(number, number)

    def is_seen(self, number: int) -> bool:
        """Whether somebody was told why command ``number`` failed."""
        cause = self.cause(number)
        return cause not in self._unseen if cause in self._known else number in self._causes

    def unsee(self, number: int) -> None:
        """Nobody was told why command ``number`` failed, after all."""
        number = self.cause(number)
        if number in self._known:
            self._unseen[number] = None

    def raise_for(self, number: int) -> None:
        """Raise the failure of command ``number``, if it failed: the first cause."""
        cause = self.cause(number)
        if cause in self._known:
            self._unseen.pop(cause, None)
            self._seen.append(cause)
            error = self._exception(*self._known[cause])
            while len(self._seen) > MOST_SEEN:
                old = self._seen.popleft()
                if old not in self._seen and old in self._known:
                    self._note_cause(old, old)
                    del self._known[old]
            raise error
        if number in self._causes:
            raise self._long_ago(cause)

    def unseen(self) -> Iterator[tuple[int, Callable[[], None]]]:
        """(number, function that raises it) of every error that nobody has looked at."""
        for number in list(self._unseen):
            yield number, lambda number=number: self.raise_for(number)  # type: ignore[misc]

    def _exception(self, failure: Failure, site: Site) -> BaseException:
        own: BaseException | None = _load(failure.own)
        if own is not None:
            args = type(own).args  # a property of a user's class need not take others
            if args is not BaseException.args or not own.args or str(site) == "unknown place":
                return own
            own.args = (f"{own.args[0]}\n  issued at {site}", *own.args[1:])
            return own
        return remote_error(
            _load(failure.kind),
            _text(failure, self._worker, site),
            {**(_load(failure.state) or {}), **self._facts(failure, site)},
        )

    def _facts(self, failure: Failure, site: Site) -> dict[str, Any]:
        return {
            "worker": self._worker,
            "issued_at": str(site),
            "remote_traceback": failure.traceback,
        }


def _load(data: bytes | None) -> Any:
    if data is None:
        return None
    try:
        return pickle.loads(data)
    except Exception:  # noqa: BLE001 - the class cannot be had here; the text says everything else
        return None


def _text(failure: Failure, worker: str, site: Site) -> str:
    head = f"{failure.name} in worker {worker!r}"
    if failure.message:
        head += f": {failure.message}"
    indented = failure.traceback.rstrip().replace("\n", "\n    ")
    return f"{head}\n  issued at {site}\n  in worker {worker!r}:\n    {indented}"
