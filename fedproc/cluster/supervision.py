"""Starting and ending workers. Runs in the parent."""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence

from fedproc.cluster.functions import Functions
from fedproc.errors import FedprocError, WorkerStartError
from fedproc.memory.arena import Arena, Mapped
from fedproc.memory.spares import SPARES
from fedproc.memory.undisturbed import undisturbed
from fedproc.remote.failures import Failures
from fedproc.remote.hub import Hub
from fedproc.remote.link import Link
from fedproc.remote.message import plain
from fedproc.remote.site import Site
from fedproc.remote.worker import Worker
from fedproc.transport.base import Transport, WorkerSpec, receive_descriptor
from fedproc.wire import commands

LOCKSTEP_SECONDS = 0.05
"""Inline workers share the parent's random generators: a quick command is done before the parent
goes on, so that neither sees the other's draws. A slow one runs beside it, as in a process."""
STOP_SECONDS = 2.0
"""How long a worker that was asked to stop may take, and again after SIGKILL."""


def upkeep_of(arena: Arena) -> Callable[[], None]:
    """What the janitor does with free memory; it must not hold on to the cluster."""

    def upkeep() -> None:
        SPARES.collect()
        arena.collect()

    return upkeep


class Supervisor:
    """Starts the workers of one cluster and ends them."""

    def __init__(
        self, transport: Transport, timeout: float, functions: Functions | None, min_rows: int
    ) -> None:
        """Prepare.

        Args:
            transport: starts the workers.
            timeout: seconds a worker may take to start.
            functions: all that they may run; None: whatever they are sent.
            min_rows: told with the functions.
        """
        self._functions = functions
        self._min_rows = min_rows
        self.arena = Arena("parent")
        self.hub = Hub(upkeep_of(self.arena))
        self._transport = transport
        self._timeout = timeout
        self._numbers = itertools.count(1)
        self._links: set[Link] = set()  # of all that were started and not ended
        self._replaced: list[Failures] = []  # of links that are gone, unseen when they went
        self._sync = os.environ.get("FEDPROC_SYNC", "") not in ("", "0")

    def start(self, specs: Sequence[WorkerSpec]) -> list[Worker]:
        """Start workers side by side and wait until all serve.

        Raises:
            WorkerStartError: one could not be started; the others are ended.
        """
        links: list[Link] = []
        try:
            self._transport.prepare(self._timeout)
            for spec in specs:
                with undisturbed():
                    links.append(self._launch(spec))
            deadline = time.monotonic() + self._timeout
            for link in links:
                self._greet(link, deadline)
                self._restrict(link)
        except BaseException:
            self.end(links)
            raise
        return [Worker(link, spec.device) for link, spec in zip(links, specs, strict=True)]

    def _launch(self, spec: WorkerSpec) -> Link:
        connection = self._transport.start(spec, self.arena.fd, self.arena.size_bytes)
        link = Link(spec.name, connection, self.hub, self.arena, self._numbers)
        self._links.add(link)
        SPARES.open(self.arena)
        self.hub.add(link)
        return link

    def _greet(self, link: Link, deadline: float) -> None:
        left = max(0.0, deadline - time.monotonic())
        inbox = link.inbox
        if not self.hub.wait_until(
            lambda: inbox.has(0) or inbox.failures.failed(0) or link.end is not None, left
        ):
            raise WorkerStartError(
                f"worker {link.name!r} did not answer within {self._timeout:g} s of its start. "
                "Raise start_timeout, or look at what it printed."
            )
        try:
            inbox.failures.raise_for(0)
            link.check()
            size = int(inbox.open(0))  # of its arena
        except FedprocError as error:
            raise WorkerStartError(f"worker {link.name!r} could not start: {error}") from error
        with undisturbed():
            self._map(link, size)
        link.lockstep = None if self._sync else LOCKSTEP_SECONDS if self._transport.inline else 0.0

    @staticmethod
    def _map(link: Link, size: int) -> None:
        """Map the arena of a worker, whose descriptor it has sent."""
        link.side.settimeout(STOP_SECONDS)
        try:
            fd = receive_descriptor(link.side)
            try:
                link.mapped = Mapped(fd, size)
            finally:
                os.close(fd)
        except OSError as error:
            raise WorkerStartError(
                f"worker {link.name!r}: {error}. Close files, or raise the limit (`ulimit -n`)."
            ) from error
        link.side.settimeout(None)

    def _restrict(self, link: Link) -> None:
        """Tell a worker all that it may run, before anybody else can tell it anything."""
        if self._functions is None:
            return
        told = commands.Inspect("register", (self._functions.entries, self._min_rows))
        try:
            link.ask(plain(told, "register functions"), Site.nowhere(), self._timeout)
        except FedprocError as error:
            raise WorkerStartError(
                f"worker {link.name!r} could not load the registered functions: {error}"
            ) from error
        link.registered = self._functions.digests

    def forget(self, gone: Worker, workers: Iterable[Worker]) -> None:
        """Let go of a worker that is gone, and have the others unmap its arena."""
        self.end([gone.link])
        if any(gone.link.failures.unseen()):
            self._replaced.append(gone.link.failures)
        name = gone.link.arena_name
        for worker in workers:
            if name in worker.link.attached and worker.link.end is None:
                worker.link.attached.discard(name)
                record = plain(commands.Attach(name, 0), "forget")
                worker.link.submit(record, Site.nowhere())

    def raise_unseen(self, links: Sequence[Link]) -> None:
        """Raise the first error, in the order of submission, that nobody has looked at."""
        unseen = [error for old in self._replaced for error in old.unseen()]
        unseen += [error for link in links for error in link.unseen()]
        if unseen:
            _, raise_it = min(unseen, key=lambda error: error[0])
            raise_it()

    def end(self, links: Sequence[Link]) -> None:
        """End workers: idle ones are asked to stop, busy ones are killed. Never raises."""
        with undisturbed():
            for link in links:
                link.closing = True
            for link in links:
                self._ask_to_stop(link)
            deadline = time.monotonic() + STOP_SECONDS
            for link in links:
                if link.process.wait(max(0.0, deadline - time.monotonic())) is None:
                    link.process.kill()
                    link.process.wait(STOP_SECONDS)
                link.close()
                self._links.discard(link)

    def _ask_to_stop(self, link: Link) -> None:
        if link.end is None:
            self.hub.look()
        if link.end is not None or link.pending():
            link.process.kill()
            return
        with contextlib.suppress(FedprocError):  # it died this moment
            link.submit(plain(commands.Stop(), "stop"), Site.nowhere(), urgent=True)

    def close(self) -> None:
        """End all workers and let go of the rest."""
        with undisturbed():
            self.end(list(self._links))
            self.hub.close()
            SPARES.close(self.arena)
            self.arena.close()
            self._transport.close()
