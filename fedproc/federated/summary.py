"""Who has what: rows and labels of every client, as numbers, a table and a picture.

Runs in the parent, except for :class:`_Counter`, which counts in the workers that hold the rows:
only the counts travel.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from fedproc.errors import WorkerLostError
from fedproc.federated.passing import call_there, take_all

if TYPE_CHECKING:
    from torch import Tensor

    from fedproc.federated.data import FederatedDataset

Span = tuple[str, int, int, int]

# Beyond these a table says how many it leaves out, and a target is a number rather than a class.
_SHOWN_CLIENTS: Final = 40
_SHOWN_LABELS: Final = 20


@dataclass(frozen=True, slots=True)
class ClientSummary:
    """One client.

    Attributes:
        client: Its name.
        worker: Name of the worker that holds its rows.
        rows: Number of rows.
        labels: Label -> rows that have it, ascending, labels of other clients with 0; None if the
            targets are not one integer per row, or may not be counted because they are private.
    """

    client: str
    worker: str
    rows: int
    labels: Mapping[int, int] | None


@dataclass(frozen=True, slots=True, repr=False)
class Summary(Sequence[ClientSummary]):
    """The clients of a federated dataset, in their order; ``str()`` of it is a table.

    Attributes:
        clients: One record per client.
    """

    clients: tuple[ClientSummary, ...]

    def __len__(self) -> int:
        """Returns the number of clients."""
        return len(self.clients)

    def __getitem__(self, index: Any) -> Any:
        """Returns the record of a client, by place or by name, or those of a slice as a tuple.

        Raises:
            KeyError: There is no client of that name.
            IndexError: There is no such place.
        """
        if not isinstance(index, str):
            return self.clients[index]
        for record in self.clients:
            if record.client == index:
                return record
        raise KeyError(f"no client {index!r}")

    @property
    def rows(self) -> int:
        """Rows of all clients."""
        return sum(record.rows for record in self.clients)

    @property
    def labels(self) -> tuple[int, ...] | None:
        """All labels that were counted, ascending; None if no client's could be counted."""
        counted = [record.labels for record in self.clients if record.labels is not None]
        return tuple(counted[0]) if counted else None

    def __repr__(self) -> str:
        """Shows counts of clients and rows."""
        return f"<Summary: {self.rows} rows of {len(self)} clients>"

    def __str__(self) -> str:
        """Draws a table: client, worker, rows, and one column per label."""
        labels = self.labels or ()
        columns = labels[:_SHOWN_LABELS]
        more = ["…"] if len(labels) > len(columns) else []
        table = [["client", "worker", "rows", *map(str, columns), *more]]
        table += [self._line(record, columns, more) for record in self.clients[:_SHOWN_CLIENTS]]
        table.append(["all", "", str(self.rows), *map(str, self._totals(columns)), *more])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [_row(cells, widths, "." if place else "0") for place, cells in enumerate(table)]
        hidden = len(self.clients) - _SHOWN_CLIENTS
        if hidden > 0:
            lines.insert(-1, f"… and {hidden} more clients")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the rows of every client, in the colours of their labels, into a picture file.

        Raises:
            ImportError: matplotlib is not installed (the extra ``fedproc[plot]``).
        """
        from fedproc.federated.plotting import new_figure

        figure = new_figure(8.0, min(12.0, 1.5 + 0.3 * len(self)))
        self.draw(figure.add_subplot())
        figure.savefig(path, dpi=120)

    def draw(self, axes: Any) -> None:
        """Draws the same bars into axes of matplotlib."""
        places = range(len(self))
        left = [0] * len(self)
        for number, label in enumerate(self.labels or ()):
            counts = [(record.labels or {}).get(label, 0) for record in self.clients]
            color = f"C{number % 10}"
            axes.barh(places, counts, left=left, height=0.9, color=color, label=str(label))
            left = [start + count for start, count in zip(left, counts, strict=True)]
        rest = [r.rows - start for r, start in zip(self.clients, left, strict=True)]
        if any(rest):
            axes.barh(places, rest, left=left, height=0.9, color="lightgray", label="rows")
        axes.set(xlabel="rows")
        axes.invert_yaxis()
        if len(self) <= _SHOWN_CLIENTS:
            axes.set_yticks(places, [record.client for record in self.clients])
        else:
            axes.set_ylabel("client")
        if len(axes.containers) <= _SHOWN_LABELS:
            axes.legend(title="label", loc="center left", bbox_to_anchor=(1.0, 0.5))

    def _line(self, record: ClientSummary, columns: Sequence[int], more: list[str]) -> list[str]:
        known = record.labels
        counts = ["-" if known is None else str(known[label]) for label in columns]
        return [record.client, record.worker, str(record.rows), *counts, *more]

    def _totals(self, columns: Sequence[int]) -> list[int]:
        return [sum((r.labels or {}).get(label, 0) for r in self.clients) for label in columns]


def _row(cells: Sequence[str], widths: Sequence[int], zero: str) -> str:
    """Names to the left, numbers to the right; a dot for 0 rows is easier to read."""
    names = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    numbers = [
        (zero if cell == "0" else cell).rjust(width)
        for cell, width in zip(cells[2:], widths[2:], strict=True)
    ]
    return "  ".join([*names, *numbers]).rstrip()


class _Counter:
    """Counts the labels of the clients of one worker; lives there."""

    def __init__(self, targets: Sequence[Tensor], least_rows: int) -> None:
        """Keeps the targets of all blocks, and the fewest rows whose counts may leave."""
        self._targets = targets
        self.least_rows = least_rows

    def count(self, spans: Sequence[Span]) -> dict[str, dict[int, int] | None]:
        """Counts: client -> label -> rows; None where there is nothing to count."""
        return {
            client: count_labels(self._targets[block][start:stop], self.least_rows)
            for client, block, start, stop in spans
        }


def count_labels(targets: Tensor, least_rows: int = 0) -> dict[int, int] | None:
    """Counts the rows of every label.

    Args:
        targets: Shape (rows,) or (rows, 1).
        least_rows: With fewer rows nothing is counted: counts of few rows tell of each.

    Returns:
        Label -> rows; None if targets are not one integer per row.
    """
    one = targets.ndim == 1 or (targets.ndim == 2 and targets.shape[1] == 1)
    if not one or targets.is_floating_point() or targets.is_complex() or len(targets) < least_rows:
        return None
    labels, counts = torch.unique(targets, return_counts=True)
    return {int(label): int(n) for label, n in zip(labels, counts, strict=True)}


def summarise(data: FederatedDataset) -> Summary:
    """Counts the rows and labels of every client, in the workers that hold them.

    Raises:
        WorkerLostError: A worker was lost meanwhile, and nobody can hold its rows.
    """
    for _ in data.cluster.workers:
        try:
            return _summarise(data)
        except WorkerLostError:
            data.restore()
    return _summarise(data)


def _summarise(data: FederatedDataset) -> Summary:
    homes, sizes = data.homes(data.clients), data.sizes
    least = data.cluster.min_rows if data.private else 0
    promises = []
    for holding in data.holdings().values():
        spans = [(c, span.block, span.start, span.stop) for c, span in holding.spans().items()]
        counter = holding.worker.run(_Counter, [block.y for block in holding.blocks], least)
        promises.append(call_there(counter, "count", spans))
    found: dict[str, dict[int, int] | None] = {}
    for part in take_all(promises):
        found.update(part)
    labels = sorted({label for counts in found.values() for label in counts or ()})
    return Summary(
        tuple(
            ClientSummary(client, homes[client], sizes[client], _all(found[client], labels))
            for client in data.clients
        )
    )


def _all(counts: dict[int, int] | None, labels: Sequence[int]) -> dict[int, int] | None:
    return None if counts is None else {label: counts.get(label, 0) for label in labels}
