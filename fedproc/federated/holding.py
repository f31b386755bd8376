"""Where the rows of clients come from, and the copies of them that workers hold.

Runs in the parent. A source can be put on a worker again and again, so a lost worker's clients
come back elsewhere.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from fedproc.client.work import Span
from fedproc.federated.rows import as_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from fedproc.remote.worker import Worker

Factory = Callable[[], Any]

# Small beside the rows of many clients, large beside what a message costs.
_BLOCK_BYTES: Final = 8 << 20
_ON_THE_WAY: Final = 2


@dataclass(frozen=True, slots=True, eq=False)
class RowsSource:
    """Rows of tensors in the parent: all of them, or those of ``indices`` in that order."""

    x: Tensor
    y: Tensor
    indices: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.x) if self.indices is None else len(self.indices)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Returns inputs and targets."""
        if self.indices is None:
            return self.x, self.y
        index = torch.from_numpy(self.indices)
        return self.x.index_select(0, index), self.y.index_select(0, index)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        row = sum(part[:1].numel() * part.element_size() for part in (self.x, self.y))
        return len(self) * row

    def signature(self) -> tuple[object, ...]:
        """Returns what rows must share to lie in one block."""
        return self.x.dtype, self.x.shape[1:], self.y.dtype, self.y.shape[1:]


@dataclass(frozen=True, slots=True, eq=False)
class FactorySource:
    """Rows that a function makes in the worker."""

    make: Factory


Source = RowsSource | FactorySource


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Rows of one or more clients on one worker, side by side.

    Attributes:
        x: Pointer to the inputs (rows, ...).
        y: Pointer to the targets (rows, ...).
        spans: Client -> its rows, from start to stop.
    """

    x: Any
    y: Any
    spans: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True, eq=False)
class Holding:
    """All rows that one worker holds; a change makes a new object."""

    worker: Worker
    blocks: tuple[Block, ...]

    def spans(self) -> dict[str, Span]:
        """Maps the clients to their rows, as a trainer wants it."""
        return {
            client: Span(place, start, stop)
            for place, block in enumerate(self.blocks)
            for client, (start, stop) in block.spans.items()
        }


def hold(worker: Worker, sources: Mapping[str, Source], *, private: bool) -> list[Block]:
    """Puts the rows of clients on a worker, in blocks of clients whose rows fit together.

    Of what this takes here, beside the sources themselves, at most a few blocks exist at a time,
    however many clients there are. A client with more rows than a block has one of its own.

    Raises:
        ArenaFullError: The worker has no room for them.
        RemoteError: A factory failed.
        WorkerLostError: The worker has ended.
    """
    groups: dict[tuple[object, ...], dict[str, RowsSource]] = {}
    born = {}
    for client, source in sources.items():
        if isinstance(source, RowsSource):
            groups.setdefault(source.signature(), {})[client] = source
        else:
            # all factories start before the first one is waited for
            born[client] = worker.run(born_rows, source.make, private=private)
    blocks = _send_blocks(worker, groups.values(), private=private)
    for client, pair in born.items():
        x, y = (worker.run(operator.getitem, pair, side) for side in (0, 1))
        blocks.append(Block(x, y, {client: (0, len(y))}))
    return blocks


def _send_blocks(
    worker: Worker, groups: Iterable[Mapping[str, RowsSource]], *, private: bool
) -> list[Block]:
    """Sends one block after the other, so that what lies ready for the worker is bounded."""
    blocks: list[Block] = []
    for group in groups:
        for part in _parts(group):
            if len(blocks) >= _ON_THE_WAY:  # the worker copies one while the next one is made
                blocks[-_ON_THE_WAY].y.wait()
            blocks.append(_send_block(worker, part, private=private))
    for block in blocks[-_ON_THE_WAY:]:
        block.y.wait()
    return blocks


def _parts(group: Mapping[str, RowsSource]) -> Iterator[dict[str, RowsSource]]:
    """Cuts a group into clients whose rows together fill one block."""
    part, nbytes = dict[str, RowsSource](), 0
    for client, source in group.items():
        if part and nbytes + source.nbytes > _BLOCK_BYTES:
            yield part
            part, nbytes = {}, 0
        part[client] = source
        nbytes += source.nbytes
    yield part


def _send_block(worker: Worker, part: Mapping[str, RowsSource], *, private: bool) -> Block:
    pieces = [source.rows() for source in part.values()]
    x, y = (_joined(sides) for sides in zip(*pieces, strict=True))
    spans, end = {}, 0
    for client, source in part.items():
        spans[client] = (end, end + len(source))
        end += len(source)
    return Block(worker.send(x, private=private), worker.send(y, private=private), spans)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    # no copy of a single one: a client may have as many rows as all others together
    if len(pieces) == 1 and pieces[0].is_contiguous():
        return pieces[0]
    return torch.cat(list(pieces))


def born_rows(make: Factory) -> tuple[Tensor, Tensor]:
    """Runs a factory; runs in the worker."""
    return as_rows(make())


def deal(
    sizes: Mapping[str, int], workers: Sequence[str], loads: Mapping[str, int]
) -> dict[str, str]:
    """Gives clients to workers, longest first, each to the one with the fewest rows.

    Args:
        sizes: Client -> rows; a client named as a worker goes there.
        workers: Names to choose from, earlier ones first at equal load.
        loads: Worker -> rows that it holds already.

    Returns:
        Client -> worker name.
    """
    homes = {client: client for client in sizes if client in workers}
    rows = {name: loads.get(name, 0) for name in workers}
    for client in homes:
        rows[client] += sizes[client]
    queue = [(load, place) for place, load in enumerate(rows.values())]
    heapq.heapify(queue)
    for client, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if client not in homes:
            load, place = heapq.heappop(queue)
            homes[client] = workers[place]
            # an empty client counts a little, so that thousands of them spread as well
            heapq.heappush(queue, (load + max(size, 1), place))
    return homes
