"""Bringing values home: copies by default, the worker's memory itself for a borrow. Parent."""

import contextlib
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from fedproc.errors import NotShippableError, remote_error
from fedproc.memory.arena import Block
from fedproc.memory.copying import fresh
from fedproc.memory.records import put_together
from fedproc.memory.tensors import Place, Table, place_bytes, read_place, rebuild
from fedproc.remade import attributes
from fedproc.remote import flat
from fedproc.remote.borrows import Borrow
from fedproc.remote.handle import Handle
from fedproc.remote.herald import executed
from fedproc.remote.lending import free_to_write, give_back, lend, lend_again
from fedproc.remote.link import Link
from fedproc.remote.message import Message, plain
from fedproc.remote.site import caller
from fedproc.wire import commands, frames
from fedproc.wire.codec import Decoder

if TYPE_CHECKING:
    from fedproc.remote.pointer import Pointer

Load = Callable[[Link, Place], torch.Tensor]
"""How the bytes of a tensor become one."""


def start(link: Link, handle: Handle, what: str, *, more: bool = False) -> Borrow:
    """Ask for a value; what could change it on the way waits until ``finish``.

    Args:
        link: of the handle, which another thread may move meanwhile: the answer comes from there.
        handle: of the object.
        what: the operation, for errors.
        more: others are asked for at once, and then ``link.flush`` is called.
    """
    borrow = Borrow(scoped=False)
    handle.check()
    if not flat.fetch(link, handle.oid, what, borrow):
        _ask(link, borrow, handle, what)
    elif not more:
        link.flush()
    return borrow


def asked(link: Link, message: Message) -> Borrow:
    """Send a question whose answer may lie in the worker's memory; ``finish`` takes it."""
    borrow = Borrow(scoped=False)
    lend(link, borrow, message, caller())
    if link.lockstep != 0.0:  # it takes time, as no other question does
        link.keep_step(borrow.query)
    return borrow


def _ask(link: Link, borrow: Borrow, handle: Handle, what: str, *, lent: bool = False) -> int:
    return lend(link, borrow, plain(commands.Fetch(handle.oid, lent), what), caller())


def has_arrived(link: Link, number: int) -> bool:
    """Whether command ``number`` was executed, or never will be. Looks, does not wait."""
    link.check_process()
    if not link.executed(number):
        link.flush()
        link.hub.look()
    return link.executed(number)


def finish(link: Link, borrow: Borrow, what: str, timeout: float | None = None) -> Any:
    """The value asked for, copied into memory of this process."""
    return finish_with_ids(link, borrow, what, timeout)[0]


def finish_with_ids(
    link: Link, borrow: Borrow, what: str, timeout: float | None
) -> tuple[Any, tuple[int, ...]]:
    """The value as of ``finish``, and all ids of the object in its worker."""
    try:
        flags, body, ids = link.answer(borrow.query, what, timeout)
        borrow.exported = bool(flags & frames.EXPORTED)
        return _decode(link, what, flags, body), ids
    finally:
        give_back(link, borrow)


def seen(link: Link, borrow: Borrow, what: str, timeout: float | None = None) -> Any:
    """The value asked for, whose first tensor lies in the worker until ``give_back``.

    For fedproc itself, which does not write to it; all others are copies. Commands that may write
    need not wait: the worker must not change the value any more.
    """
    try:
        flags, body, _ = link.answer(borrow.query, what, timeout)
        borrow.exported = bool(flags & frames.EXPORTED)
        ways = itertools.chain([_seen], itertools.repeat(_copied))

        def load(link: Link, place: Place) -> torch.Tensor:
            return next(ways)(link, place)

        found = _decode(link, what, flags, body, load)
    except BaseException:
        give_back(link, borrow)
        raise
    free_to_write(link, borrow)
    return found


def value(handle: Handle, what: str, timeout: float | None = None) -> Any:
    """A private copy of a remote value."""
    link = handle.link
    return finish(link, start(link, handle, what), what, timeout)


def taken(handle: Handle, timeout: float | None) -> tuple[Any, tuple[int, ...]]:
    """A private copy of a remote value, and all ids it has: each may have a handle of its own."""
    link = handle.link
    return finish_with_ids(link, start(link, handle, "get"), "get", timeout)


