"""Running the function of a command, and what is done about private objects. In the worker."""

import contextlib
import functools
from typing import Any

import torch
from torch import nn

from fedproc.wire.names import function_named
from fedproc.worker import parts, privacy
from fedproc.worker.host import Host
from fedproc.worker.modes import applied, usual
from fedproc.worker.reshaping import reshaping
from fedproc.worker.silence import silence
from fedproc.worker.store import Entry

_IN_PLACE = frozenset(
    """operator.iadd operator.isub operator.imul operator.itruediv operator.ifloordiv operator.imod
    operator.ipow operator.imatmul operator.iand operator.ior operator.ixor operator.ilshift
    operator.irshift operator.setitem operator.delitem""".split()
)


@functools.cache
def is_pure(name: str) -> bool:
    """Whether an operation (of no ``out=``) writes nowhere and changes no mode."""
    return (
        name.startswith(PURE_PREFIXES) and not name.startswith("torch.set_") and not _writes(name)
    )


@functools.cache
def _writes(name: str) -> bool:
    last = name.rpartition(".")[2]
    plain = f"operator.{last.strip('_')}"  # Tensor.__iadd__ is operator.iadd
    return plain in _IN_PLACE or last == "__set__" or (last[-1:] == "_" and last[-2:] != "__")


PURE_PREFIXES = ("operator.", "torch.", "Tensor.")
"""Functions named like this write only into their first argument, if at all."""


def with_objects(host: Host, args: tuple[Any, ...], places: tuple[int, ...]) -> tuple[Any, ...]:
    """Arguments with the objects in the places of their ids."""
    filled = list(args)
    for place in places:
        entry = host.store.entry(filled[place])
        host.used.append(entry)
        filled[place] = entry.value
    return tuple(filled)


def run(
    host: Host, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], modes: Any
) -> Any:
    """Run the function of a command under the parent's modes."""
    name = function if isinstance(function, str) else ""
    if host.registered is None:
        target = function_named(name) if name else function
    else:
        target = host.registered.function(name) if name else function
        host.registered.require(name, target, args)
    if privacy.any_private(host.used):
        return _run_private(host, name, target, args, kwargs, modes)
    pure = is_pure(name) and "out" not in kwargs
    if pure and modes is None:
        return target(*args, **kwargs)
    pure = pure or not (host.used or "out" in kwargs)  # no tensor of ours is at hand
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
    pure = _is_of_tensors(name, used)
    pure = pure or _only_reads(name, args)
    watch = None if pure else privacy.Watch([*used, *privacy.leaf_holders(used, host.store)])
    try:
        with applied(modes), silence(process=host.is_process), reshaping(host, name, kwargs):
            return target(*args, **kwargs)
    finally:
        if watch is not None:
            watch.taint()
        elif _writes(name) or "out" in kwargs:
            # the target is the first argument, or out=; all public tensors in use, to be safe
            for entry in used:
                if any(entry.value is given for given in (*args[:1], *kwargs.values())):
                    entry.domain.taint()


def _only_reads(name: str, args: tuple[Any, ...]) -> bool:
    """Whether it is an evaluation of fedproc's own, which shows users' code copies of its rows."""
    return (
        name == f"{parts.__name__}.method"
        and type(args[0]).__module__.startswith("fedproc.")
        and args[1] in ("evaluate", "evaluate_clients", "count", "failure")
    )


def _is_of_tensors(name: str, used: list[Entry]) -> bool:
    """Whether it is torch's own operation; an operator of another object is that object's code."""
    if name.endswith(("backward", ".call")) or not name.startswith(("operator.", "Tensor.")):
        return False
    plain = (torch.Tensor, nn.Parameter, int, float, bool, str, bytes, type(None))
    return all(type(entry.value) in plain for entry in used)
