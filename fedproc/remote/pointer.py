"""Pointer: what a user holds of a remote object. Runs in the parent.

A pointer shares its ``Handle`` (where the object is) with all other pointers to the object, and
frees the object when it dies, unless it was found by a search. A *chain* is a pointer that was sent
on: it keeps the pointer it was made from and the slot it takes in the worker it was sent to;
operations on it run where the data is.
"""

import contextlib
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch

from fedproc.errors import (
    NotShippableError,
    PlacementError,
)
from fedproc.remote import reading
from fedproc.remote.encode import POINTER_TYPES
from fedproc.remote.handle import Handle, TakenAway

if TYPE_CHECKING:
    from typing_extensions import Self

    from fedproc.remote.chains import Slot
    from fedproc.remote.worker import Worker

KINDS: "dict[str, type[Pointer]]" = {}
"""The kinds of pointers by name: tensor, module, object, pending. Each tells its own below."""
AnyPointer = TypeVar("AnyPointer", bound="Pointer")


class Kind(type):
    """Class of the classes of pointers: ``isinstance`` waits until the kind is known.

    (A ``__class__`` property would do, too, but torch's argument parser would then wait as well.)
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        """Whether ``instance`` is, or turns out to be, one of this kind."""
        actual = type(instance)
        if cls is not Pointer and getattr(actual, "_fedproc_pending", False):
            actual = instance._kind()
        return issubclass(actual, cls)


class Pointer(metaclass=Kind):
    """A handle on an object in a worker.

    Dropping the last one frees the object. ``get`` brings the value home and empties the worker,
    ``fetch`` copies it, ``borrow`` lends it without a copy, ``move`` carries it to another worker.
    """

    __slots__ = ("__weakref__", "_chain", "_handle", "_owner")
    _fedproc_pointer = True
    _handle: Handle
    _owner: "bool | Pointer"  # True: its end frees the object; a pointer: that one's end does
    _chain: "Slot | None"

    def __init_subclass__(cls, kind: str = "") -> None:
        """Every class of pointer is known to the encoder, and those of a kind by its name."""
        POINTER_TYPES.add(cls)
        if kind:
            KINDS[kind] = cls

    def __del__(self) -> None:
        """Free the object, as ``Handle.drop`` does; without a call that Ctrl-C could come in."""
        try:
            if self._owner is True and self._handle.gone is None:
                self._handle.link.trash.append(self._handle.oid)
        except AttributeError:  # an interrupt may leave half a pointer
            pass

    # ---- where and what

    def _data(self) -> Handle:
        return self._handle

    def _place(self) -> Handle:
        return self._handle if self._chain is None else self._chain.handle

    @property
    def worker(self) -> "Worker":
        """The worker the pointer points to; of a chain: the one it was sent to."""
        found: Worker = self._place().link.worker
        return found

    @property
    def id(self) -> int:
        """Number of the object in its worker."""
        return self._place().oid

    @property
    def tags(self) -> frozenset[str]:
        """Tags given at ``send``."""
        return self._handle.labels[0]

    @property
    def description(self) -> str:
        """Description given at ``send``."""
        return self._handle.labels[1]

    def done(self) -> bool:
        """Whether the object is there (or never will be). Does not wait."""
        self._handle.check()
        return reading.has_arrived(self._handle.link, self._handle.number)

    def wait(self, timeout: float | None = None) -> "Self":
        """Wait until the object is there.

        Args:
            timeout: seconds; None: as long as the worker lives.

        Raises:
            CommandTimeoutError: not there within ``timeout``; it goes on.
            RemoteError: the command that makes it failed.
            WorkerLostError, ClosedError: it will never be there.
        """
        handle = self._handle
        handle.check()
        handle.link.check()
        handle.link.wait(handle.number, timeout, "wait")
        handle.link.failures.raise_for(handle.number)
        return self

    # ---- values

    def get(self, timeout: float | None = None) -> Any:
        """Bring the value home; the remote object is gone afterwards.

        Args:
            timeout: seconds; None: as long as the worker lives.

        Returns:
            The value. Of a chain: the pointer it was made from.

        Raises:
            ObjectGoneError: it was brought home before.
            CommandTimeoutError: not done within ``timeout``; nothing has changed, ask again.
            RemoteError: the command that makes the object failed.
            NotPermittedError: the object is private.
            NotShippableError: it cannot be pickled; it stays there.
        """
        if self._chain is not None:
            from fedproc.remote.chains import take_apart

            return take_apart(self)
        handle = self._handle
        with TakenAway(handle, "get", timeout):
            value, ids = reading.taken(handle, timeout)
            handle.brought_home(ids)
        return value

    def fetch(self, timeout: float | None = None) -> Any:
        """A private copy of the value; the remote object stays.

        Args and errors as for ``get``.
        """
        return reading.value(self._handle, "fetch", timeout)

    def __await__(self) -> Generator[Any, None, Any]:
        """``await pointer`` is ``fetch()`` on a running event loop: other tasks run meanwhile.

        As ``fetch`` it takes nothing away, so cancelling it (``asyncio.timeout``) loses nothing
        and it can be repeated. The kind of a pending pointer is not asked for.

        A StopIteration of the worker comes as a RemoteError that is none, because one that leaves
        a coroutine becomes a RuntimeError; ``get`` and ``fetch`` raise both in one.
        """
        return reading.awaited(self).__await__()

    def borrow(self) -> "contextlib.AbstractContextManager[torch.Tensor]":
        """Lend the tensor's memory: ``with p.borrow() as t:``.

        ``t`` is detached, and read-only by contract. Commands of the worker that may write wait
        until the block ends.
        """
        return reading.lent(self)

    def copy(self) -> "Self":
        """A second, independent remote object; of a tensor: a new leaf without gradient."""
        from fedproc.remote.calls import run_there

        return run_there(
            type(self), "fedproc.worker.parts.copy", (self,), what="copy", writes=False
        )

    # ---- moving

    def move(self, worker: "Worker") -> "Self":
        """Carry the object to ``worker``; this pointer and all others to the object follow.

        The bytes go from shared memory to shared memory, not through the parent.
        """
        from fedproc.remote.moving import move

        require_worker("move", worker)
        slot, self._chain = self._chain, None
        try:
            move(self._handle, worker.link)
        except BaseException:
            self._chain = slot
            raise
        return self

    def send(self, worker: "Worker") -> "Self":
        """Make a chain: ``worker`` holds a pointer to this pointer's object.

        Raises:
            NotPermittedError: the object is private.
        """
        from fedproc.remote.chains import chain

        require_worker("send", worker)
        return chain(self, worker)

    def remote_get(self) -> "Self":
        """The worker this chain was sent to pulls the data: its slot holds the value afterwards.

        Raises:
            PlacementError: this is not a chain.
        """
        from fedproc.remote.chains import pull

        return pull(self)

    # ---- what a pointer is not

    __array_ufunc__ = None

    # NumPy leaves operators to us: its scalars are numbers, its arrays are refused.
    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to become an array or a local tensor behind the user's back."""
        raise PlacementError(
            f"{self!r} is in another process and does not become an array or a local tensor by "
            "itself. Bring it home: pointer.get() or pointer.fetch()."
        )

    __dlpack__ = __dlpack_device__ = __array__  # torch.tensor and torch.as_tensor ask for these

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be pickled, copied or captured."""
        raise NotShippableError(
            f"{self!r} is a pointer of this process: it cannot be pickled, copied with copy or "
            "captured by a function. Pass it as an argument, worker.run(fn, pointer); copy the "
            "object with pointer.copy(); save its value with pointer.fetch()."
        )

    __deepcopy__ = __reduce_ex__

    def __format__(self, specification: str) -> str:
        """The text of ``repr``; a value is formatted as ``{p.item():.2f}``."""
        if specification:
            raise TypeError(
                f"{self!r} cannot be formatted as {specification!r}: it is a pointer. Use the "
                "value, for example pointer.item() or pointer.fetch()."
            )
        return repr(self)

    def __repr__(self) -> str:
        """Kind, worker, id, and shape and dtype if known; never a value."""
        place = self._place()
        parts = [f"{type(self).__name__} {place.oid} on {place.link.name}"]
        if self._chain is not None:
            parts.append(f"-> {self._handle.oid} on {self._handle.link.name}")
        if self._handle.gone is not None:
            parts.append("(gone)")
        elif self._handle.facts is not None and self._handle.facts.get("shape") is not None:
            facts = self._handle.facts
            parts.append(f"{tuple(facts['shape'])} {str(facts['dtype']).removeprefix('torch.')}")
        return f"<{' '.join(parts)}>"


def require_worker(what: str, worker: object) -> None:
    """Raise TypeError for anything but a worker: its name is the usual mistake."""
    if not hasattr(worker, "link"):
        raise TypeError(
            f"{what}: needs a worker, got {worker!r}. Pass one of the cluster's, cluster[name]."
        )
