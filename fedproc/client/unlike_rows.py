"""Pairs of real rows that tell a mean over the rows from a mean over something else.

Runs in workers, before the first stack. A loss of a user's may leave targets of some value out of
its mean, or weigh them: padding, a class nobody labelled, values that are missing. Where one row
has more of them than the other, the loss of the two is not the mean of the losses of each.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

# Values that are tried: all, or of many the least, the largest and the most frequent. What stands
# for something else (-100, 0, 255, the last class, NaN) is among those, as a rule.
_MOST_VALUES: Final = 32
# Targets that are looked at, of more only those of every n-th row: that takes some tenths of a
# second, once.
_MOST_TARGETS: Final = 1 << 20


def unlike_rows(blocks: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields inputs (2, ...) and targets (2, ...) of pairs, at least one for each value tried.

    Args:
        blocks: Pairs of inputs (rows, ...) and targets (rows, ...).
    """
    alike: dict[object, list[tuple[Tensor, Tensor]]] = {}
    for x, y in blocks:
        if len(y) and not y.is_complex():
            alike.setdefault((x.dtype, x.shape[1:], y.dtype, y.shape[1:]), []).append((x, y))
    for members in alike.values():
        ends = [0, *itertools.accumulate(len(y) for _, y in members)]
        targets = [y for _, y in members]
        for pair in _pairs(targets[0] if len(targets) == 1 else torch.cat(targets)):
            rows = []
            for row in pair:
                place = bisect_right(ends, row) - 1
                rows.append([part[row - ends[place]] for part in members[place]])
            xs, ys = zip(*rows, strict=True)
            yield torch.stack(xs), torch.stack(ys)


def _pairs(y: Tensor) -> list[tuple[int, int]]:
    """Finds two rows for each value: one with as few of it as any, one with as many."""
    y = y.reshape(len(y), -1)
    rows = torch.arange(0, len(y), max(1, -(-y.numel() // _MOST_TARGETS)), device=y.device)
    if len(rows) < len(y):  # values that stand for something else are rare, and extreme
        extremes = y.amin(1).argmin(), y.amax(1).argmax()
        rows = torch.cat([rows, torch.stack(extremes)])
        y = y.index_select(0, rows)
    pairs = set()
    for value in _values(y):
        found = y.isnan() if math.isnan(value) else y == value
        counts = found.sum(1) if y.shape[1] > 1 else found[:, 0].byte()  # sums of one are slow
        fewest, most = counts.argmin(), counts.argmax()
        if counts[fewest] < counts[most]:
            pairs.add((int(rows[fewest]), int(rows[most])))
    return sorted(pairs)


def _values(y: Tensor) -> list[float]:
    missing = y.isnan()
    values, counts = torch.unique(y[~missing], return_counts=True)
    if len(values) > _MOST_VALUES:
        some = _MOST_VALUES // 4
        frequent = values[counts.topk(2 * some).indices]
        values = torch.unique(torch.cat([values[:some], values[-some:], frequent]))
    return [*values.tolist(), *([math.nan] if bool(missing.any()) else [])]
