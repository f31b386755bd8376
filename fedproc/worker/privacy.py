"""What is private, and what becomes so. Runs in the worker: the only place that can enforce it.

A value is private when it was sent so or was computed from something private. Writing a private
value into a public object makes that object private. For tensor operations the target is known;
after a call of arbitrary code, tensors and modules among its arguments are compared with a copy
taken before, and any other mutable object counts as written.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fedproc.errors import NotPermittedError
from fedproc.memory.copying import same_bits
from fedproc.worker.store import Domain, Entry


def may_leave(entry: Entry, how: str, worker: str) -> None:
    """Refuse the way out to a private object.

    Raises:
        NotPermittedError: it is private.
    """
    if entry.domain.private:
        raise refused(how, entry.ids[0], worker)


def refused(how: str, oid: int, worker: str) -> NotPermittedError:
    """The error for a private object on its way out."""
    return NotPermittedError(
        f"{how}: object {oid} on worker {worker!r} is private: it may be used there but its value "
        "must not leave. Compute on it there, or let an Aggregator average what was learned."
    )


def any_private(entries: Sequence[Entry]) -> bool:
    """Whether one of them is private."""
    for entry in entries:  # noqa: SIM110 - any() costs three times as much, in every command
        if entry.domain.private:
            return True
    return False


def result_domain(value: Any, used: Sequence[Entry], *, private: bool) -> Domain:
    """The domain of a new result of a command that used these entries."""
    if not used:
        return Domain(private)
    private = private or any_private(used)
    if not isinstance(value, torch.Tensor):
        sources = [entry.domain for entry in used if not isinstance(entry.value, (int, float))]
        return Domain(private, tuple(sources))
    memory, sources = _memory(value), []
    for entry in used:
        if not isinstance(entry.value, torch.Tensor):
            # It may be, or share memory with, a tensor inside this module, list or optimizer.
            sources.append(entry.domain)
        elif memory and _memory(entry.value) == memory:
            if private:
                entry.domain.taint()
            return entry.domain
    return Domain(private, tuple(sources))


def _memory(tensor: torch.Tensor) -> int:
    """Address of its storage, which views share; 0 for none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse and the like have no storage
        return 0


class Watch:
    """Finds out which public objects a call of arbitrary code wrote private values into."""

    def __init__(self, used: Sequence[Entry]) -> None:
        """Remember the values of the public tensors and modules among ``used``."""
        self._public = [entry for entry in used if not entry.domain.private]
        self._before = [_snapshot(entry.value) for entry in self._public]
        self._attributes = [_attributes(entry.value) for entry in self._public]

    def taint(self) -> None:
        """Make private what differs, and what cannot be compared."""
        every = zip(self._public, self._before, self._attributes, strict=True)
        for entry, before, attributes in every:
            if isinstance(entry.value, (int, float, str, bytes, bool, type(None))):
                continue
            same = before is not None and _same(before, _snapshot(entry.value))
            if not same or attributes != _attributes(entry.value):
                entry.domain.taint()


def _snapshot(value: Any) -> "list[tuple[int, torch.Tensor]] | None":
    """Tensors of a tensor, module or dict: how often each was written to, and a copy."""
    if isinstance(value, torch.Tensor):
        found = [value, value.grad] if value.is_leaf else [value]
    elif isinstance(value, nn.Module):
        state = list(_tensors_of(value, set()))
        found = [*state, *(tensor.grad for tensor in state if tensor.is_leaf)]
    elif _is_named_tensors(value):
        found = [*value.values(), *(tensor.grad for tensor in value.values() if tensor.is_leaf)]
    else:
        return None
    return [(-1, torch.empty(0)) if t is None else (_version(t), t.detach().clone()) for t in found]


def _is_named_tensors(value: Any) -> bool:
    """Whether it is a dict of tensors and nothing else, as a strategy sends to its clients."""
    return type(value) is dict and all(
        type(name) is str and isinstance(item, torch.Tensor) for name, item in value.items()
    )


def _version(tensor: torch.Tensor) -> int:
    return -2 if tensor.is_inference() else tensor._version


def _tensors_of(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that a module holds: parameters, buffers, and what lies in its attributes."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_of(item, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _tensors_of(item, seen)
    elif isinstance(value, functools.partial):
        yield from _tensors_of((value.args, value.keywords), seen)
    elif isinstance(value, nn.Module):
        yield from _tensors_of(vars(value), seen)


def _attributes(value: Any) -> list[tuple[str, int, int]]:
    """What the parts of a module keep beside parameters and buffers: names, identities, sizes.

    Of a dict its own.
    """
    if isinstance(value, dict):
        return [(str(name), id(kept), 0) for name, kept in value.items()]
    if not isinstance(value, nn.Module):
        return []
    return [
        (name, id(kept), len(kept) if isinstance(kept, (list, dict, set)) else 0)
        for part in value.modules()
        for name, kept in vars(part).items()
    ]


def _same(
    before: "list[tuple[int, torch.Tensor]]", after: "list[tuple[int, torch.Tensor]] | None"
) -> bool:
    """Whether nothing was written: not even the value that was there, which would tell it."""
    if after is None or len(before) != len(after):
        return False
    return all(
        times == again and one.shape == other.shape and same_bits(one, other)
        for (times, one), (again, other) in zip(before, after, strict=True)
    )


def leaf_holders(used: Sequence[Entry], store: Iterable[Entry]) -> list[Entry]:
    """Public objects that hold leaves of the graphs of private tensors: backward writes there."""
    leaves: set[int] = set()
    for entry in used:
        if entry.domain.private and isinstance(entry.value, torch.Tensor):
            leaves |= _leaves_of(entry.value)
    if not leaves:
        return []
    return [e for e in store if not e.domain.private and _holds_leaf(e.value, leaves)]


def _leaves_of(tensor: torch.Tensor) -> set[int]:
    found: set[int] = set()
    seen: set[Any] = set()
    stack: list[Any] = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        stack.extend(following for following, _ in node.next_functions)
    return found


def _holds_leaf(value: Any, leaves: set[int]) -> bool:
    if isinstance(value, nn.Module):
        return any(id(parameter) in leaves for parameter in value.parameters())
    return id(value) in leaves
