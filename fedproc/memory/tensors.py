"""Tensors in messages: taken out of the pickle stream, their bytes through shared memory.

Runs in parent and worker. A message refers to a tensor by its place in a table; the table refers
to *storages*, so that tensors which share memory (tied weights, views sent together) share it on
the other side too. A storage travels inline when it is small, else as a block of the sender's
arena, which the receiver copies.
"""

import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from fedproc.errors import ClosedError
from fedproc.memory.arena import Arena, Block
from fedproc.memory.copying import copy_bytes
from fedproc.memory.sparse import coo

INLINE_BYTES = 16 * 1024
"""Below this a storage travels in the message: cheaper than a block and its release."""

Place = bytes | tuple[int, int]
"""Where the bytes of a storage are: here, or at (offset, bytes) of the sender's arena."""


class TensorSpec(NamedTuple):
    """All of a tensor but its bytes. ``offset`` and ``stride`` count elements."""

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    requires_grad: bool
    parameter: bool
    grad: "int | SparseGrad"  # place of the gradient in the table, -1: none


class SparseGrad(NamedTuple):
    """A gradient in COO layout: places of its parts in the table."""

    indices: int
    values: int
    shape: tuple[int, ...]
    coalesced: bool


Table = tuple[list[TensorSpec], list[Place]]


class Exporter:
    """Gives storages a place: inline, where they lie in the arena already, or in a new block."""

    def __init__(
        self,
        arena: Arena,
        inline_bytes: int = INLINE_BYTES,
        *,
        copy: bool = False,
        wipe: bool = False,
    ) -> None:
        """Place storages.

        Args:
            arena: of this process.
            inline_bytes: storages of this size and more go through it.
            copy: also those that lie in it already.
            wipe: what was put into a block does not stay there when it is free.
        """
        self._wipe = wipe
        self._arena = arena
        self._copy = copy
        self._inline_bytes = max(inline_bytes, 1)  # what has no bytes needs no block
        self.blocks: list[Block] = []
        self.held: list[torch.Tensor] = []

    def __call__(self, source: torch.Tensor, stride: tuple[int, ...]) -> Place:
        """Place the elements of ``source``, laid out with ``stride`` (dense, from element 0)."""
        nbytes = source.numel() * source.element_size()
        same_layout = source.stride() == stride
        if nbytes < self._inline_bytes:
            flat = source if same_layout else _laid_out(source, stride)
            return ctypes.string_at(flat.data_ptr(), nbytes) if nbytes else b""
        if same_layout and not self._copy:
            offset = self._arena.offset_of(source.data_ptr())
            if offset is not None:
                self.held.append(source)
                return offset, nbytes
        block = self._arena.allocate(nbytes)
        self.blocks.append(block)
        target = torch.from_numpy(self._arena.write_view(block))
        if same_layout:
            copy_bytes(target, source.as_strided((source.numel(),), (1,)).view(torch.uint8))
        else:
            target.view(source.dtype).as_strided(source.shape, stride).copy_(source)
        return block.offset, nbytes

    @property
    def exported(self) -> bool:
        """Whether the receiver will read this process's arena."""
        return bool(self.blocks or self.held)

    @property
    def nbytes(self) -> int:
        """Bytes of this process's arena that the receiver will read."""
        held = sum(tensor.numel() * tensor.element_size() for tensor in self.held)
        return held + sum(block.nbytes for block in self.blocks)

    def release(self) -> None:
        """The receiver has copied everything, or the message was not sent."""
        for block in self.blocks:
            if self._wipe:
                with suppress(ClosedError):
                    self._arena.write_view(block)[:] = 0
            self._arena.free(block)
        self.blocks.clear()
        self.held.clear()


