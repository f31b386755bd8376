"""What each command does, one function per command, and the table of them. Runs in the worker.

A handler gets the host, the frame of the command and its fields. It raises what went wrong; the
loop turns that into a tombstone and a reply.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedproc.wire import commands, frames
from fedproc.wire.frames import Frame
from fedproc.wire.names import function_named
from fedproc.worker import parts, privacy
from fedproc.worker.host import Host
from fedproc.worker.inspections import INSPECTIONS, description, type_name
from fedproc.worker.modes import applied, usual
from fedproc.worker.reshaping import reshaping
from fedproc.worker.store import Domain

_IN_PLACE = frozenset(
    """operator.iadd operator.isub operator.imul operator.itruediv operator.ifloordiv operator.imod
    operator.ipow operator.imatmul operator.iand operator.ior operator.ixor operator.ilshift
    operator.irshift operator.setitem operator.delitem""".split()
)


_PLAIN = frozenset({int, float, bool, str, bytes, type(None)})


@functools.cache
def _pure(name: str) -> bool:
    """Whether an operation (of no ``out=``) writes nowhere and changes no mode."""
    return (
        name.startswith(PURE_PREFIXES) and not name.startswith("torch.set_") and not _writes(name)
    )


def _writes(name: str) -> bool:
    last = name.rpartition(".")[2]
    return name in _IN_PLACE or (last.endswith("_") and not last.endswith("__"))


PURE_PREFIXES = ("operator.", "torch.", "Tensor.")
"""Functions named like this write only into their first argument, if at all."""


def call(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """Run a function and keep its result."""
    command = commands.Call(*fields)
    args = command.args
    if command.ids:
        args = _with_objects(host, args, command.ids)
    result = _run(host, command.function, args, command.kwargs, command.modes)
    if frame.flags & frames.KEEP:
        domain = privacy.result_domain(result, host.used, private=command.private)
        host.store.add(frame.sequence, result, domain, update=command.update)


def _with_objects(host: Host, args: tuple[Any, ...], places: tuple[int, ...]) -> tuple[Any, ...]:
    filled = list(args)
    for place in places:
        entry = host.store.entry(filled[place])
        host.used.append(entry)
        filled[place] = entry.value
    return tuple(filled)


def _run(
    host: Host, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], modes: Any
) -> Any:
    name = function if isinstance(function, str) else ""
    target = function_named(name) if name else function
    if privacy.any_private(host.used):
        return _run_private(host, name, target, args, kwargs, modes)
    pure = _pure(name) and "out" not in kwargs
    if pure and modes is None:
        return target(*args, **kwargs)
    with contextlib.nullcontext() if pure else reshaping(host, name, kwargs):
        if modes is not None:
            with applied(modes):
                return target(*args, **kwargs)
        try:
            return target(*args, **kwargs)
        finally:
            usual()


def _run_private(
    host: Host, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], modes: Any
) -> Any:
    used = list(host.used)
    # What an operator or a method of a tensor writes into is its first argument. Anything else may
    # write anywhere: into what it was given, and into the leaves of its graphs (backward).
    pure = name.startswith(("operator.", "Tensor.")) and not name.endswith("backward")
    watch = None if pure else privacy.Watch([*used, *privacy.leaf_holders(used, host.store)])
    try:
        with applied(modes), privacy.silence(), reshaping(host, name, kwargs):
            return target(*args, **kwargs)
    finally:
        if watch is not None:
            watch.taint()
        elif _writes(name) or "out" in kwargs:
            # the target is the first argument, or out=; all public tensors in use, to be safe
            for entry in used:
                if entry.value is args[0] or entry.value is kwargs.get("out"):
                    entry.domain.taint()


def put(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """Keep a value that was sent."""
    command = commands.Put(*fields)
    # A value that names objects of this worker (a list of pointers) holds references to them.
    sources = tuple(entry.domain for entry in host.used)
    host.store.add(
        frame.sequence,
        command.value,
        Domain(command.private, sources),
        tags=frozenset(command.tags),
        description=command.description,
    )


def compute(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """Run a function and answer with the result."""
    command = commands.Compute(*fields)
    if command.ids:
        command = command._replace(args=_with_objects(host, command.args, command.ids))
    private = [entry for entry in host.used if entry.domain.private]
    if private and command.function not in privacy.METADATA and not _asks_shape(command):
        raise privacy.refused(str(command.function), private[0].ids[0], host.spec.name)
    result = _run(host, command.function, command.args, command.kwargs, command.modes)
    _answer(host, frame.sequence, result)


def _asks_shape(command: commands.Compute) -> bool:
    plain = ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "layout", "nbytes")
    return (
        command.function == "builtins.getattr"
        and len(command.args) > 1
        and isinstance(command.args[0], torch.Tensor)
        and command.args[1] in plain
    )


def fetch(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """Answer with the value of an object."""
    command = commands.Fetch(*fields)
    entry = host.store.entry(command.target)
    host.used.append(entry)
    if not (command.folding and entry.update):
        privacy.may_leave(entry, "get", host.spec.name)
    if command.lent:
        _lend(host, frame.sequence, entry.value)
    else:
        _answer(host, frame.sequence, entry.value, tuple(entry.ids))


def _lend(host: Host, sequence: int, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"only tensors can be borrowed, not a {type_name(value)}: use fetch()")
    host.adopt(value)
    flags, body, exporter = host.encode(value.detach(), inline_bytes=0)
    host.exports[sequence] = exporter
    host.reply(commands.Value((flags | frames.EXPORTED, body, ())), sequence)


def _answer(host: Host, sequence: int, value: Any, *more: Any) -> None:
    if type(value) in _PLAIN:
        host.reply(commands.Value((frames.PLAIN, value, *more)), sequence)
        return
    flags, body, exporter = host.encode(value)
    if exporter.exported:
        host.exports[sequence] = exporter
        flags |= frames.EXPORTED
    host.reply(commands.Value((flags, body, *more)), sequence)


def export(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """Answer with where the bytes of an object are, and all its ids and labels."""
    command = commands.Export(*fields)
    entry = host.store.entry(command.target)
    host.used.append(entry)
    privacy.may_leave(entry, "move", host.spec.name)
    flags, body, exporter = host.encode(entry.value, copy=command.copy)
    host.exports[frame.sequence] = exporter
    cut = isinstance(entry.value, torch.Tensor) and entry.value.grad_fn is not None
    labels = (tuple(entry.tags), entry.description)
    answer = (flags, body, tuple(entry.ids), cut, _is_optimized(host, entry.value), labels)
    host.reply(commands.Value(answer), frame.sequence)


def _is_optimized(host: Host, module: Any) -> bool:
    """Whether an optimizer here steps parameters of this module."""
    if not isinstance(module, nn.Module):
        return False
    own = {id(parameter) for parameter in module.parameters()}
    optimizers = [e.value for e in host.store if isinstance(e.value, torch.optim.Optimizer)]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return any(id(parameter) in own for group in groups for parameter in group["params"])


def import_(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """Keep a copy of what another worker exported."""
    command = commands.Import(*fields)
    value = host.load(command.payload, command.flags | frames.SHARED, command.source)
    labels = {"tags": frozenset(command.tags), "description": command.description}
    host.store.free(command.slot)
    host.store.add(command.slot or frame.sequence, value, Domain(), **labels)
    host.reply(commands.Value(None), frame.sequence)


def describe(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """Answer with what kind of thing an object is."""
    entry = host.store.entry(commands.Describe(*fields).target)
    host.reply(commands.Value(description(entry.value)), frame.sequence)


def part(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """Keep a part of an object as an object of its own."""
    command = commands.Part(*fields)
    entry = host.store.entry(command.target)
    host.used.append(entry)
    value = entry.value
    for step in command.path:
        value = parts.step(value, step)
    # A part is private whenever the whole is, also when that becomes so later, and vice versa.
    host.store.add(frame.sequence, value, entry.domain)


def free(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """Nothing to do: the frees in front of every command are done by then."""


def release(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """The parent (or another worker) has copied what these queries exported."""
    for query in commands.Release(*fields).queries:
        exporter = host.exports.pop(query, None)
        if exporter is not None:
            exporter.release()


def slot(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """Record a pointer to an object of another worker."""
    command = commands.Slot(*fields)
    record = RemotePointer(command.worker, command.target)
    host.store.add(frame.sequence, record, Domain(), description=repr(record))


class RemotePointer:
    """What a worker holds when it was sent a pointer: the address of another worker's object."""

    def __init__(self, worker: str, target: int) -> None:
        """``target``: id of the object on ``worker``."""
        self.worker = worker
        self.target = target

    __module__, __qualname__ = "fedproc", "Pointer"  # in listings: the name that users know

    def __repr__(self) -> str:
        """The address."""
        return f"<pointer to object {self.target} on {self.worker}>"


def define(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """Keep code by its digest."""
    command = commands.Define(*fields)
    if command.forget:
        host.definitions.clear()
    host.definitions[command.digest] = command.code


def attach(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """Map another arena."""
    host.attach(*fields)


def inspect(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """Answer a question about the worker as a whole."""
    command = commands.Inspect(*fields)
    host.reply(commands.Value(INSPECTIONS[command.what](host, *command.args)), frame.sequence)


def stop(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """Leave the loop."""
    host.stopped = True


HANDLERS: tuple[Callable[[Host, Frame, tuple[Any, ...]], None], ...] = (
    call, put, compute, fetch, export, import_, describe, part, free, release, slot,
    define, attach, inspect, stop,
)  # fmt: skip
"""In the order of ``commands.COMMANDS``."""
