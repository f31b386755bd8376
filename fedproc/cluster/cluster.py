"""Cluster: worker processes by name. Runs in the parent; the class that users start with.

No torch on top: while this process imports it, so does the one that workers are forked from.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from fedproc import ranges
from fedproc.cluster import placing
from fedproc.cluster.functions import functions_of
from fedproc.errors import ClosedError, CommandTimeoutError, WorkerLostError, WorkerNotFoundError
from fedproc.memory.pages import usable_cores
from fedproc.transport.base import Transport, WorkerSpec

if TYPE_CHECKING:
    from typing_extensions import Self

    from fedproc.cluster.functions import Functions
    from fedproc.remote.group import PointerGroup
    from fedproc.remote.pointer import Pointer
    from fedproc.remote.worker import Worker

_open: set[Cluster] = set()


class Cluster:
    """Worker processes on this machine, by name.

    Args:
        workers: names; a number of workers (``worker-0`` ...); None: one per usable core.
        threads: torch threads per worker; None: the cores divided by the workers.
        seed: of the workers' random generators, together with the worker's name.
        memory_limit: bytes of shared memory per worker; None: bounded by the machine.
        preload: names of modules to import before the workers start.
        restart: replace a dead worker by an empty one of the same name.
        transport: ``"process"``, or ``"inline"``: threads of this process, for debugging.
        devices: torch devices dealt to the workers in turn, several may share one; None: the CPU.
        min_rows: rows an evaluation on private data must cover for its means to leave a worker.
        functions: the functions and classes that the workers run, beside torch's operations and
            fedproc's own; code that is shipped is refused (NotPermittedError). None: any.
        start_timeout: seconds that starting may take.

    Raises:
        ValueError: no workers, an empty or a duplicate name, or another argument out of range.
        WorkerStartError: a worker or a preloaded module could not be started.
    """

    def __init__(
        self,
        workers: int | Iterable[str] | None = None,
        *,
        threads: int | None = None,
        seed: int = 0,
        memory_limit: int | None = None,
        preload: Sequence[str] = (),
        restart: bool = False,
        transport: str = "process",
        devices: Sequence[Any] | None = None,
        min_rows: int = 10,
        functions: Iterable[Callable[..., Any]] | None = None,
        start_timeout: float = 60.0,
    ) -> None:
        """Start the workers."""
        names = placing.names_of(workers)
        self.seed = ranges.require_whole("seed", seed)
        self.min_rows = ranges.require_at_least("min_rows", min_rows, 1)
        self.transport = transport
        self.threads = ranges.require_count_or_none("threads", threads)
        limit = ranges.require_count_or_none("memory_limit", memory_limit)
        timeout = ranges.require_seconds("start_timeout", start_timeout)
        self._restart = ranges.require_switch("restart", restart)
        self._owner = os.getpid()
        self._closed = False
        self._lock = threading.RLock()
        each = self.threads or max(1, usable_cores() // len(names))
        self._specs = [
            WorkerSpec(name, self.seed, each, limit, device)
            for name, device in zip(names, placing.dealt(devices), strict=False)
        ]
        told = None if functions is None else functions_of(functions)
        modules = (preload,) if isinstance(preload, str) else tuple(preload)
        self._start(placing.make_transport(transport, modules), timeout, told)

    def _start(self, transport: Transport, timeout: float, functions: Functions | None) -> None:
        """Start the workers; what was begun is ended if that fails."""
        try:
            from fedproc.cluster.supervision import Supervisor

            self._supervisor = Supervisor(transport, timeout, functions, self.min_rows)
            self._workers = {worker.name: worker for worker in self._supervisor.start(self._specs)}
            _open.add(self)
        except BaseException:
            try:
                getattr(self, "_supervisor", transport).close()
            finally:  # again: a second Ctrl-C may come where the first one begins
                getattr(self, "_supervisor", transport).close()
            raise

    # ---- workers by name

    @property
    def workers(self) -> tuple[Worker, ...]:
        """The workers, in the order of their names."""
        return tuple(self[name] for name in self._workers)

    def __getitem__(self, name: str) -> Worker:
        """The worker of that name; with ``restart=True`` a new one if it has died.

        Raises:
            WorkerNotFoundError: there is none.
        """
        if name not in self._workers:
            known = ", ".join(repr(known) for known in self._workers)
            raise WorkerNotFoundError(f"no worker is called {name!r}; there are {known}")
        worker = self._workers[name]
        if self._restart and not worker.alive and isinstance(worker.link.end, WorkerLostError):
            return self.replace(worker)
        return worker

    def replace(self, worker: Worker) -> Worker:
        """End a worker and start an empty one of the same name; its old pointers stay lost.

        Raises:
            ClosedError: the cluster is closed.
            WorkerStartError: the new one could not be started.
        """
        with self._lock:
            if self._closed:
                raise ClosedError("the cluster is closed: no worker can be replaced")
            if self._workers[worker.name] is worker:  # not done by another thread meanwhile
                worker.kill()
                self._supervisor.forget(worker, self._workers.values())
                spec = next(spec for spec in self._specs if spec.name == worker.name)
                self._workers[worker.name] = self._supervisor.start([spec])[0]
            return self._workers[worker.name]

    def __iter__(self) -> Iterator[Worker]:
        """The workers, in order."""
        return iter(self.workers)

    def __len__(self) -> int:
        """Number of workers."""
        return len(self._workers)

    def __contains__(self, name: object) -> bool:
        """Whether a worker has that name (or is one of ours)."""
        return any(name is worker for worker in self._workers.values()) or name in self._workers

    # ---- work for all of them

    def run(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        """``worker.run`` on every worker: a list of pointers."""
        return [worker.run(fn, *args, **kwargs) for worker in self.workers]

    def send(self, obj: Any, **options: Any) -> PointerGroup:
        """``worker.send`` to every worker: a group of pointers."""
        from fedproc.remote.group import PointerGroup

        return PointerGroup([worker.send(obj, **options) for worker in self.workers])

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """``[fn(item) for item in items]``, dealt to idle workers that are alive.

        Raises:
            Exception: the first error in the order of the items; items after it may not have run.
        """
        from fedproc.remote import reading
        from fedproc.remote.completed import as_completed

        todo = list(items)
        results: list[Any] = [None] * len(todo)
        errors: dict[int, Exception] = {}
        running: dict[Pointer, tuple[int, Worker]] = {}
        places = iter(range(len(todo)))
        idle = [worker for worker in self.workers if worker.alive] or list(self.workers)
        while True:
            while idle and not errors and (place := next(places, None)) is not None:
                worker = idle.pop()
                running[worker.run(fn, todo[place])] = (place, worker)
            if not running:
                break
            pointer = next(as_completed(running))
            place, worker = running.pop(pointer)
            try:
                results[place] = reading.value(pointer._data(), "map")
            except Exception as error:  # noqa: BLE001 - raised below, the first in order
                errors[place] = error
            idle.append(worker)
        if errors:
            raise errors[min(errors)]
        return results

    def search(self, *tags: str) -> dict[str, list[Any]]:
        """Worker name -> pointers to its objects with all ``tags``; only workers that have some."""
        found = {worker.name: worker.search(*tags) for worker in self.workers}
        return {name: pointers for name, pointers in found.items() if pointers}

    def wait(self, timeout: float | None = None) -> None:
        """Wait until all submitted work is done.

        Raises:
            Exception: the first error, in the order of submission, that nobody has looked at.
            CommandTimeoutError: not done within ``timeout`` seconds.
            ClosedError: the cluster is closed.
        """
        if self._closed or self._owner != os.getpid():
            raise ClosedError("the cluster is closed, or another process's: nothing to wait for")
        links = [worker.link for worker in self._workers.values()]
        for link in links:
            link.refuse_deadlock(link.outbox.last)
            link.flush()
        targets = [(link, link.outbox.last) for link in links]
        if not self._supervisor.hub.wait_until(
            lambda: all(link.executed(number) for link, number in targets), timeout
        ):
            busy = [link.name for link, number in targets if not link.executed(number)]
            raise CommandTimeoutError(
                f"wait: {', '.join(map(repr, busy))} not done within {timeout:g} s. The work goes "
                "on; wait again, or end a worker with worker.kill()."
            )
        self._supervisor.raise_unseen(links)
        if self._closed and any(link.inbox.executed < number for link, number in targets):
            raise ClosedError("wait: the cluster was closed meanwhile; not all work was done")

    @property
    def messages(self) -> int:
        """Number of commands submitted to the workers so far."""
        return sum(worker.link.outbox.submitted for worker in self._workers.values())

    @property
    def message_bytes(self) -> int:
        """Bytes of the messages to and from the workers so far; shared memory is not counted."""
        return sum(worker.link.channel.moved_bytes for worker in self._workers.values())

    # ---- the end

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    def close(self) -> None:
        """End all workers without waiting for their work. Idempotent; never raises."""
        with self._lock:
            if self not in _open or self._owner != os.getpid():
                return
            self._closed = True
            self._supervisor.close()
            _open.discard(self)  # last: interrupted before, close() can be called again

    def __enter__(self) -> Self:
        """The cluster itself; ClosedError if it is closed."""
        if self._closed:
            raise placing.closed_error("`with cluster`")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for submitted work and raise errors nobody saw, unless the body raised; close."""
        try:
            if kind is None and not self._closed:
                self.wait()
        finally:
            self.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be pickled, copied or captured, in whatever it is a part of."""
        raise placing.not_shippable(self)

    def __repr__(self) -> str:
        """The names."""
        state = "closed" if self._closed else self.transport
        return f"<Cluster {', '.join(self._workers)} ({state})>"


def _close_all() -> None:
    for cluster in list(_open):
        cluster.close()


def _forget_in_child() -> None:
    for cluster in list(_open):
        for worker in cluster._workers.values():
            worker.link.abandon()
    _open.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_in_child)
