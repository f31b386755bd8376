"""The loop of a worker: receive, execute, reply. The only one there is. Runs in the worker."""

import contextlib
import select
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from fedproc.errors import NotPermittedError
from fedproc.memory.lending import lend_from
from fedproc.transport.channel import SPIN_SECONDS, Channel, Lookout
from fedproc.wire import commands
from fedproc.wire.frames import KEEP, Frame, ProtocolError
from fedproc.worker import failure, flat, privacy
from fedproc.worker.handlers import HANDLERS
from fedproc.worker.host import Host
from fedproc.worker.store import PoisonedError
from fedproc.worker.upkeep import Upkeep

REPORT_SECONDS = 0.001
"""A command that took longer is reported as done at once, a shorter one with those after it."""
REPORT_COMMANDS = 64

Turn = Callable[..., AbstractContextManager[Any]]
_execute_flat = flat.prepared(REPORT_COMMANDS, REPORT_SECONDS)
_CALL = commands.KIND[commands.Call]
_COMPUTE = commands.KIND[commands.Compute]
_QUERY = [record in commands.QUERIES for record in commands.COMMANDS]
_NO_RESULT = frozenset(
    commands.KIND[record]
    for record in (
        commands.Free, commands.Release, commands.Define, commands.Attach, commands.Lend,
        commands.Stop,
    )
)  # fmt: skip


def serve(host: Host, turn: Turn | None = None, spin_seconds: float = SPIN_SECONDS) -> None:
    """Serve until told to stop or the parent is gone.

    A signal handler that a command has installed may raise anywhere, and must not end the worker.
    CPython runs such handlers where something is called or a loop jumps back. The except clauses
    do neither, and the jump of the inner loop lies in the try of the outer one: handlers would have
    to raise three times in a row, with nothing but jumps in between.

    Args:
        host: the worker.
        turn: entered around every command (inline workers share the parent's generators).
        spin_seconds: how long to look for the next command before sleeping.
    """
    lend_from(host.arena, host.mapped)
    loop = Loop(host, turn, spin_seconds)
    while not loop.ended:
        try:
            while not loop.ended:
                try:
                    loop.run()
                except BaseException as error:  # noqa: BLE001 - judged by run(), in a try
                    loop.interrupted = error
        except BaseException as error:  # noqa: BLE001 - as above
            loop.interrupted = error
    loop.leave()


