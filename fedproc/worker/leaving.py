"""How values leave a worker: as an answer, or lent where they lie. Runs in the worker."""

from typing import Any

import torch
from torch import nn

from fedproc.errors import with_article
from fedproc.memory.records import taken_apart
from fedproc.memory.tensors import Exporter, Place
from fedproc.wire import commands, frames
from fedproc.worker.host import Host
from fedproc.worker.inspections import type_name

_PLAIN = frozenset({int, float, bool, str, bytes, type(None)})


def answer(host: Host, sequence: int, value: Any, *more: Any) -> int:
    """Answer with a value; bytes that leave."""
    if type(value) in _PLAIN:
        host.reply(commands.Value((frames.PLAIN, value, *more)), sequence)
        return 0
    record = taken_apart(value)
    flags, body, exporter = host.encode(value) if record is None else _record(host, *record)
    if exporter.exported:
        host.exports[sequence] = exporter
        flags |= frames.EXPORTED
    return host.reply(commands.Value((flags, body, *more)), sequence) + exporter.nbytes


def _record(
    host: Host, name: str, tensor: torch.Tensor, rest: tuple[Any, ...]
) -> tuple[int, Any, Exporter]:
    """What ``Host.encode`` gives, of a record: see ``memory.records``."""
    exporter = Exporter(host.arena)
    place = exporter(tensor, tensor.stride())
    return frames.RECORD, (name, place, tensor.dtype, tuple(tensor.shape), rest), exporter


def lend_out(host: Host, sequence: int, value: Any) -> None:
    """Answer with where a tensor lies; it stays there until its release.

    Raises:
        TypeError: it is no tensor.
    """
    if not isinstance(value, torch.Tensor):
        kind = with_article(type_name(value))
        raise TypeError(f"only tensors can be borrowed, not {kind}: use fetch()")
    host.adopt(value)
    body: Any
    if _is_one_piece(value):  # the usual case, without what only others need
        place, stays = hold(host, sequence, value)
        flags, body = frames.PLAIN, (place, value.dtype, tuple(value.shape), stays)
    else:
        flags, body, exporter = host.encode(value.detach(), inline_bytes=0)
        host.exports[sequence] = exporter
    host.reply(commands.Value((flags | frames.EXPORTED, body, ())), sequence)


def hold(host: Host, sequence: int, tensor: torch.Tensor) -> tuple[Place, bool]:
    """Where a tensor of one piece lies until its release, and whether that is its own memory.

    What lies outside of the arena, since views or autograd share it, is copied there.
    """
    host.exports[sequence] = exporter = Exporter(host.arena, inline_bytes=0)
    place = exporter(tensor.detach(), tensor.stride())
    return place, bool(exporter.held)


def _is_one_piece(tensor: torch.Tensor) -> bool:
    """Whether its elements lie in memory as they are, one after the other."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized or tensor.is_nested)
        and tensor.numel() > 0
    )
