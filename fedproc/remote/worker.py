"""Worker: the parent's name for a worker process. Runs in the parent."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from fedproc.errors import PlacementError
from fedproc.memory.tensors import shape_of
from fedproc.remote import flat
from fedproc.remote.calls import run_there
from fedproc.remote.encode import Outgoing, labels_of, sent_as
from fedproc.remote.group import PointerGroup
from fedproc.remote.handle import Handle
from fedproc.remote.link import Link
from fedproc.remote.making import make, owned
from fedproc.remote.message import plain
from fedproc.remote.module import ModulePointer
from fedproc.remote.moving import warn_cut
from fedproc.remote.object import ObjectPointer
from fedproc.remote.pending import PendingPointer
from fedproc.remote.pointer import KINDS, Pointer
from fedproc.remote.site import caller
from fedproc.remote.stalls import STACK_SECONDS, stack
from fedproc.remote.tensor import TensorPointer
from fedproc.wire import commands, frames

if TYPE_CHECKING:
    from collections.abc import Callable


class ObjectInfo(NamedTuple):
    """One row of ``worker.objects``."""

    id: int
    type: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    nbytes: int
    tags: frozenset[str]
    description: str
    private: bool


class WorkerStats(NamedTuple):
    """What a worker has used: seconds, bytes and counts since its start."""

    cpu_s: float
    rss_bytes: int
    pss_bytes: int
    arena_bytes: int
    objects: int
    commands: int


class AuditRecord(NamedTuple):
    """One line of ``worker.audit()``.

    ``number`` counts from 1; ``time`` is in seconds since 1970; ``event`` is "left" or "refused";
    ``way`` is the way out: "fold", "evaluation", "metric", or the name of what was refused ("get",
    "borrow", "move", "send", "run", "Tensor.item" ...); ``command`` is the command's number;
    ``object``, ``type``, ``shape``: of the private object, None and "" where there was none;
    ``nbytes``: what left; ``to``: who asked; ``detail``: the method, or the error's text.
    """

    number: int
    time: float
    event: str
    way: str
    command: int
    object: int | None
    type: str
    shape: tuple[int, ...] | None
    nbytes: int
    to: str
    detail: str


class Worker:
    """A worker process: a collection of objects, and functions that run beside them."""

    def __init__(self, link: Link, device: str) -> None:
        """``link``: one incarnation of the process."""
        self.link = link
        self.device = torch.device(device)
        link.worker = self

    @property
    def name(self) -> str:
        """Its name in the cluster."""
        return self.link.name

    @property
    def pid(self) -> int:
        """Process id; of an inline worker the parent's."""
        return self.link.process.pid

    @property
    def alive(self) -> bool:
        """Whether its process runs and the cluster is open; in a forked child: ClosedError."""
        self.link.check_process()
        if self.link.end is None:
            self.link.hub.look()
        return self.link.end is None

    @property
    def exitcode(self) -> int | None:
        """As in ``multiprocessing``: None while it runs, -9 after SIGKILL. Inline: None."""
        return self.link.exitcode()

    def kill(self) -> None:
        """SIGKILL: the process and its children end at once; who waits gets WorkerLostError."""
        self.link.kill()

    def stack(self, timeout: float | None = STACK_SECONDS) -> str:
        """The Python stack of the thread that runs commands, innermost call first; busy or idle.

        A command that runs longer than 30 s is logged with its stack as a warning of the logger
        ``fedproc``; the environment variable ``FEDPROC_STALL_SECONDS`` changes that (0: never).

        Args:
            timeout: seconds; None: as long as it lives. A process that is stopped shows nothing.

        Raises:
            CommandTimeoutError: nothing was shown within ``timeout``.
            WorkerLostError, ClosedError: it has ended.
        """
        return stack(self.link, timeout)

    # ---- objects

    def send(
        self,
        obj: Any,
        *,
        private: bool = False,
        tags: Iterable[str] | str = (),
        description: str = "",
    ) -> Any:
        """Copy ``obj`` to the worker: a pointer to a new object there, at once.

        Args:
            obj: anything that can be pickled; a pointer makes a chain.
            private: the value may be used in the worker but not leave it.
            tags: labels to search for; one string is one tag.
            description: shown in listings.

        Raises:
            NotShippableError: it cannot be pickled; nothing was sent.
            ArenaFullError: no shared memory left for it in this process.
            ValueError: a pointer with ``private``, ``tags`` or ``description``; labels that are no
                text.
        """
        if isinstance(obj, PointerGroup):
            raise PlacementError("a PointerGroup has a member on each of its workers: send those")
        labels = labels_of(tags, description)
        if issubclass(type(obj), Pointer):
            if private or labels or description:
                raise ValueError(
                    f"{obj!r} makes a chain: no object is sent that private=, tags= or "
                    "description= could be of. Give them where the object is made, or send its "
                    "value: worker.send(pointer.fetch(), ...)."
                )
            return obj.send(self)
        return put(
            self.link, obj, what="send", private=private, tags=labels, description=description
        )

    def run(
        self, fn: "Callable[..., Any]", /, *args: Any, private: bool = False, **kwargs: Any
    ) -> Any:
        """Run ``fn(*args, **kwargs)`` in the worker: a pointer to the result, at once.

        Pointers among the arguments, also inside lists, tuples and dicts, are the worker's own
        objects when ``fn`` sees them. Other arguments are copied.

        Raises:
            PlacementError: a pointer to another worker, or a pointer beside a local tensor.
            NotShippableError: something cannot be pickled.
        """
        if not (kwargs or private):
            made = flat.submit(PendingPointer, self.link, fn, args, None, True, False)
            if made is not None:
                return made
        function, what = sent_as(fn)
        if private:
            self.link.keeps_private = True
        return run_there(
            PendingPointer, function, args, kwargs, what=what, link=self.link, private=bool(private)
        )

    @property
    def objects(self) -> Mapping[int, ObjectInfo]:
        """What lives in the worker now: id -> ObjectInfo, oldest first."""
        rows = self._inspect("objects")
        return MappingProxyType({row["id"]: ObjectInfo(**row) for row in rows})

    def stats(self) -> WorkerStats:
        """CPU seconds, memory in bytes and counts of the worker."""
        return WorkerStats(**self._inspect("stats"))

    def audit(self) -> tuple[AuditRecord, ...]:
        """What left this worker although it is private, and what was refused; oldest first.

        The log is kept in the worker's memory, can only be added to, and ends with the worker. It
        keeps the newest 10,000 records: a first ``number`` above 1 tells how many are gone. Public
        objects are not logged.
        """
        return tuple(AuditRecord(*row) for row in self._inspect("audit"))

    def search(self, *tags: str) -> list[Any]:
        """Pointers to the objects that carry all ``tags``. They do not own the objects.

        Raises:
            ValueError: no tags were given.
        """
        if not tags:
            raise ValueError("search needs at least one tag; worker.objects lists everything")
        found = []
        for oid, told in self._inspect("search", frozenset(tags)):
            handle = self.link.handle(oid)
            if handle is None:
                handle = Handle(self.link, oid)
            handle.facts, handle.facts_at = told, self.link.outbox.writes
            found.append(make(KINDS[told["kind"]], handle, owner=False))
        return found

    def clear(self) -> "Worker":
        """Forget all objects; pointers to them raise ObjectGoneError from now on."""
        link = self.link
        link.tidy()
        with link.outbox.lock:  # nobody asks in between
            link.outbox.writes += 1  # what is known of objects is not so any more
            number = link.submit(plain(commands.Inspect("clear"), "clear"), caller(), urgent=True)
        link.answer(number, "clear")
        for handle in filter(None, [held() for held in list(link.outbox.handles.values())]):
            handle.gone = (
                f"object {handle.oid} is gone: worker {self.name!r} was cleared. Send it again."
            )
        link.outbox.handles.clear()
        return self

    def _inspect(self, what: str, *args: Any) -> Any:
        self.link.tidy()
        return self.link.ask(plain(commands.Inspect(what, args), what), caller())

    # ---- what a worker is not

    def __reduce__(self) -> Any:
        """Refuse to be pickled."""
        raise TypeError(f"worker {self.name!r} belongs to this process and cannot be pickled")

    def __deepcopy__(self, memo: Any) -> "Worker":
        """A copy of whatever refers to a worker refers to the same one."""
        return self

    def __repr__(self) -> str:
        """Name, process and commands on their way, as far as known: it never waits."""
        if self.link.end is not None:
            return f"<Worker {self.name} (gone)>"
        return f"<Worker {self.name} pid={self.pid} pending={self.link.inbox.unanswered()}>"


def put(
    link: Link, value: Any, *, what: str, private: bool = False, tags: tuple[str, ...] = (),
    description: str = "", more: bool = False,
) -> Any:  # fmt: skip
    """Keep ``value`` as a new object; a pointer of its kind. ``more``: see ``Link.submit``."""
    link.check()
    outgoing = Outgoing(what, link)
    if private:
        link.keeps_private = True
    flags = 0 if private else frames.SHARED
    message = outgoing.encode(commands.Put, (value, private, tags, description), flags)
    if outgoing.cut_graph:
        warn_cut(what)
    kind: type[Pointer] = ObjectPointer
    if isinstance(value, torch.Tensor):
        kind = TensorPointer
    elif isinstance(value, nn.Module):
        kind = ModulePointer
    pointer = owned(kind, link, message, caller(), more=more)
    handle = pointer._handle
    handle.labels = (frozenset(tags), description)
    if isinstance(value, torch.Tensor):
        leaf = value.grad_fn is None
        handle.facts = {
            "kind": "tensor",
            "shape": shape_of(value),
            "dtype": value.dtype,
            "device": value.device,
            "requires_grad": leaf and value.requires_grad,
            "is_leaf": True,
        }
        handle.facts_at = link.outbox.writes
    return pointer