def _laid_out(source: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    return torch.empty_strided(source.shape, stride, dtype=source.dtype, device="cpu").copy_(source)


def shape_of(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Its shape; None: a nested tensor of the strided layout has none, and torch raises."""
    if tensor.is_nested and tensor.layout is torch.strided:
        return None
    return tuple(tensor.shape)


class Packer:
    """Collects the tensors of one message while it is pickled."""

    def __init__(self) -> None:
        """Start empty."""
        self.tensors: list[torch.Tensor] = []
        self._places: dict[int, int] = {}
        self._grads: dict[int, int | SparseGrad] = {}
        self.cut_graph = False

    def add(self, tensor: torch.Tensor) -> int | None:
        """The persistent id of ``tensor``; None: let torch pickle it itself (sparse, quantised)."""
        known = self._places.get(id(tensor))
        if known is not None:
            return -known
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or tensor.is_nested:
            return None
        place = self._places[id(tensor)] = len(self.tensors)
        self.tensors.append(tensor)
        if tensor.grad_fn is not None:
            self.cut_graph = True
        elif tensor.is_leaf and tensor.grad is not None:
            self._grads[place] = self._grad(tensor.grad)
        return -place

    def _grad(self, grad: torch.Tensor) -> int | SparseGrad:
        if grad.layout is torch.sparse_coo:
            indices, values = self.add(grad._indices()), self.add(grad._values())
            assert indices is not None
            assert values is not None
            return SparseGrad(-indices, -values, tuple(grad.shape), grad.is_coalesced())
        place = self.add(grad)
        if place is None:
            raise TypeError(f"a tensor has a gradient of layout {grad.layout}, which cannot travel")
        return -place

    def table(self, place: Callable[[torch.Tensor, tuple[int, ...]], Place]) -> Table:
        """Specs and places of everything collected."""
        plain = [_resolved(tensor) for tensor in self.tensors]
        groups: dict[int, list[int]] = {}
        for index, tensor in enumerate(plain):
            # What has no elements shares none.
            pointer = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
            groups.setdefault(pointer or -1 - index, []).append(index)
        specs: list[TensorSpec | None] = [None] * len(plain)
        places: list[Place] = []
        for members in groups.values():
            shared = _covering([plain[index] for index in members])
            if shared is None:
                # alone in its storage: only its own elements travel
                for index in members:
                    stride = _dense_stride(plain[index])
                    specs[index] = self._spec(index, len(places), stride, 0)
                    places.append(place(plain[index], stride))
                continue
            start = shared.storage_offset()
            for index in members:
                tensor = plain[index]
                offset = (
                    tensor.storage_offset() * tensor.element_size() - start
                ) // tensor.element_size()
                specs[index] = self._spec(index, len(places), tensor.stride(), offset)
            places.append(place(shared, (1,)))
        return [spec for spec in specs if spec is not None], places

    def _spec(self, index: int, storage: int, stride: tuple[int, ...], offset: int) -> TensorSpec:
        tensor = self.tensors[index]
        leaf = tensor.grad_fn is None
        return TensorSpec(
            storage,
            tensor.dtype,
            tuple(tensor.shape),
            tuple(stride),
            offset,
            leaf and tensor.requires_grad,
            isinstance(tensor, nn.Parameter),
            self._grads.get(index, -1),
        )


def _resolved(tensor: torch.Tensor) -> torch.Tensor:
    """Without autograd, and without lazy conjugation or negation: bytes that mean the values."""
    return tensor.detach().resolve_conj().resolve_neg()


def _dense_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's own stride where its elements lie dense (channels last too), else contiguous."""
    if tensor.is_contiguous():
        return tensor.stride()
    return torch.empty_like(tensor, device="meta").stride()


def _covering(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Bytes (uint8, 1-d) of the storage range that several tensors share; None for one alone."""
    if len(tensors) == 1:
        return None
    first = min(t.storage_offset() * t.element_size() for t in tensors)
    last = max(_end_bytes(t) for t in tensors)
    largest = max(t.element_size() for t in tensors)
    first -= first % largest
    whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensors[0].untyped_storage())
    return whole[first:last]


def _end_bytes(tensor: torch.Tensor) -> int:
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (int(tensor.storage_offset()) + reach + 1) * tensor.element_size()


def rebuild(table: Table, load: Callable[[Place], torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of a table.

    Args:
        table: what ``Packer.table`` made.
        load: gives memory of the receiver's own with the bytes of a place, as uint8, 1-d.
    """
    specs, places = table
    storages = [load(place) for place in places]
    tensors: list[torch.Tensor] = []
    for spec in specs:
        tensor = torch.empty(0, dtype=spec.dtype, device="cpu")
        tensor.set_(storages[spec.storage].untyped_storage(), spec.offset, spec.shape, spec.stride)
        if spec.parameter:
            tensor = nn.Parameter(tensor, requires_grad=spec.requires_grad)
        elif spec.requires_grad:
            tensor.requires_grad_()
        tensors.append(tensor)
    for tensor, spec in zip(tensors, specs, strict=True):
        if isinstance(spec.grad, SparseGrad):
            parts = tensors[spec.grad.indices], tensors[spec.grad.values]
            tensor.grad = coo(*parts, spec.grad.shape, spec.grad.coalesced)
        elif spec.grad >= 0:
            tensor.grad = tensors[spec.grad]
    return tensors


def read_place(place: Place, view: Callable[[Block], Any], target: torch.Tensor) -> torch.Tensor:
    """Copy the bytes of ``place`` into ``target`` (uint8, 1-d, as long) and return it."""
    if isinstance(place, bytes):
        ctypes.memmove(target.data_ptr(), place, len(place))
    else:
        copy_bytes(target, torch.from_numpy(view(Block(*place))))
    return target


def place_bytes(place: Place) -> int:
    """How many bytes lie at a place."""
    return len(place) if isinstance(place, bytes) else place[1]
