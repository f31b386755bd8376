"""Carrying an object from worker to worker, arena to arena. Runs in the parent.

The source exports the object into its own arena, the destination copies it from there: the bytes
never pass through the parent. The source keeps the object until the destination has it, so that
nothing is lost when the destination is full; what could change it meanwhile waits. Where another
thread has issued that, it finds the object gone and fails: it must not change what nobody will see.
"""

import socket
import warnings
from typing import Any

from fedproc.memory.undisturbed import undisturbed
from fedproc.remote.borrows import Borrow
from fedproc.remote.handle import Handle, TakenAway
from fedproc.remote.lending import free_to_write, give_back, lend
from fedproc.remote.link import Link
from fedproc.remote.message import plain
from fedproc.remote.site import Site, caller
from fedproc.wire import commands


def move(handle: Handle, target: Link, *, slot: int = 0) -> None:
    """Carry the object of ``handle`` to ``target``; all its pointers follow.

    Args:
        handle: of the object.
        target: where to.
        slot: id of a chain's record there that the object replaces; 0: none.

    Raises:
        NotPermittedError: it is private.
        ArenaFullError: no room there; it stays where it was.
    """
    site = caller()
    with TakenAway(handle, "move"):
        source = handle.link
        if target is source and not slot:
            return
        cut, optimizer = _moved(handle, target, slot, site)
    if cut:
        warn_cut("move")
    if optimizer:
        warnings.warn(
            f"move: an optimizer on worker {source.name!r} still steps the parameters that stayed "
            f"behind there. Make a new one on {target.name!r} from model.parameters().",
            UserWarning,
            stacklevel=3,
        )


def _moved(handle: Handle, target: Link, slot: int, site: Site) -> tuple[bool, bool]:
    """Move it; whether a graph was cut, and an optimizer left behind."""
    source = handle.link
    target.check()
    told = _carry(handle, target, slot, site, copy=False)
    if told is None:
        told = _carry(handle, target, slot, site, copy=True)
    assert told is not None
    number, ids, cut, optimizer = told
    _follow(source, ids, target, slot or number, number)
    return cut, optimizer


def _carry(
    handle: Handle, target: Link, slot: int, site: Site, *, copy: bool
) -> tuple[int, tuple[int, ...], bool, bool] | None:
    """Export here, import there: (number of the import, ids, graph cut, optimizer left behind).

    Without ``copy`` the source's writes wait until the target has read. The target must be able to
    read at once then: were it held back itself by somebody who waits for our source, both would
    wait for ever. If it is held back: None, to be done with a copy.
    """
    source = handle.link
    message = plain(commands.Export(handle.oid, copy), "move")
    borrow = Borrow(scoped=False)
    try:
        lend(source, borrow, message, site)
        flags, payload, ids, cut, optimizer, labels = source.answer(borrow.query, "move")
        if copy:
            free_to_write(source, borrow)
        attaching = _attach(source, target)
        record = commands.Import(slot, source.arena_name, flags, payload, *labels)
        with target.outbox.lock:
            if target.outbox.holding and not copy:
                return None
            number = target.submit(plain(record, "move"), site, urgent=True)
        _answer(source, target, number, attaching, kept=slot != 0)
        source.outbox.remove_at_once(handle.oid)
    finally:
        give_back(source, borrow)
    return number, ids, cut, optimizer


def _follow(source: Link, ids: tuple[int, ...], target: Link, oid: int, number: int) -> None:
    """Every handle of the object, and of its parts, points to its new place."""
    handles = [handle for old in ids if (handle := source.handle(old)) is not None]
    for place, handle in enumerate(handles):
        # The first keeps the id of the import; each further one needs an id of its own, since
        # each is freed on its own.
        new = oid if place == 0 else _part(target, oid, ())
        handle.moved(target, new, number)
        for part in list(handle.parts or ()):
            if part.link is source and part.gone is None:
                source.trash.append(part.oid)
                moved = _part(target, oid, part.path)
                part.moved(target, moved, moved)


def _part(target: Link, oid: int, path: tuple[Any, ...]) -> int:
    return target.submit(plain(commands.Part(oid, path), "move"), caller())


def _answer(source: Link, target: Link, number: int, attaching: int, *, kept: bool) -> None:
    """Wait for import ``number``; the next move attaches again if ``attaching`` has failed.

    ``kept``: somebody has a pointer to what comes of it, also when it comes too late.
    """
    try:
        target.answer(number, "move")
    except BaseException:
        if not kept:
            target.trash.append(number)
        _require_attached(source, target, attaching)
        raise


def _attach(source: Link, target: Link) -> int:
    """Let ``target`` map the arena of ``source``, once per pair; number of the command, or 0."""
    assert source.mapped is not None
    record = commands.Attach(source.arena_name, source.mapped.size_bytes)
    # Descriptors carry no name: they must come in the order of the commands, one for each. What
    # another thread, or Ctrl-C, put in between would map the memory of one worker as another's.
    with undisturbed(), target.outbox.lock:
        if source.arena_name in target.attached:
            return 0
        number = target.submit(plain(record, "move"), caller(), urgent=True)
        socket.send_fds(target.side, [b"a"], [source.mapped.fd])
        target.attached.add(source.arena_name)
        return number


def attach(source: Link, target: Link) -> None:
    """Let ``target`` map the arena of ``source``, and wait until it has.

    Raises:
        OSError: it cannot, for lack of descriptors for instance.
        WorkerLostError: one of them has ended.
    """
    source.check()
    number = _attach(source, target)
    if number:
        target.wait(number, None, "attach")
        _require_attached(source, target, number)


def _require_attached(source: Link, target: Link, attaching: int) -> None:
    """Raise what made command ``attaching`` fail, if it did; the next one tries again."""
    if target.failures.failed(attaching):
        target.attached.discard(source.arena_name)
        target.failures.raise_for(attaching)


def warn_cut(what: str) -> None:
    """A tensor with autograd history lost it."""
    warnings.warn(
        f"{what}: the tensor is the result of an operation and needs gradients; the graph is cut: "
        "its history stays behind, so backward() does not reach what it was computed from. Send "
        "leaves, or detach().",
        UserWarning,
        stacklevel=4,
    )
