"""The vector that is summed: what an update becomes before it is masked, and what the sum tells.

Runs in workers, which write it, and in the parent, which reads the sum. In the order of the
words: the weighted change of trained parameters and of floating buffers in fixed point, counters
(integer buffers), and a few numbers. Nothing else of a client leaves its worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from fedproc.client import largest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from fedproc.client.fixed_point import FixedPoint
    from fedproc.client.layout import Layout, Section
    from fedproc.client.update import Update

# Large vectors are written piece by piece: the float64 of a piece is all that is held besides.
_PIECE: Final = 1 << 17
_COUNTS: Final = ("weight", "examples", "rows", "within")
METRICS: Final = ("loss", "steps")
"""The numbers of which means are released; any other stays in the worker."""
_TAIL: Final = len(_COUNTS) + 1 + 2 * len(METRICS)


@dataclass(frozen=True, slots=True)
class Totals:
    """What the sum over the survivors says.

    Attributes:
        change: Sum of the weighted changes of trained parameters and of floating buffers:
            float64, shape (their number,), trained ones first. What is added to the sum, such as
            noise, is added here.
        weight: Sum of the weights.
        growth: Largest growth of each element of the integer buffers: int64.
        examples: Rows of the survivors.
        within: Survivors whose change was not clipped; 0 without clipping.
        loss: Mean loss over all rows processed; None if nobody told.
        metrics: Weighted means of "loss" and "steps" over those who told.
    """

    change: Tensor
    weight: int
    growth: Tensor
    examples: int
    within: int
    loss: float | None
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class SummedVector:
    """The form of the vector.

    Attributes:
        layout: The form of updates.
        fixed: The fixed point.
        uniform: Whether every client weighs 1, and not its number of rows.
    """

    layout: Layout
    fixed: FixedPoint
    uniform: bool

    @property
    def numel(self) -> int:
        """Words of the vector."""
        counters = sum(section.numel for section in self.layout.of_kind("largest"))
        return self._changes + counters * largest.PLACES + _TAIL

    @property
    def _changes(self) -> int:
        return sum(section.numel for section in self._floats())

    def write(self, start: Tensor, update: Update) -> Tensor:
        """Makes the vector of one client.

        Args:
            start: What a change is measured from: the global model in flat form; zeros, if the
                update holds changes already.
            update: What the client returns, with its model in flat form.

        Returns:
            int64, shape (numel,); not masked yet.

        Raises:
            OverflowError: A number is not finite, or leaves the range; its value is not told.
        """
        words = torch.zeros(self.numel, dtype=torch.int64, device="cpu")
        weight = 1.0 if self.uniform else float(update.examples)
        place = 0
        for values in weighted_change(self._floats(), start, update.block, weight):
            if not self.fixed.encode(values, words[place : place + len(values)]):
                raise OverflowError(
                    f"its weighted change leaves the range of the fixed point, which ends at "
                    f"{self.fixed.bound:g} for {self.fixed.terms} clients and bits="
                    f"{self.fixed.bits}: lower the learning rate, clip, or use fewer bits"
                )
            place += len(values)
        self._write_counters(start, update.block, words[place:-_TAIL])
        self._write_numbers(update, weight, words[-_TAIL:])
        return words

    def read(self, total: Tensor) -> Totals:
        """Reads the sum of vectors (int64, shape (numel,)) of at least one client."""
        weight, examples, rows, within = total[-_TAIL:][: len(_COUNTS)].tolist()
        loss_sum, *pairs = self.fixed.decode(total[-_TAIL:][len(_COUNTS) :]).tolist()
        metrics = {
            name: value / told
            for name, value, told in zip(METRICS, pairs[::2], pairs[1::2], strict=True)
            if told
        }
        return Totals(
            change=self.fixed.decode(total[: self._changes]),
            weight=weight,
            growth=largest.read(total[self._changes : -_TAIL]),
            examples=examples,
            within=within,
            loss=loss_sum / rows if rows else metrics.get("loss"),
            metrics=metrics,
        )

    def _floats(self) -> tuple[Section, ...]:
        return *self.layout.of_kind("trained"), *self.layout.of_kind("mean")

    def _write_counters(self, start: Tensor, block: Tensor, words: Tensor) -> None:
        sections = self.layout.of_kind("largest")
        if not sections:
            return
        growth = [s.view(block).to(torch.int64) - s.view(start).to(torch.int64) for s in sections]
        if not largest.write(torch.cat(growth), words):
            raise OverflowError(
                f"an integer buffer did not grow by 0 to {largest.PLACES}: the largest of others "
                "cannot be found by a sum"
            )

    def _write_numbers(self, update: Update, weight: float, words: Tensor) -> None:
        """Writes counts as they are, and the rest in fixed point: a metric, and that it is told."""
        values = [update.loss_sum]
        for name in METRICS:
            told = weight if name in update.metrics else 0.0
            values += [told * update.metrics.get(name, 0.0), told]
        words[: len(_COUNTS)] = torch.tensor(
            [int(weight), update.examples, update.rows, int(bool(update.within))], device="cpu"
        )
        if not self.fixed.encode(
            torch.tensor(values, dtype=torch.float64, device="cpu"), words[len(_COUNTS) :]
        ):
            raise OverflowError(
                "its loss or number of steps is not finite or leaves the range of the fixed point"
            )


def weighted_change(
    sections: tuple[Section, ...], start: Tensor, block: Tensor, weight: float
) -> Iterator[Tensor]:
    """Yields ``weight * (block - start)`` over sections, piece by piece: float64, fresh."""
    for section in sections:
        after, before = section.view(block), section.view(start)
        for place in range(0, section.numel, _PIECE):
            piece = after[place : place + _PIECE].to(torch.float64)
            piece = piece.sub_(before[place : place + _PIECE].to(torch.float64))
            yield piece.mul_(weight)
