"""What each command does, one function per command, and the table of them. Runs in the worker.

A handler gets the host, the frame of the command and its fields. It raises what went wrong; the
loop turns that into a tombstone and a reply.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedproc.wire import commands, frames
from fedproc.wire.frames import Frame
from fedproc.worker import parts, privacy
from fedproc.worker.host import Host
from fedproc.worker.inspections import INSPECTIONS, told
from fedproc.worker.leaving import answer, hold, lend_out
from fedproc.worker.running import run, with_objects
from fedproc.worker.shapes import shape_is_open, tells_only_shape
from fedproc.worker.store import Domain

_WRITTEN = {"fedproc.worker.parts.truth": "bool", "operator.contains": "in"}


def call(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """Run a function and keep its result."""
    # Not made a record, which costs half a microsecond: pipelined calls come through here.
    function, args, kwargs, modes, private, ids = fields
    if ids:
        args = with_objects(host, args, ids)
    result = run(host, function, args, kwargs, modes)
    if host.registered is not None:
        host.registered.require_result(result)
    if frame.flags & frames.KEEP:
        domain = privacy.result_domain(result, host.used, private=private)
        entry = host.store.add(frame.sequence, result, domain)
        if domain.private and entry.open_shape and privacy.any_private(host.used):
            command = commands.Call(function, args, kwargs, modes, private, ids)
            entry.open_shape = shape_is_open(command, result, host.used)


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
        command = command._replace(args=with_objects(host, command.args, command.ids))
    if command.folding:
        _fold(host, frame.sequence, command)
        return
    private = [entry for entry in host.used if entry.domain.private]
    if private and not tells_only_shape(command, private):
        raise privacy.refused(_as_written(command), private[0].ids[0], host.spec.name)
    result = run(host, command.function, command.args, command.kwargs, command.modes)
    answer(host, frame.sequence, result)


def _fold(host: Host, sequence: int, command: commands.Compute) -> None:
    """Run a method of fedproc's client code; what it gives may leave for the aggregator."""
    method = _foldable(host, command)  # before the run: it may make private
    result = run(host, command.function, command.args, command.kwargs, command.modes)
    if host.registered is not None:
        host.registered.require_result(result)
    private = [entry for entry in host.used if entry.domain.private]
    if private and not method:
        raise privacy.refused("get", private[0].ids[0], host.spec.name)
    nbytes = answer(host, sequence, result, ())
    if private:
        host.audit.left(method, private[0], sequence, nbytes)


def _foldable(host: Host, command: commands.Compute) -> str:
    """The method whose result an aggregator may take; of private data only fedproc's own.

    No other function: a trainer has some that give a client's rows. The one private object in it is
    the trainer: rows that are given to it as an argument are not its clients', and an evaluation of
    them would not be a mean.
    """
    if command.function != f"{parts.__name__}.{parts.method.__name__}" or command.kwargs:
        return ""
    target, method = command.args[0], str(command.args[1])
    given = [entry for entry in host.used if entry.domain.private and entry.value is not target]
    least = getattr(target, "least_rows", None)
    if host.registered is not None and privacy.any_private(host.used):
        # here the parent is not believed that its trainer hides what few rows tell
        enough = least is not None and least >= host.min_rows
        return method if host.registered.may_fold(target) and enough and not given else ""
    return "" if given else method


def _as_written(command: commands.Compute) -> str:
    """What a user writes to ask that."""
    name = str(command.function)
    if name == "builtins.getattr":
        return str(command.args[1])
    return _WRITTEN.get(name, name.removeprefix("builtins."))


def fetch(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """Answer with the value of an object."""
    command = commands.Fetch(*fields)
    entry = host.store.entry(command.target)
    host.used.append(entry)
    privacy.may_leave(entry, "borrow" if command.lent else "get", host.spec.name)
    if command.lent:
        lend_out(host, frame.sequence, entry.value)
    else:
        answer(host, frame.sequence, entry.value, tuple(entry.ids))


def lend(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """Hold what the parent reads already: nothing that it knows of has changed since it was told.

    Raises:
        RuntimeError: the tensor lies elsewhere, so the parent reads something else.
    """
    command = commands.Lend(*fields)
    entry = host.store.entry(command.target)
    host.used.append(entry)
    privacy.may_leave(entry, "borrow", host.spec.name)
    place, _ = hold(host, frame.sequence, entry.value)
    if place != command.place:
        raise RuntimeError(f"object {command.target} lies at {place!r}, not at {command.place!r}")


def export(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """Answer with where the bytes of an object are, and all its ids and labels."""
    command = commands.Export(*fields)
    entry = host.store.entry(command.target)
    host.used.append(entry)
    privacy.may_leave(entry, "move", host.spec.name)
    flags, body, exporter = host.encode(entry.value, copy=command.copy, by_digest=True)
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
    host.reply(commands.Value(told(entry)), frame.sequence)


def part(host: Host, frame: Frame, fields: tuple[Any, ...]) -> None:
    """Keep a part of an object as an object of its own."""
    command = commands.Part(*fields)
    entry = host.store.entry(command.target)
    host.used.append(entry)
    value = entry.value
    for step in command.path:
        if host.registered is not None and isinstance(step, str):
            host.registered.require_attribute(value, step)
        value = parts.step(value, step)
    # A part is private whenever the whole is, also when that becomes so later, and vice versa.
    host.store.add(frame.sequence, value, entry.domain, open_shape=entry.open_shape)


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
    if host.registered is not None:
        raise host.registered.refused("code that was shipped")
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
    define, attach, inspect, lend, stop,
)  # fmt: skip
"""In the order of ``commands.COMMANDS``."""
