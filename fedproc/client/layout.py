"""The flat form of a model: one block of bytes that holds what travels, and nothing else.

Runs in the parent and in workers; both compute the same layout from the same model. Trained
parameters come first, then floating buffers, then integer buffers, each kind grouped by dtype.
Frozen parameters do not travel. Tied tensors have one name and travel once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import torch
from torch.nn.parameter import is_lazy

from fedproc.memory.copying import fresh
from fedproc.memory.lending import lendable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn

Kind = Literal["trained", "mean", "largest"]

Slot = tuple["Tensor", ...]
"""Where a client writes its update: one flat view for each section of a layout."""

# A section starts on a cache line, so that the views of a block are as aligned as fresh tensors.
_ALIGNMENT_BYTES: Final = 64
_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS: Final = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the model: its name (of parameter or buffer), shape and number of elements."""

    name: str
    shape: tuple[int, ...]
    numel: int


@dataclass(frozen=True, slots=True)
class Section:
    """Tensors of one kind and dtype, side by side.

    Attributes:
        kind: How the aggregator treats them: ``trained`` by the strategy, ``mean`` as floating
            buffers, ``largest`` as integer buffers.
        dtype: The dtype of all of them.
        start_bytes: Where the section begins in the block.
        numel: Elements of the section.
        entries: The tensors, in the order of the model.
    """

    kind: Kind
    dtype: torch.dtype
    start_bytes: int
    numel: int
    entries: tuple[Entry, ...]

    @property
    def stop_bytes(self) -> int:
        """Where it ends."""
        return self.start_bytes + self.numel * self.dtype.itemsize

    def view(self, block: Tensor) -> Tensor:
        """Returns the section of ``block`` as a tensor of shape (numel,), without a copy."""
        start, stop = self.start_bytes, self.stop_bytes
        part = block if start == 0 and stop == block.shape[0] else block[start:stop]
        return part.view(self.dtype)

    def columns(self, blocks: Tensor) -> Tensor:
        """Returns the section of blocks that are rows: (blocks, numel), without a copy."""
        return blocks[:, self.start_bytes : self.stop_bytes].view(self.dtype)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where every tensor that travels lies in a block of ``nbytes`` bytes."""

    sections: tuple[Section, ...]
    nbytes: int

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Computes the layout of a model.

        Raises:
            ValueError: Nothing can be trained, or a tensor has no defined mean: complex, sparse,
                quantised, lazy, on the meta device, or an expanded view.
        """
        groups: dict[tuple[Kind, torch.dtype], list[Entry]] = {}
        for name, tensor, kind in _travellers(model):
            entry = Entry(name, tuple(tensor.shape), tensor.numel())
            groups.setdefault((kind, tensor.dtype), []).append(entry)
        sections, end = [], 0
        order = {"trained": 0, "mean": 1, "largest": 2}
        for (kind, dtype), entries in sorted(groups.items(), key=lambda item: order[item[0][0]]):
            start = -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            numel = sum(entry.numel for entry in entries)
            sections.append(Section(kind, dtype, start, numel, tuple(entries)))
            end = start + numel * dtype.itemsize
        if not any(section.kind == "trained" for section in sections):
            raise ValueError(
                "the model has no parameter with requires_grad=True: nothing can be trained"
            )
        return cls(tuple(sections), end)

    def of_kind(self, kind: Kind) -> tuple[Section, ...]:
        """Returns the sections of one kind, in the order of the block."""
        return tuple(section for section in self.sections if section.kind == kind)

    @property
    def trained_numel(self) -> int:
        """Number of trained parameters, tied ones counted once."""
        return sum(section.numel for section in self.of_kind("trained"))

    @property
    def trained_bytes(self) -> int:
        """Bytes of the trained parameters."""
        return sum(section.numel * section.dtype.itemsize for section in self.of_kind("trained"))

    @property
    def payload_bytes(self) -> int:
        """Bytes of everything that travels, without the gaps between sections."""
        return sum(section.numel * section.dtype.itemsize for section in self.sections)

    def new_block(self) -> Tensor:
        """Allocates a block: uint8, shape (nbytes,), zeros."""
        return fresh(self.nbytes).zero_()

    def room(self, allocate: Callable[[int], Tensor] | None = None) -> Tensor:
        """Allocates a block all of whose sections will be written; the rest is zeros.

        Args:
            allocate: Bytes -> memory (uint8, 1-d); None: it is this process's own.
        """
        return self._with_gaps((allocate or fresh)(self.nbytes)[None])[0]

    def new_blocks(self, count: int, *, secret: bool = False) -> Tensor:
        """Allocates blocks as rows: uint8, shape (count, at least nbytes), rows aligned.

        In a worker they lie where the parent can read them, unless they are ``secret``. Then what
        lay there before is still in their sections: clearing 40 MB takes as long as writing them.
        Fill every section, or clear the row; all between the sections is zeros.
        """
        row = -(-self.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if secret:
            return torch.zeros(count, row, dtype=torch.uint8, device="cpu")
        return self._with_gaps(lendable(count * row).view(count, row))

    def _with_gaps(self, blocks: Tensor) -> Tensor:
        """Clears what lies between and after the sections of blocks: (count, at least nbytes)."""
        row, end = blocks.shape[1], 0
        for start, stop in [*((s.start_bytes, s.stop_bytes) for s in self.sections), (row, row)]:
            if start > end:
                blocks[:, end:start].zero_()
            end = stop
        return blocks

    def tensors(self, model: nn.Module) -> list[list[Tensor]]:
        """Finds the tensors of every section in ``model``."""
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return [[named[entry.name] for entry in section.entries] for section in self.sections]

    def trained(self, model: nn.Module) -> list[Tensor]:
        """Lists the trained parameters of ``model`` in the order of the block."""
        named = dict(model.named_parameters())
        return [named[entry.name] for part in self.of_kind("trained") for entry in part.entries]

    def slot(self, block: Tensor) -> Slot:
        """Views ``block`` section by section."""
        return tuple(section.view(block) for section in self.sections)

    def slots(self, blocks: Tensor) -> list[Slot]:
        """Views every row of ``blocks``, as :meth:`new_blocks` makes them, as :meth:`slot` does."""
        if not len(blocks):
            return []
        columns = [section.columns(blocks).unbind() for section in self.sections]
        return list(zip(*columns, strict=True))

    def trained_rows(self, blocks: Tensor) -> Tensor:
        """Views the trained parameters, of one dtype, in blocks: (blocks, parameters)."""
        (section,) = self.of_kind("trained")
        return section.columns(blocks)

    def pieces(self, block: Tensor) -> list[Tensor]:
        """Views ``block`` as tensors of the model's shapes, of all sections, in their order."""
        found = []
        for section, view in zip(self.sections, self.slot(block), strict=True):
            parts = view.split_with_sizes([entry.numel for entry in section.entries])
            entries = zip(section.entries, parts, strict=True)
            found.extend([part.view(entry.shape) for entry, part in entries])
        return found

    def pack(self, tensors: Sequence[Sequence[Tensor]], block: Tensor) -> Tensor:
        """Copies tensors, as :meth:`tensors` lists them, into ``block`` and returns it."""
        fill(self.slot(block), tensors)
        return block

    def unpack(self, block: Tensor, tensors: Sequence[Sequence[Tensor]]) -> None:
        """Copies ``block`` into tensors in place, whatever their strides."""
        load(self.pieces(block), [member for members in tensors for member in members])

    def flat_trained(self, block: Tensor) -> Tensor:
        """Returns the trained parameters of ``block`` as one float64 vector (a copy)."""
        vector = fresh(self.trained_numel * 8).view(torch.float64)
        trained = self.of_kind("trained")
        pieces = vector.split_with_sizes([part.numel for part in trained])
        for part, piece in zip(trained, pieces, strict=True):
            piece.copy_(part.view(block))
        return vector

    def non_finite(self, slot: Slot, start: Sequence[Tensor] = ()) -> str | None:
        """Says where a floating value of ``slot`` is NaN or infinite, or returns None.

        Args:
            slot: A trained model.
            start: What it was trained from, as :meth:`pieces` lists it: where a buffer was not
                finite then (a mask of -inf), it need not be now.
        """
        end = 0
        for section, values in zip(self.sections, slot, strict=True):
            before, end = start[end : end + len(section.entries)], end + len(section.entries)
            # a sum is finite only if all its terms are: one pass, and no mask is made
            if section.kind == "largest" or math.isfinite(values.sum().item()):
                continue
            if bool(torch.isfinite(values).all()):
                continue
            pieces = torch.split(values, [entry.numel for entry in section.entries])
            for place, (entry, piece) in enumerate(zip(section.entries, pieces, strict=True)):
                bad = ~torch.isfinite(piece)
                if before and section.kind == "mean":
                    bad &= torch.isfinite(before[place].reshape(-1))
                if bool(bad.any()):
                    count = int(bad.sum())
                    return f"{count} of {entry.numel} values of {entry.name!r} are not finite"
        return None


def fill(slot: Slot, tensors: Sequence[Sequence[Tensor]]) -> None:
    """Copies tensors, as :meth:`Layout.tensors` lists them, into a slot."""
    with torch.no_grad():
        for values, members in zip(slot, tensors, strict=True):
            torch.cat([member.reshape(-1).cpu() for member in members], out=values)


def load(pieces: Sequence[Tensor], members: Sequence[Tensor]) -> None:
    """Copies pieces, as :meth:`Layout.pieces` lists them, into tensors in place."""
    with torch.no_grad():
        torch._foreach_copy_(list(members), list(pieces))


def _travellers(model: nn.Module) -> Iterator[tuple[str, Tensor, Kind]]:
    """Yields name, tensor and kind of everything that travels, tied tensors once."""
    for name, parameter in model.named_parameters():
        _refuse_undefined(name, parameter)
        if parameter.requires_grad:
            _refuse_dtype(name, parameter, _FLOATS)
            yield name, parameter, "trained"
    for name, buffer in model.named_buffers():
        _refuse_undefined(name, buffer)
        _refuse_dtype(name, buffer, (*_FLOATS, *_INTEGERS))
        yield name, buffer, "mean" if buffer.is_floating_point() else "largest"


def _refuse_undefined(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor) or tensor.is_meta:
        raise ValueError(
            f"{name!r} has no values yet: run the model once on a sample, then pass it"
        )
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise ValueError(f"{name!r} is sparse or quantised: only dense tensors have a defined mean")
    if any(
        stride == 0 < size - 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        raise ValueError(f"{name!r} is an expanded view: call .contiguous() on it first")


def _refuse_dtype(name: str, tensor: Tensor, allowed: Iterable[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        raise ValueError(f"{name!r} has dtype {tensor.dtype}, which has no defined mean here")
