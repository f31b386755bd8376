"""Callbacks for :class:`fedproc.Aggregator`: rounds as a table, in TensorBoard, and when to stop.

Runs in the parent. A callback is called as ``callback(aggregator, record)`` after every round;
returning True ends :meth:`fedproc.Aggregator.run`. Any function will do; these are the usual ones.
"""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fedproc.federated.history import csv_row
from fedproc.ranges import require_at_least, require_not_negative

if TYPE_CHECKING:
    from fedproc.federated.aggregator import Aggregator
    from fedproc.federated.history import RoundRecord


class ScalarWriter(Protocol):
    """What ``TensorBoard`` writes to, such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any:
        """Notes a number of a round."""


class CSVLogger:
    """Keeps a file that says after every round what ``aggregator.history.to_csv(path)`` would.

    A line is appended per round; only a metric that was never there before, and the first round
    that a logger sees, write the file anew. So a resumed run has its earlier rounds too.

    Attributes:
        path: The file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens nothing yet: the file is written with the first round."""
        self.path = Path(path)
        self._columns: list[str] = []

    def __call__(self, aggregator: Aggregator, record: RoundRecord) -> None:
        """Writes the line of a round."""
        row = csv_row(record)
        if not row.keys() <= set(self._columns):
            aggregator.history.to_csv(self.path)
            with self.path.open(newline="", encoding="utf-8") as file:
                self._columns = next(csv.reader(file))
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)


class TensorBoard:
    """Writes loss, evaluation, metrics, clients and seconds of every round as scalars.

    Args:
        writer: Anything with ``add_scalar(tag, value, step)``, such as a ``SummaryWriter``, or the
            name of a directory, for which one is made.

    Raises:
        ImportError: A directory is given and tensorboard is not installed.
        ValueError: It is neither.
    """

    def __init__(self, writer: ScalarWriter | str | os.PathLike[str]) -> None:
        """Makes the writer of a directory."""
        if isinstance(writer, (str, os.PathLike)):
            self._writer: ScalarWriter = _summary_writer(writer)
        elif callable(getattr(writer, "add_scalar", None)) and not isinstance(writer, type):
            self._writer = writer
        else:
            raise ValueError(
                "TensorBoard takes a directory or an object with add_scalar(tag, value, step), "
                f"got {writer!r}"
            )

    def __call__(self, aggregator: Aggregator, record: RoundRecord) -> None:  # noqa: ARG002 - part of the protocol
        """Writes the numbers of a round that there are."""
        for tag, value in _scalars(record).items():
            self._writer.add_scalar(tag, value, record.round)
        flush = getattr(self._writer, "flush", None)
        if callable(flush):
            flush()


class EarlyStopping:
    """Ends the run when a number has not become better for some rounds.

    Args:
        metric: ``"loss"`` (training), ``"evaluation_loss"``, ``"evaluation_accuracy"``, or the
            name of a metric that the evaluation or the clients returned.
        patience: Rounds in a row without an improvement that end the run. Rounds that do not have
            the number, because they were not evaluated, do not count.
        min_delta: What is better by no more than this is no improvement.
        mode: Whether ``"min"`` or ``"max"`` is better; None takes ``"min"`` if the metric's name
            ends in "loss" or "error", else ``"max"``.

    What was best so far is not part of a checkpoint: after a load, a new object starts anew.

    Attributes:
        best: The best number so far, None before the first.
        best_round: The round that had it.
        stopped_round: The round that ended the run, or None.

    Raises:
        ValueError: A value is outside of its range.
    """

    def __init__(
        self,
        metric: str = "evaluation_loss",
        patience: int = 5,
        min_delta: float = 0.0,
        *,
        mode: Literal["min", "max"] | None = None,
    ) -> None:
        """Checks every value."""
        if not metric:
            raise ValueError(f"metric must be a name, got {metric!r}")
        if mode not in (None, "min", "max"):
            raise ValueError(f"mode must be 'min', 'max' or None, got {mode!r}")
        self.metric = metric
        self.patience = require_at_least("patience", patience, 1)
        self.min_delta = require_not_negative("min_delta", min_delta)
        falling = mode == "min" or (mode is None and metric.endswith(("loss", "error")))
        self._sign = 1.0 if falling else -1.0
        self.best: float | None = None
        self.best_round: int | None = None
        self.stopped_round: int | None = None
        self._waited = 0

    def __call__(self, aggregator: Aggregator, record: RoundRecord) -> bool:  # noqa: ARG002 - part of the protocol
        """Returns True when the patience is over; a NaN is no improvement.

        Raises:
            KeyError: The record is evaluated, and has no such number.
        """
        value = _number(record, self.metric)
        if value is None:
            return False
        if self._improves(value):
            self.best, self.best_round, self._waited = value, record.round, 0
            return False
        self._waited += 1
        if self._waited < self.patience:
            return False
        self.stopped_round, self._waited = record.round, 0
        return True

    def _improves(self, value: float) -> bool:
        if math.isnan(value):
            return False
        return self.best is None or self._sign * (self.best - value) > self.min_delta


def _summary_writer(directory: str | os.PathLike[str]) -> ScalarWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoard(directory) needs tensorboard: pip install 'fedproc[tensorboard]', or "
            "pass an object with add_scalar(tag, value, step)"
        ) from error
    writer: ScalarWriter = SummaryWriter(os.fspath(directory))
    return writer


def _scalars(record: RoundRecord) -> dict[str, float]:
    """Names the numbers of a record as TensorBoard groups them."""
    evaluation = record.evaluation
    found: dict[str, Any] = {
        "train/loss": record.loss,
        **{f"train/{name}": value for name, value in record.metrics.items() if name != "loss"},
        "round/seconds": record.seconds,
        "round/accepted": len(record.accepted),
        "round/failures": len(record.failures),
    }
    if evaluation is not None:
        found["evaluation/loss"] = evaluation.loss
        found["evaluation/accuracy"] = evaluation.accuracy
        found |= {f"evaluation/{name}": value for name, value in evaluation.metrics.items()}
    numbers = {tag: _scalar(value) for tag, value in found.items()}
    return {tag: value for tag, value in numbers.items() if value is not None}


def _number(record: RoundRecord, metric: str) -> float | None:
    """Finds a number of a record by name; None if this round was not to have it."""
    evaluation = record.evaluation
    if metric == "loss":
        return record.loss
    if metric in ("evaluation_loss", "evaluation_accuracy"):
        if evaluation is None:
            return None
        found = evaluation.loss if metric == "evaluation_loss" else evaluation.accuracy
    else:
        everything = {**record.metrics, **(evaluation.metrics if evaluation else {})}
        if metric not in everything and evaluation is None:
            return None
        found = _scalar(everything.get(metric))
    if found is None:
        raise KeyError(
            f"round {record.round} has no number {metric!r}: it has {sorted(_scalars(record))}"
        )
    return found


def _scalar(value: Any) -> float | None:
    """Returns a number, or the one element of a tensor or array, as a float."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None
