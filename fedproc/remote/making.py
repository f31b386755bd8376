"""Making pointers, which every command does. Runs in the parent."""

import weakref

from fedproc.remote.handle import Handle
from fedproc.remote.link import Link
from fedproc.remote.message import Message
from fedproc.remote.pointer import AnyPointer, Pointer
from fedproc.remote.site import Site

_new = object.__new__
# past __setattr__ of pending pointers, which makes up its mind about every name
_set_handle = Pointer.__dict__["_handle"].__set__
_set_owner = Pointer.__dict__["_owner"].__set__
_set_chain = Pointer.__dict__["_chain"].__set__


def make(cls: type[AnyPointer], handle: Handle, owner: bool | Pointer) -> AnyPointer:
    """A pointer of class ``cls``; ``owner``: whether it frees the object, or another that does."""
    pointer = _new(cls)
    _set_handle(pointer, handle)
    _set_chain(pointer, None)
    _set_owner(pointer, owner)
    return pointer


def owned(
    cls: type[AnyPointer], link: Link, message: Message, site: Site, *, more: bool = False
) -> AnyPointer:
    """Submit a command that makes an object; a pointer that owns it. ``more``: see ``submit``."""
    oid = 0
    try:
        oid = link.submit(message, site, more=more)
        handle = Handle(link, oid)
        link.outbox.handles[oid] = weakref.ref(handle)
        return make(cls, handle, True)
    except BaseException:
        if oid:  # Ctrl-C: there is no pointer whose end would free it
            link.trash.append(oid)
        raise