async def awaited(pointer: "Pointer") -> Any:
    """A private copy of a remote value, waited for on the running event loop.

    Takes the pointer, not its handle: ``await worker.run(...)`` drops it before this begins. The
    copying (a fraction of a second per gigabyte) is done in the thread of the loop.
    """
    try:
        handle = pointer._handle
        link = handle.link
        borrow = start(link, handle, "await")
        try:
            await executed(link, borrow.query)
        except BaseException:  # cancelled: the answer is of no use to anybody
            link.inbox.abandon(borrow.query)
            give_back(link, borrow)
            raise
        return finish(link, borrow, "await")
    except StopIteration as error:
        # One that leaves a coroutine becomes "RuntimeError: coroutine raised StopIteration".
        raise remote_error(None, str(error), attributes(error)) from None


@contextlib.contextmanager
def lent(pointer: "Pointer") -> Iterator[torch.Tensor]:
    """The worker's own memory of a tensor, for the length of the block.

    Takes the pointer, not its handle: the object must not be freed while it is lent.
    """
    handle = pointer._data()
    link = handle.link
    borrow = Borrow(scoped=True)
    try:
        yield _lent(link, borrow, handle, owned=_owns(pointer))
    finally:
        give_back(link, borrow)


def _owns(pointer: "Pointer") -> bool:
    """Whether the object lives as long as the pointer: one that was found by a search frees none.

    Dropping the one that does is no write.
    """
    owner: bool | Pointer = pointer
    while not isinstance(owner, bool):
        owner = owner._owner
    return owner


def _lent(link: Link, borrow: Borrow, handle: Handle, *, owned: bool) -> torch.Tensor:
    """Asks where a tensor lies only if something may have moved it: an answer is two wake-ups.

    Until then ``handle.place`` holds it: (who told, link.outbox.writes then, [place, dtype,
    shape]).
    """
    handle.check()
    told = _lent_again(link, borrow, handle) if owned else None
    if told is None:
        writes = _ask(link, borrow, handle, "borrow", lent=True)
        flags, body, _ = link.answer(borrow.query, "borrow")
        if not flags & frames.PLAIN:
            whole: torch.Tensor = _decode(link, "borrow", flags, body, _mapped)
            return whole.detach()
        *told, stays = body  # one piece of memory
        if stays:
            handle.place = link, writes, told
    place, dtype, shape = told
    return _mapped(link, place).view(dtype).view(shape)


def _lent_again(link: Link, borrow: Borrow, handle: Handle) -> list[Any] | None:
    """Where a tensor lies, if that is known; it is held there then."""
    known = handle.place
    if known is None or known[0] is not link:  # another thread moves it
        return None
    _, writes, told = known
    message = plain(commands.Lend(handle.oid, told[0]), "borrow")
    return told if lend_again(link, borrow, message, caller(), writes) else None


def computed(link: Link, number: int, what: str, timeout: float | None) -> Any:
    """The value in the answer to the Compute of this number: plain, or a copy."""
    flags, body = link.answer(number, what, timeout)
    try:
        return _decode(link, what, flags, body)
    finally:
        if flags & frames.EXPORTED:
            link.release(number)


def _copied(link: Link, place: Place) -> torch.Tensor:
    assert link.mapped is not None
    return read_place(place, link.mapped.view, fresh(place_bytes(place)))


def _decode(link: Link, what: str, flags: int, body: Any, load: Load = _copied) -> Any:
    """The value in an answer.

    Raises:
        NotShippableError: the code of what is in it raises when it is loaded.
    """
    if flags & frames.PLAIN:
        return body
    if flags & frames.RECORD:
        name, place, dtype, shape, rest = body
        return put_together(name, load(link, place).view(dtype).view(shape), rest)
    stream = io.BytesIO(body)
    tensors: list[torch.Tensor] = []
    if flags & frames.HAS_TENSORS:
        table: Table = pickle.load(stream)
        tensors = rebuild(table, lambda place: load(link, place))
    try:
        return Decoder(stream, lambda pid: tensors[-pid], {}).load()
    except MemoryError:
        raise
    except Exception as error:
        raise NotShippableError(
            f"{what}: the value was pickled on worker {link.name!r} but cannot be loaded here "
            f"({type(error).__name__}: {error}). The object stays there: fetch plain parts of it "
            "with worker.run(function, pointer)."
        ) from error


def _seen(link: Link, place: Place) -> torch.Tensor:
    if isinstance(place, bytes):
        return _copied(link, place)
    assert link.mapped is not None
    return torch.from_numpy(link.mapped.view(Block(*place)))


def _mapped(link: Link, place: Place) -> torch.Tensor:
    if isinstance(place, bytes):  # an empty tensor has no memory to lend
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    assert link.mapped is not None
    return torch.from_numpy(link.mapped.borrow(Block(*place)))
