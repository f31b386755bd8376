"""What is private, and what becomes so. Runs in the worker: the only place that can enforce it.

A value is private when it was sent so or was computed from something private. Writing a private
value into a public object makes that object private. For tensor operations the target is known;
after a call of arbitrary code, tensors and modules among its arguments are compared with a copy
taken before, and any other mutable object counts as written.
"""

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fedproc.errors import NotPermittedError
from fedproc.worker.store import Domain, Entry

METADATA = frozenset(
    """Tensor.size Tensor.dim Tensor.ndimension Tensor.numel Tensor.nelement Tensor.element_size
    Tensor.stride Tensor.is_contiguous Tensor.is_floating_point Tensor.is_complex Tensor.is_signed
    Tensor.storage_offset Tensor.type Tensor.get_device Tensor.is_same_size Tensor.is_coalesced
    Tensor.sparse_dim Tensor.dense_dim Tensor.is_inference torch.numel torch.is_floating_point
    torch.is_complex torch.is_signed torch.is_same_size torch.result_type torch.can_cast
    builtins.len fedproc.worker.parts.has_gradient fedproc.worker.parts.kind_of
    fedproc.worker.parts.parameter_names fedproc.worker.parts.state_names""".split()
)
"""Functions that answer about the shape or type of a tensor, not about its values."""


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
    return any(entry.domain.private for entry in entries)


def result_domain(value: Any, used: Sequence[Entry], *, private: bool) -> Domain:
    """The domain of a new result of a command that used these entries."""
    private = private or any_private(used)
    if isinstance(value, torch.Tensor):
        memory = _memory(value)
        for entry in used:
            if memory and isinstance(entry.value, torch.Tensor) and _memory(entry.value) == memory:
                if private:
                    entry.domain.taint()
                return entry.domain
    sources = tuple(entry.domain for entry in used if not isinstance(entry.value, (int, float)))
    if isinstance(value, torch.Tensor):
        # It may be, or share memory with, a tensor inside a module, list or optimizer used here;
        # with the tensors used themselves it shares none.
        sources = tuple(e.domain for e in used if not isinstance(e.value, torch.Tensor))
    return Domain(private, sources)


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


def _snapshot(value: Any) -> list[torch.Tensor] | None:
    if isinstance(value, torch.Tensor):
        found = [value, value.grad] if value.is_leaf else [value]
    elif isinstance(value, nn.Module):
        state = [*value.parameters(), *value.buffers()]
        found = [*state, *(tensor.grad for tensor in state)]
    else:
        return None
    return [torch.empty(0) if t is None else t.detach().clone() for t in found]


def _attributes(value: Any) -> list[tuple[str, int, int]]:
    """What the parts of a module keep beside parameters and buffers: names, identities, sizes."""
    if not isinstance(value, nn.Module):
        return []
    return [
        (name, id(kept), len(kept) if isinstance(kept, (list, dict, set)) else 0)
        for part in value.modules()
        for name, kept in vars(part).items()
    ]


def _same(before: list[torch.Tensor], after: list[torch.Tensor] | None) -> bool:
    if after is None or len(before) != len(after):
        return False
    return all(
        one.shape == other.shape and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
        for one, other in zip(before, after, strict=True)
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


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing is printed while a private object is in use."""
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield
