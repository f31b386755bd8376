"""Flat calls and questions in one step, where that was compiled. Runs in the worker.

A call is *flat* when its function has a name and its arguments are objects of the worker and plain
values: what pipelines are made of. ``_flat.c`` does for it what ``loop``, ``host``, ``handlers``,
``running`` and ``store`` do, in a third of the time, and the same for a question of that kind, and
for who asks for an object that is a plain value. It is optional: where there was no C compiler, and
for whatever is not usual about a call, those are the way.
"""

import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fedproc.transport.channel import Channel
from fedproc.wire import commands, frames
from fedproc.wire.frames import Frame
from fedproc.wire.names import function_named, place_of
from fedproc.worker.leaving import answer
from fedproc.worker.modes import usual
from fedproc.worker.privacy import result_domain
from fedproc.worker.running import is_pure
from fedproc.worker.store import Domain, Entry

if TYPE_CHECKING:
    from fedproc.worker.loop import Loop

try:
    from fedproc.worker import _flat
except ImportError:  # not built
    _flat = None  # type: ignore[assignment]

Execute = Callable[["Loop", Frame], "bool | None"]


def _about(name: str) -> tuple[bool, str | None, Any]:
    """What is remembered of a name: whether its function is pure, and where it is found.

    That is a module and an attribute, to be looked up each time; or None and the function itself;
    or a module and None: what is in a class of a user's, the general way looks up.
    """
    place = place_of(name)
    if place is None:
        return is_pure(name), None, function_named(name)
    module, path = place
    return is_pure(name), module, path[0] if len(path) == 1 else None


def _wire_up(loop: "Loop") -> tuple[Any, ...]:
    """What ``_flat.c`` touches of a loop, kept there: none of it is ever replaced by another.

    Commands of an inline worker take turns with the parent: nothing then, and no call is flat. A
    channel with faults in it has its own way to append.
    """
    host = loop._host
    store, channel = host.store, host.channel
    append = channel._frames.append if type(channel) is Channel else channel.append
    loop.wiring = () if loop._turn is not None else (
        host, store, store._by_id, store._by_object, host.arena.done, append,
    )  # fmt: skip
    return loop.wiring


def _not_compiled(_loop: "Loop", _frame: Frame) -> None:
    """Nothing is taken: all goes the general way."""


def prepared(report_commands: int, report_seconds: float) -> Execute:
    """``execute(loop, frame)``: execute the command in a frame if it is a flat call or question.

    It tells whether to report to the parent, which is due after so many commands, after one that
    took so long, and after a question; None if it was neither, or something was not as usual. What
    the function of the call raises, it raises.
    """
    if _flat is None:
        return _not_compiled
    parts = {
        "loads": pickle.loads,
        "about": _about,
        "usual": usual,
        "is_grad_enabled": torch.is_grad_enabled,
        "get_default_dtype": torch.get_default_dtype,
        "is_any_autocast_enabled": torch._C._is_any_autocast_enabled,
        "increment_nesting": torch.autocast_increment_nesting,
        "decrement_nesting": torch.autocast_decrement_nesting,
        "float32": torch.float32,
        "result_domain": result_domain,
        "answer": answer,
        "entry_class": Entry,
        "domain_class": Domain,
        "tensor_class": torch.Tensor,
        "no_tags": frozenset(),
        "no_text": "",
        "wire_up": _wire_up,
        **{f"{name.strip('_')}_slot": Domain.__dict__[name] for name in Domain.__slots__},
        **{f"{name}_slot": Entry.__dict__[name] for name in Entry.__slots__},
    }
    records = commands.Call, commands.Compute, commands.Fetch, commands.Value
    kinds = (commands.KIND[record] for record in records)
    flags = frames.KEEP, frames.PLAIN, frames.FREES
    _flat.prepare(parts, (frames.VERSION, *kinds, *flags, report_commands, report_seconds))
    return _flat.execute
