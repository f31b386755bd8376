"""Flat calls and questions in one step, where that was compiled. Runs in the parent.

A call is *flat* when its function has a name and its arguments are pointers and plain values: what
pipelines are made of. ``_flat.c`` does for it what ``calls``, ``encode``, ``link``, ``outbox`` and
``making`` do, in a third of the time, and the same for a question of that kind, and for asking for
an object. It is optional: where there was no C compiler, and for whatever is not usual about a
call, those are the way.
"""

import sys
from typing import Any, Final

import torch

from fedproc.remote.encode import POINTER_TYPES
from fedproc.remote.handle import Handle
from fedproc.remote.link import MOST_UNANSWERED, Link
from fedproc.remote.outbox import BURST_COMMANDS
from fedproc.remote.pointer import Pointer
from fedproc.remote.site import KNOWN_FILES, Site, is_ours
from fedproc.transport.channel import Channel
from fedproc.wire import commands, frames
from fedproc.wire.code import KEPT_NAMES

try:
    from fedproc.remote import _flat
except ImportError:  # not built
    _flat = None  # type: ignore[assignment]


COMPILED: Final = _flat is not None
"""Whether this installation has the compiled way."""


def _not_compiled(*_: Any) -> None:
    """Nothing is taken: all goes the general way."""


def _wire_up(link: Link) -> tuple[Any, ...]:
    """What ``_flat.c`` touches of a link, kept there: none of it is ever replaced by another.

    A channel with faults in it has its own way to append: nothing then, and no call is flat.
    """
    outbox, inbox, hub = link.outbox, link.inbox, link.hub
    lock, trash, frames = outbox.lock, outbox.trash, link.channel._frames
    link.wiring = () if type(link.channel) is not Channel else (
        outbox, inbox, hub, lock.acquire, lock.release, outbox._held, trash, trash.popleft,
        inbox.expected, inbox.expected.append, outbox.borrows, outbox.borrows.reading,
        outbox._numbers, outbox.handles, frames, frames.append, hub._bell.locked,
    )  # fmt: skip
    return link.wiring


def _prepare() -> None:
    parts = {
        "pointer_types": POINTER_TYPES,
        "handle_class": Handle,
        "site_class": Site,
        "wire_up": _wire_up,
        "handle_slot": Pointer.__dict__["_handle"],
        "owner_slot": Pointer.__dict__["_owner"],
        "chain_slot": Pointer.__dict__["_chain"],
        "kept_names": KEPT_NAMES,
        "known_files": KNOWN_FILES,
        "is_ours": is_ours,
        "get_frame": sys._getframe,
        "is_grad_enabled": torch.is_grad_enabled,
        "is_any_autocast_enabled": torch._C._is_any_autocast_enabled,
        "get_default_dtype": torch.get_default_dtype,
        "float32": torch.float32,
    }
    kinds = (commands.KIND[record] for record in (commands.Call, commands.Compute, commands.Fetch))
    flags = frames.KEEP, frames.PLAIN, frames.FREES
    limits = frames.MOST_FREES, MOST_UNANSWERED, BURST_COMMANDS
    _flat.prepare(parts, (frames.VERSION, *kinds, *flags, *limits))


if COMPILED:
    _prepare()
submit: Any = _flat.submit if COMPILED else _not_compiled
"""``submit(cls, link, function, args, what, writes, private)``: a pointer of class ``cls``, or
None, and nothing has changed: it is not flat, or the modes or the link are not as usual.

``function`` is a name, and ``what`` how a user calls it; or it is a function, and ``what`` None.
"""
ask: Any = _flat.ask if COMPILED else _not_compiled
"""``ask(function, args, what, asked)``: whether it was asked what a named function gives; if not,
nothing has changed. ``asked``, a list, is told link and number of the question in the same step,
after which Ctrl-C may come. It is to be written by whoever waits for the answer.
"""
fetch: Any = _flat.fetch if COMPILED else _not_compiled
"""``fetch(link, oid, what, borrow)``: whether an object was asked for, which ``borrow`` reads from
then on; if not, nothing has changed. It is to be written, too.
"""