def _of_signal_handler(error: BaseException) -> bool:
    """Whether a user's signal handler raised it: the innermost code is not ours."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return isinstance(error, KeyboardInterrupt) or not str(module).startswith("fedproc.")


class Loop:
    """Receives frames, executes them and reports them."""

    def __init__(self, host: Host, turn: Turn | None, spin_seconds: float) -> None:
        """For one host; the other arguments are those of ``serve``."""
        self._host = host
        self._turn = turn
        self._upkeep, self._lookout = Upkeep(host.arena), Lookout(spin_seconds)
        self._poll = select.poll()
        self._poll.register(host.channel, select.POLLIN)
        self._last = 0
        self._reported = 0
        self._unreported = 0
        self._running: Frame | None = None
        self.interrupted: BaseException | None = None  # what came out of run()
        self.ended = False
        self.wiring: tuple[Any, ...] | None = None  # what flat calls touch of it: see ``flat``

    def run(self) -> None:
        """Work until it is ``ended``: told to stop, left by the parent, or broken."""
        channel = self._host.channel
        while not (self._host.stopped or channel.ended):
            if self.interrupted is not None:
                if not _of_signal_handler(self.interrupted):
                    break
                # no waiting after it: what was half done may be all there is
                self._recover(self.interrupted)
            elif self._lookout.look(self._poll):  # while the parent prepares the next command
                self._upkeep.look(busy=True)
            else:
                self._report()
                self._wait(channel)
            channel.receive(self.execute)
        self.ended = True

    def leave(self) -> None:
        """Tell how far we came; raises what broke us."""
        error = self.interrupted
        if error is None or _of_signal_handler(error):
            self._report()
        elif isinstance(error, ProtocolError):
            # What follows cannot be told from garbage: end, as if the parent had hung up.
            sys.stderr.write(f"fedproc: worker {self._host.spec.name!r} ends: {error}\n")
            self._host.channel.hang_up()
        else:
            raise error

    def _wait(self, channel: Channel) -> None:
        if channel.unsent:
            self._poll.modify(channel, select.POLLIN | select.POLLOUT)
            self._poll.poll()
            channel.flush()
            self._poll.modify(channel, select.POLLIN)
        else:
            self._upkeep.look(busy=bool(self._poll.poll(self._upkeep.wait_ms)))

    def execute(self, frame: Frame) -> None:
        """Execute one command; whatever it raises becomes a reply.

        Raises:
            ProtocolError: there is no such command.
        """
        try:
            report = _execute_flat(self, frame)
        except BaseException as error:  # noqa: BLE001 - answers the request: nothing may end the loop
            self._fail(frame, error)
            self._note_executed(frame, late=False)
            return
        if report is None:
            self._execute(frame)
        elif report:
            self._report()

    def _execute(self, frame: Frame) -> None:
        host = self._host
        if frame.kind >= len(HANDLERS):
            raise ProtocolError(f"no command is of kind {frame.kind}")
        if host.stopped or 0 < frame.sequence <= self._last:
            return  # numbers only rise: an interrupted parent may have written a frame twice
        self._running = frame
        started = time.perf_counter()
        host.commands += 1
        if frame.sequence:  # a Release has none
            self._last = frame.sequence
        self._unreported += 1
        try:
            self._handle(frame)
            host.require_process(None)
        except BaseException as error:  # noqa: BLE001 - as above
            self._fail(frame, error)
        host.trouble = None
        host.used.clear()
        self._note_executed(frame, late=time.perf_counter() - started > REPORT_SECONDS)

    def _note_executed(self, frame: Frame, *, late: bool) -> None:
        """A command is done, or has failed. The parent is told when it took long (``late``)."""
        self._running = None
        if _QUERY[frame.kind]:  # done when its answer has come
            self._reported, self._unreported = frame.sequence, 0
            _flush(self._host)
            return
        self._host.arena.done[0] = self._last  # also if it is killed before it could tell
        if late or self._unreported >= REPORT_COMMANDS:
            self._report()

    def _handle(self, frame: Frame) -> None:
        """Execute any command."""
        host = self._host
        fields = host.decode(frame)
        if host.trouble is not None:
            raise host.trouble
        if self._turn is None or frame.kind not in (_CALL, _COMPUTE):
            HANDLERS[frame.kind](host, frame, fields)
        else:
            with self._turn(strict=_is_client(frame, fields)):
                HANDLERS[frame.kind](host, frame, fields)

    def _recover(self, error: BaseException) -> None:
        """Go on after a signal handler that a command installed has raised between commands.

        A command in whose administration it came has failed with it. Another may come in the
        middle of this: then all of it is done again, so that no command stays without an answer.
        """
        if self._running is not None:
            self._fail(self._running, error)
            self._running = None
        self._host.trouble = None
        self._host.used.clear()
        self._poll.modify(self._host.channel, select.POLLIN)
        self.interrupted = None
        shown = "".join(traceback.format_exception(error))
        with contextlib.suppress(Exception):  # a command may have put anything in its place
            sys.stderr.write(
                f"worker {self._host.spec.name!r}: a signal handler raised between commands; the "
                f"worker goes on.\n{shown}"
            )

    def _report(self) -> None:
        """Tell how far we are."""
        if self._last > self._reported:
            self._host.reply(commands.Done(), self._last)
            self._reported = self._last
            self._unreported = 0
        _flush(self._host)

    def _fail(self, frame: Frame, error: BaseException) -> None:
        host = self._host
        host.require_process(error)
        cause, told = frame.sequence, None
        if isinstance(error, PoisonedError):
            cause = error.cause
        else:
            self._unreported = REPORT_COMMANDS  # an error is told at once
            told = failure.describe(error, private=privacy.any_private(host.used))
            if isinstance(error, NotPermittedError) and failure.is_ours(error):
                self._log_refusal(frame, error)
        keeps = frame.flags & KEEP if frame.kind == _CALL else frame.kind not in _NO_RESULT
        if keeps and not _QUERY[frame.kind]:
            host.store.bury(frame.sequence, cause)
        if _QUERY[frame.kind]:
            host.reply(commands.Refusal(cause, told), frame.sequence)
        else:
            host.reply(commands.Failed(cause, told), frame.sequence)

    def _log_refusal(self, frame: Frame, error: NotPermittedError) -> None:
        host = self._host
        private = next((entry for entry in host.used if entry.domain.private), None)
        way = str(error).partition(":")[0]
        host.audit.refused(way, frame.sequence, private, str(error))


def _is_client(frame: Frame, fields: tuple[Any, ...]) -> bool:
    """Whether federated clients train: nobody may borrow their random generators."""
    return frame.kind == _COMPUTE and commands.Compute(*fields).folding


def _flush(host: Host) -> None:
    # What a command printed is seen before its result.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        sys.stderr.flush()
    host.channel.flush()
