"""Pointers to pointers: a pointer that was sent on to another worker. Runs in the parent.

The parent made every chain, so it resolves them itself: operations go straight to the worker that
has the data. The worker in the middle keeps a record, the *slot*. Only ``get``, ``remote_get``,
``move``, ``send`` and ``worker`` treat the chain itself.
"""

from typing import TYPE_CHECKING

from fedproc.errors import PlacementError
from fedproc.remote.handle import Handle
from fedproc.remote.making import make
from fedproc.remote.message import plain
from fedproc.remote.moving import move
from fedproc.remote.pointer import AnyPointer, Pointer
from fedproc.remote.site import caller
from fedproc.wire import commands

if TYPE_CHECKING:
    from fedproc.remote.worker import Worker


class Slot:
    """The place a chain takes: the pointer it was made from, and its record in a worker."""

    __slots__ = ("filled", "handle", "inner")

    def __init__(self, inner: "Pointer", handle: Handle) -> None:
        """``handle``: of the record."""
        self.inner = inner
        self.handle = handle
        self.filled = False  # the object itself took the place of the record

    def __del__(self) -> None:
        """Free the record."""
        if not self.filled:
            self.handle.drop()


def chain(pointer: AnyPointer, worker: "Worker") -> AnyPointer:
    """A pointer like ``pointer``, of which ``worker`` holds a record.

    Raises:
        NotPermittedError: the object is private.
    """
    handle = pointer._handle
    handle.check()
    worker.link.check()
    place = pointer._place()
    question = commands.Inspect("permitted", (handle.oid,))
    handle.link.ask(plain(question, "send"), caller())
    record = commands.Slot(place.link.name, place.oid)
    number = worker.link.submit(plain(record, "send"), caller())
    made = make(type(pointer), handle, pointer)
    made._chain = Slot(pointer, Handle(worker.link, number))
    return made


def take_apart(pointer: Pointer) -> Pointer:
    """The pointer that a chain was made from; the worker it was sent to holds nothing any more."""
    slot = pointer._chain
    assert slot is not None
    pointer._handle.check()
    slot.handle.link.check()
    gone = Handle(slot.handle.link, slot.handle.oid)
    gone.gone = (
        f"this chain on worker {slot.handle.link.name!r} was taken apart with get(): use the "
        "pointer that get() returned."
    )
    pointer._chain, pointer._handle, pointer._owner = None, gone, False
    return slot.inner


def pull(pointer: AnyPointer) -> AnyPointer:
    """Let the worker that a chain was sent to pull the data into its slot.

    Raises:
        PlacementError: it is not a chain.
    """
    slot = pointer._chain
    if slot is None:
        pointer._handle.check()
        raise PlacementError(
            f"{pointer!r} is not a chain: its worker holds the data already. remote_get() is for "
            "a pointer that was sent on with pointer.send(worker)."
        )
    outer = slot.inner._chain
    if outer is not None:  # one step: our slot takes over what the inner one pointed to
        slot.inner._chain = None
        slot.inner = outer.inner
        return pointer
    move(pointer._handle, slot.handle.link, slot=slot.handle.oid)
    slot.filled = True
    pointer._chain = None
    return pointer
