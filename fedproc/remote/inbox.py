"""What has come back from a worker: progress, answers, failures. Runs in the parent.

Written by the thread that leads the hub, read by the threads that wait. A frame may be taken
twice (see ``Channel.receive``), so every step can be repeated.
"""

import pickle
from collections import deque
from collections.abc import Callable
from typing import Any

from fedproc.memory.tensors import Exporter
from fedproc.remote.failures import Failures
from fedproc.remote.site import Site
from fedproc.wire import commands
from fedproc.wire.frames import Frame, ProtocolError

_DONE = commands.KIND[commands.Done]
_READY = commands.KIND[commands.Ready]
_VALUE = commands.KIND[commands.Value]
_REFUSAL = commands.KIND[commands.Refusal]
_FAILED = commands.KIND[commands.Failed]


class Inbox:
    """The replies of one worker."""

    def __init__(
        self, worker: str, release: Callable[[int], None], held: Callable[[int], object]
    ) -> None:
        """Nothing yet.

        Args:
            worker: its name.
            release: tells the worker that the blocks of an answer are not read any more.
            held: the object of a number, if somebody here has it; else None.
        """
        self.executed = 0
        self.failures = Failures(worker, held)
        self._release = release
        self._answers: dict[int, Frame] = {}
        self._abandoned: set[int] = set()
        # Number, place and name of the commands on their way; whoever submits one adds it.
        self.expected: deque[tuple[int, Site, str]] = deque()
        self._exporters: deque[tuple[int, Exporter]] = deque()

    # ---- what is on its way

    def hold(self, number: int, exporter: Exporter) -> None:
        """Blocks of our arena that command ``number`` reads."""
        self._exporters.append((number, exporter))

    def unanswered(self) -> int:
        """How many commands are on their way, as far as is known."""
        return len(self.expected)

    def oldest(self) -> tuple[int, Site, str] | None:
        """Number, place and name of the oldest command that is not known to be executed."""
        try:
            return self.expected[0]
        except IndexError:
            return None

    def unfinished(self, done: int, last: int) -> list[str]:
        """What the worker was asked and has not done, oldest first.

        Args:
            done: the last command that it has done, perhaps without having told.
            last: the last for which anybody waits.
        """
        return [what for number, _, what in self.expected.copy() if done < number <= last]

    # ---- what has come

    def take(self, frame: Frame) -> None:
        """Take in one reply.

        Raises:
            ProtocolError: it is none.
        """
        number = frame.sequence
        if frame.kind == _FAILED:
            self.failures.add(number, self._site(number), *_fields(frame))
        elif frame.kind == _REFUSAL:
            if number not in self._abandoned:
                self.failures.note_site(number, self._site(number))
            self._answered(number, frame)
        elif frame.kind in (_VALUE, _READY):
            self._answered(number, frame)
        elif frame.kind != _DONE:
            raise ProtocolError(f"no reply is of kind {frame.kind}")
        self.executed = max(self.executed, number)
        while self.expected and self.expected[0][0] <= self.executed:
            self.expected.popleft()
        while self._exporters and self._exporters[0][0] <= self.executed:
            self._exporters.popleft()[1].release()

    def _site(self, number: int) -> Site:
        """Where command ``number`` was issued; those before it are executed, too."""
        while self.expected and self.expected[0][0] < number:
            self.expected.popleft()
        if self.expected and self.expected[0][0] == number:
            return self.expected[0][1]
        return Site.nowhere()

    def _answered(self, number: int, frame: Frame) -> None:
        if number in self._abandoned:
            self._abandoned.discard(number)
            self._release(number)
        else:
            self._answers[number] = frame

    def has(self, number: int) -> bool:
        """Whether query ``number`` is answered."""
        return number in self._answers

    def open(self, number: int) -> Any:
        """The payload of an answer.

        Raises:
            KeyError: there is none.
            ProtocolError: it cannot be read.
            RemoteError, FedprocError: the query was refused.
        """
        frame = self._answers.pop(number)
        fields = _fields(frame)
        if frame.kind == _REFUSAL:
            self.failures.refused(number, *fields)
        # the last field, of Value and of Ready alike
        return fields[-1]

    def abandon(self, number: int) -> None:
        """Nobody waits for this answer any more, or reads what it has shown."""
        # First the note, then the look: whichever way the leader is just going, it or we release.
        self._abandoned.add(number)
        if self._answers.pop(number, None) is not None or self.executed >= number:
            self._abandoned.discard(number)
            self._release(number)

    def forsake(self, number: int) -> None:
        """Nobody waits for this answer any more, unless it was opened."""
        if self.executed < number or self.has(number):
            self.abandon(number)

    def close(self) -> None:
        """Nothing will come any more."""
        while self._exporters:
            self._exporters.popleft()[1].release()
        self._answers.clear()


def _fields(frame: Frame) -> tuple[Any, ...]:
    record = commands.REPLIES[frame.kind]
    try:
        return tuple(record(*pickle.loads(frame.body)))
    except Exception as error:
        raise ProtocolError(
            f"the answer to command {frame.sequence} cannot be read: "
            f"{type(error).__name__}: {error}"
        ) from error
