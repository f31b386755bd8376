"""Making pointers, which every command does. Runs in the parent."""

import weakref

from fedproc.remote.handle import Handle
from fedproc.remote.link import Link
from fedproc.remote.pointer import AnyPointer, Pointer

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


def owned(cls: type[AnyPointer], link: Link, oid: int) -> AnyPointer:
    """A pointer that owns the new object ``oid``."""
    try:
        handle = Handle(link, oid)
        link.outbox.handles[oid] = weakref.ref(handle)
        return make(cls, handle, True)
    except BaseException:  # Ctrl-C: there is no pointer whose end would free it
        link.trash.append(oid)
        raise
