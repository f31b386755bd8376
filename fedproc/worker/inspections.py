"""Questions about a worker and its objects, and their answers. Runs in the worker."""

from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from torch import nn

from fedproc.errors import NotPermittedError
from fedproc.memory.tensors import shape_of
from fedproc.worker import privacy
from fedproc.worker.host import Host
from fedproc.worker.registered import Registered
from fedproc.worker.store import Entry


def description(value: Any) -> dict[str, Any]:
    """Kind, shape, dtype ... of an object; ``items``: kind of the items of a sequence."""
    if isinstance(value, torch.Tensor):
        return {
            "kind": "tensor",
            "shape": shape_of(value),
            "dtype": value.dtype,
            "device": value.device,
            "requires_grad": value.requires_grad,
            "is_leaf": value.is_leaf,
        }
    kind, items = "object", "pending"
    if isinstance(value, nn.Module):
        kind, items = "module", "tensor" if isinstance(value, nn.ParameterList) else "module"
    if not _is_sequence(type(value)):
        items = ""
    return {"kind": kind, "type": type_name(value), "items": items}


def _is_sequence(cls: type[Any]) -> bool:
    """Whether the items of an object have the numbers from 0 to its length."""
    return all(hasattr(cls, name) for name in ("__len__", "__getitem__")) and not (
        hasattr(cls, "keys")
    )


def told(entry: Entry) -> dict[str, Any]:
    """The description of an object, without a shape that would tell private values."""
    found = description(entry.value)
    if entry.domain.private and not entry.open_shape and "shape" in found:
        found["shape"] = None
    return found


def type_name(value: Any) -> str:
    """Qualified name of an object's class."""
    cls = type(value)
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")


def _objects(host: Host) -> list[dict[str, Any]]:
    return [_information(entry) for entry in host.store]


def _information(entry: Entry) -> dict[str, Any]:
    value = entry.value
    tensor = value if isinstance(value, torch.Tensor) else None
    hidden = entry.domain.private and not entry.open_shape
    return {
        "id": entry.ids[0],
        "type": type_name(value),
        "shape": None if tensor is None or hidden else shape_of(tensor),
        "dtype": None if tensor is None else tensor.dtype,
        "nbytes": 0 if hidden else sum(_tensor_bytes(value)),
        "tags": entry.tags,
        "description": entry.description,
        "private": entry.domain.private,
    }


def _tensor_bytes(value: Any) -> Iterator[int]:
    if isinstance(value, torch.Tensor):
        yield value.numel() * value.element_size()
    elif isinstance(value, nn.Module):
        for tensor in [*value.parameters(), *value.buffers()]:
            yield tensor.numel() * tensor.element_size()


def _stats(host: Host) -> dict[str, Any]:
    process = psutil.Process()
    memory = process.memory_info()
    times = process.cpu_times()
    try:
        pss = process.memory_full_info().pss
    except (psutil.Error, AttributeError):  # the platform does not count shared pages apart
        pss = memory.rss
    return {
        "cpu_s": times.user + times.system,
        "rss_bytes": memory.rss,
        "pss_bytes": pss,
        "arena_bytes": host.arena.used_bytes,
        "objects": len(host.store),
        "commands": host.commands,
    }


def _search(host: Host, tags: frozenset[str]) -> list[tuple[int, dict[str, Any]]]:
    found = [entry for entry in host.store if tags <= entry.tags]
    return [(entry.ids[0], told(entry)) for entry in found]


def _clear(host: Host) -> None:
    host.store.clear()


def _permitted(host: Host, target: int) -> None:
    entry = host.store.entry(target)
    host.used.append(entry)
    privacy.may_leave(entry, "send", host.spec.name)


def _audit(host: Host) -> list[tuple[Any, ...]]:
    return host.audit.records()


def _register(
    host: Host, functions: tuple[tuple[str, str, bytes, bytes], ...], min_rows: int
) -> None:
    if host.registered is not None:
        raise NotPermittedError(
            f"register: worker {host.spec.name!r} was told its functions when it started; they "
            "cannot be changed. Make another Cluster(..., functions=[...])."
        )
    registered = Registered(host.spec.name, functions)
    host.registered_code = registered.digests()
    host.min_rows = min_rows
    host.registered = registered


INSPECTIONS: dict[str, Callable[..., Any]] = {
    "objects": _objects,
    "stats": _stats,
    "search": _search,
    "clear": _clear,
    "permitted": _permitted,
    "audit": _audit,
    "register": _register,
}
