"""From what a user writes to a message: pointers become ids, tensors blocks, code digests.

Runs in the parent, for every command. The message knows the one link its pointers belong to; that
they belong to one, and that no local tensor is among them, is checked here: nothing is ever moved
silently.
"""

import pickle
import types
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fedproc.errors import FedprocError, NotShippableError, PlacementError, with_article
from fedproc.memory.sparse import REDUCERS
from fedproc.memory.tensors import Exporter, Packer
from fedproc.remote.link import Link
from fedproc.remote.message import Message, call_message
from fedproc.remote.operations import function_name
from fedproc.wire import commands, frames
from fedproc.wire.code import kept_name, name_of_function
from fedproc.wire.codec import Encoder

if TYPE_CHECKING:
    from fedproc.remote.pointer import Pointer

POINTER_TYPES: set[type] = set()
"""Every class of pointer; filled by ``remote.pointer``."""

_FLAT = frozenset({int, float, bool, str, bytes, type(None)})
_FUNCTIONS = frozenset({types.FunctionType, types.BuiltinFunctionType})


class Outgoing:
    """One message in the making."""

    def __init__(self, what: str, link: Link | None, *, operation: bool = False) -> None:
        """Prepare.

        Args:
            what: the operation, for errors.
            link: where it will run; None: where its pointers are.
            operation: of torch: local arrays do not belong into it.
        """
        self.what = what
        self.link = link
        self._operation = operation
        self._pointers: list[Pointer] = []
        self._packer = Packer()
        self._arrays: list[np.ndarray[Any, Any]] = []

    def encode(
        self, record: type[Any], fields: tuple[Any, ...], flags: int, **rest: Any
    ) -> Message:
        """The message of a record with these fields.

        Raises:
            PlacementError: operands in different places.
            NotShippableError: something in it cannot be pickled.
            ObjectGoneError: a pointer was fetched already.
        """
        encoder = Encoder(self._externals(), registered=self._registered, reducers=REDUCERS)
        try:
            body = encoder.encode(fields)
        except FedprocError:
            raise
        except Exception as error:
            to = "" if self.link is None else f" for worker {self.link.name!r}"
            raise NotShippableError(
                f"{self.what}: something in it cannot be pickled{to}, so nothing was sent: "
                f"{type(error).__name__}: {error}. Send plain parts of it, or make it there with "
                "worker.run(function)."
            ) from error
        self._check_tensors()
        exporter = None
        if self._packer.tensors:
            # A private object passes through the parent's arena, which every worker can read.
            private = record is commands.Put and not flags & frames.SHARED
            exporter, table = self._export(wipe=private)
            body = table + body
            flags |= frames.HAS_TENSORS
        return Message(
            record, flags, body, self.what,
            exporter=exporter if exporter and exporter.exported else None,
            definitions=encoder.definitions or None, **rest,
        )  # fmt: skip

    def _export(self, *, wipe: bool) -> tuple[Exporter, bytes]:
        """The blocks that hold the tensors' bytes, and the table that says where they are."""
        assert self.link is not None
        exporter = Exporter(self.link.arena, wipe=wipe)
        try:
            table = self._packer.table(exporter)
        except BaseException:
            exporter.release()
            raise
        return exporter, pickle.dumps(table, protocol=5)

    def _registered(self) -> Mapping[Any, bytes] | None:
        return None if self.link is None else self.link.registered

    def _externals(self) -> dict[type, Callable[[Any], int | None]]:
        externals: dict[type, Callable[[Any], int | None]]
        externals = dict.fromkeys(POINTER_TYPES, self._pointer)
        externals[torch.Tensor] = externals[nn.Parameter] = self._packer.add
        if self._operation:
            externals[np.ndarray] = self._array
        return externals

    @property
    def cut_graph(self) -> bool:
        """Whether a tensor lost its autograd history on the way."""
        return self._packer.cut_graph

    def _pointer(self, pointer: "Pointer") -> int:
        handle = pointer._data()
        handle.check()
        if self.link is None:
            self.link = handle.link
        elif self.link is not handle.link:
            raise self._apart(pointer)
        self._pointers.append(pointer)
        return handle.oid

    def _array(self, array: "np.ndarray[Any, Any]") -> int:
        """Refused when the pointer beside it is known; until then it stands for nothing."""
        self._arrays.append(array)
        return 0

    def _check_tensors(self) -> None:
        for local, kind, sent in (
            (self._arrays, "NumPy array", "torch.from_numpy(array)"),
            (self._packer.tensors, "tensor", "tensor"),
        ):
            if local and self._pointers:
                pointer = self._pointers[0]
                name = pointer._data().link.name
                raise PlacementError(
                    f"{self.what}: {pointer!r} is on worker {name!r}, but a local {kind} of shape "
                    f"{tuple(local[0].shape)} is in this process. Nothing was moved. Send it "
                    f"first: cluster[{name!r}].send({sent}); or bring the other home: "
                    "pointer.get()."
                )

    def _apart(self, pointer: "Pointer") -> PlacementError:
        theirs = pointer._data().link
        assert self.link is not None
        theirs.check()
        self.link.check()
        here = self.link.name
        if theirs.hub is not self.link.hub:
            return PlacementError(
                f"{self.what}: {pointer!r} belongs to worker {theirs.name!r} of another cluster "
                f"than worker {here!r}. Bring it home and send it: "
                f"worker.send(pointer.get())."
            )
        other = f"{self._pointers[0]!r} is" if self._pointers else "the call runs"
        return PlacementError(
            f"{self.what}: {pointer!r} is on worker {theirs.name!r}, but {other} on worker "
            f"{here!r}. Nothing was moved. Move it first: pointer.move(cluster[{here!r}])."
        )


