"""Running functions where the data is. Runs in the parent: operators, methods, torch functions.

What comes back is known before the worker has answered: one tensor, a tuple of known length, the
plain answer of a question (which waits), or something whose kind only the worker can tell.
"""

from typing import Any

from fedproc.errors import PlacementError
from fedproc.remote import flat, reading
from fedproc.remote.borrows import Borrow
from fedproc.remote.context import modes
from fedproc.remote.encode import encode_call, encode_question
from fedproc.remote.link import Link
from fedproc.remote.making import owned
from fedproc.remote.message import plain
from fedproc.remote.operations import (
    REFUSED,
    answers_plainly,
    function_name,
    gives_one_tensor,
    is_pointer,
    may_write,
    result_type,
    unknown_count,
)
from fedproc.remote.operators import SYMBOLS
from fedproc.remote.pointer import KINDS, AnyPointer, Pointer
from fedproc.remote.site import caller
from fedproc.wire import commands


def run_there(
    cls: type[AnyPointer],
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    what: str,
    writes: bool = True,
    operation: bool = False,
    link: Link | None = None,
    private: bool = False,
) -> AnyPointer:
    """Run ``function`` and keep the result; a pointer of class ``cls`` to it, at once."""
    if not kwargs and type(function) is str:
        made: AnyPointer | None = flat.submit(cls, link, function, args, what, writes, private)
        if made is not None:
            return made
    target, message = encode_call(
        function, args, kwargs or {}, modes(), what=what, link=link, writes=writes,
        operation=operation, private=private,
    )  # fmt: skip
    # besides this function, the method of a pointer or worker that called it is ours
    return owned(cls, target, message, caller(3))


def order(
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    what: str,
    operation: bool = False,
) -> None:
    """Run ``function`` for its effect; nothing is kept."""
    link, message = encode_call(
        function, args, kwargs, modes(), what=what, keep=False, operation=operation
    )
    link.submit(message, caller())


def compute(
    function: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    what: str,
    timeout: float | None = None,
) -> Any:
    """Run ``function`` and wait for its value."""
    asked: list[Any] = []  # link and number, as soon as there are any
    try:
        if kwargs or not flat.ask(function, args, what, asked):
            link, message = encode_question(function, args, kwargs or {}, modes(), what)
            asked += link, link.submit(message, caller(), urgent=True)
        link, number = asked
        return reading.computed(link, number, what, timeout)
    except BaseException:
        if asked:  # Ctrl-C may have come before anybody waited for it
            asked[0].inbox.forsake(asked[1])
        raise


def fold(function: str, args: tuple[Any, ...], *, what: str) -> tuple[Link, Borrow]:
    """Run a method of fedproc's client code and ask for what it gives; see ``reading.finish``.

    It changes nothing that a pointer shows, so it need not wait for those who read. Of private
    data, too, the aggregator may take what it gives: updates to fold, and means over enough rows.
    """
    usual = modes()
    if usual is not None:  # its own are for who asks: what clients train and keep needs gradients
        usual = True, False, *usual[2:]
    link, message = encode_question(function, args, {}, usual, what, folding=True)
    return link, reading.asked(link, message)


def part(cls: type[AnyPointer], of: Pointer, path: tuple[Any, ...]) -> AnyPointer:
    """A pointer to a part of an object; it follows when the whole moves."""
    handle = of._data()
    handle.check()
    message = plain(commands.Part(handle.oid, path), f"part {path}")
    new = owned(cls, handle.link, message, caller())
    new._handle.is_part_of(handle, path)
    return new


def operate(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation of torch on pointers: an operator, a method or a function."""
    if kwargs or not gives_one_tensor(name):
        return _operate_by_rules(name, args, kwargs)
    shown = SYMBOLS.get(name, name)
    return run_there(KINDS["tensor"], name, args, what=shown, writes=False, operation=True)


def _operate_by_rules(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if answers_plainly(name, args, kwargs):
        return compute(name, args, kwargs, what=name)
    writes = may_write(name, kwargs)
    if writes:
        last = name.rpartition(".")[2]
        if last in ("setitem", "delitem", "backward", "retain_grad"):
            return order(name, args, kwargs, what=name, operation=True)
        if last.endswith("_") or name.startswith("operator.i"):
            order(name, args, kwargs, what=name, operation=True)
            return args[0] if args else next(p for p in kwargs.values() if is_pointer(p))
        if kwargs.get("out") is not None:
            order(name, args, kwargs, what=name, operation=True)
            return kwargs["out"]
    structure = result_type(name, args, kwargs)
    if structure is not None:
        return _several(structure, name, args, kwargs, writes=writes)
    uncertain = unknown_count(name, args, kwargs)
    cls = KINDS["pending" if uncertain else "tensor"]
    shown = SYMBOLS.get(name, name)
    return run_there(cls, name, args, kwargs, what=shown, writes=writes, operation=True)


def _several(
    structure: type[Any] | int,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    writes: bool,
) -> Any:
    whole = run_there(KINDS["object"], name, args, kwargs, what=name, writes=writes, operation=True)
    count = structure if isinstance(structure, int) else structure.n_sequence_fields
    parts = tuple(part(KINDS["tensor"], whole, (place,)) for place in range(count))
    return parts if isinstance(structure, int) else structure(parts)


def torch_function(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    """What ``__torch_function__`` of every pointer does."""
    name = function_name(func)
    kwargs = kwargs or {}
    if name is None:
        raise PlacementError(
            f"{getattr(func, '__name__', func)!r} has no name that a worker could find it by: run "
            "it there with worker.run(function, pointer)."
        )
    if name.removeprefix("Tensor.") in REFUSED:
        raise PlacementError(f"{name}: {REFUSED[name.removeprefix('Tensor.')]}.")
    if name.endswith(".__get__") and args and is_pointer(args[0]):
        return getattr(args[0], name.split(".")[1])
    return operate(name, args, kwargs)


class Operand(Pointer):
    """A pointer that functions of torch take."""

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch where its pointers are."""
        return torch_function(func, args, kwargs)