def encode_call(
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    modes: tuple[Any, ...] | None,
    *,
    what: str,
    link: Link | None = None,
    keep: bool = True,
    writes: bool = True,
    operation: bool = False,
    private: bool = False,
) -> tuple[Link, Message]:
    """The message that runs ``function`` where the pointers among its arguments are."""
    flags = frames.KEEP if keep else 0
    name = function if type(function) is str else _name_of(function)
    flat = None if kwargs or name is None else _flat(args, link)
    if flat is not None:
        link, args, ids = flat
        body = pickle.dumps((name, args, {}, modes, private, ids), 5)
        return link, call_message(commands.Call, flags | frames.PLAIN, body, what, writes)
    outgoing = Outgoing(what, link, operation=operation)
    fields = (function, args, kwargs, modes, private, ())
    message = outgoing.encode(commands.Call, fields, flags, writes=writes)
    assert outgoing.link is not None, "a call needs a worker or a pointer"
    return outgoing.link, message


def encode_question(
    function: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    modes: Any,
    what: str,
    *,
    folding: bool = False,
) -> tuple[Link, Message]:
    """The message that runs ``function`` where its pointers are and answers with the result.

    ``folding``: it is a method of fedproc's client code, asked by the aggregator.
    """
    flat = None if kwargs else _flat(args, None)
    if flat is not None:
        link, args, ids = flat
        body = pickle.dumps((function, args, {}, modes, folding, ids), 5)
        return link, call_message(commands.Compute, frames.PLAIN, body, what, False)
    outgoing = Outgoing(what, None, operation=not folding)
    message = outgoing.encode(commands.Compute, (function, args, kwargs, modes, folding, ()), 0)
    assert outgoing.link is not None, "a question needs a pointer"
    return outgoing.link, message


def sent_as(function: Any) -> tuple[Any, str]:
    """What stands for a function in a message, its name if it has one, and what errors call it.

    Raises:
        TypeError: it is no function, and nothing else that can be called.
    """
    kind = type(function)
    known = kept_name(function) if kind in _FUNCTIONS else None
    if known is not None:
        return known
    if kind in POINTER_TYPES:
        return function, kind.__qualname__
    if not callable(function):
        came = with_article(kind.__qualname__)
        raise TypeError(f"run needs a function to run, not {came}: {function!r}")
    shown = str(getattr(function, "__qualname__", None) or kind.__qualname__)
    name = function_name(function)
    if name is not None:  # qualified names in torch are those of its internals; of classes not
        return name, shown if isinstance(function, type) else name
    return _name_of(function) or function, shown


def _name_of(function: Any) -> str | None:
    """The name that a function travels by, if it does."""
    return name_of_function(function) if type(function) in _FUNCTIONS else None


def _flat(
    args: tuple[Any, ...], link: Link | None
) -> tuple[Link, tuple[Any, ...], tuple[int, ...]] | None:
    """(link, arguments with ids in them, places of the ids), for pointers and plain numbers only.

    The usual operator is like that, and costs a tenth of the general way. ``link`` is where it
    runs, None: where its pointers are.
    """
    found: list[Any] = []
    places: tuple[int, ...] = ()
    for arg in args:
        kind = type(arg)
        if kind in _FLAT:
            found.append(arg)
        elif kind in POINTER_TYPES:
            handle = arg._handle
            if handle.gone is not None or (link is not None and link is not handle.link):
                return None  # the general way raises the error
            link = handle.link
            places = (*places, len(found))
            found.append(handle.oid)
        else:
            return None
    return None if link is None else (link, tuple(found), places)


def labels_of(tags: Iterable[str] | str, description: str) -> tuple[str, ...]:
    """The tags, one by one.

    Raises:
        ValueError: one of them, or the description, is no text.
    """
    try:
        labels = (tags,) if isinstance(tags, str) else tuple(tags)
    except TypeError:
        labels = (tags,)  # type: ignore[assignment]
    if not all(isinstance(text, str) for text in (*labels, description)):
        raise ValueError(
            f"tags and description are texts, not {tags!r} and {description!r}: "
            'send(x, tags=["train", "mnist"], description="first half").'
        )
    return labels
