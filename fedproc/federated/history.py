"""What happened in the rounds: records, and the sequence of them that ``run`` returns.

Runs in the parent; plain data.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from fedproc.errors import FedprocError, RemoteError

if TYPE_CHECKING:
    import os


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How good a model is on some rows.

    Attributes:
        loss: Mean loss over the rows, or over their labels where a loss of torch leaves some out
            or weighs them; None without a loss function.
        accuracy: Part of the rows whose largest output is the target, from 0 to 1; None unless
            targets are integers (rows,) and outputs (rows, classes).
        examples: Number of rows.
        metrics: What the metrics given to ``evaluate`` returned.
    """

    loss: float | None
    accuracy: float | None
    examples: int
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One round.

    Attributes:
        round: Its number, from 1.
        clients: All clients that were drawn.
        failures: Client -> why its update does not count.
        loss: Mean training loss over all rows processed; of a custom function the weighted mean
            of its ``"loss"``; None if there is none.
        metrics: The numbers the clients returned, weighted like their updates.
        seconds: Duration of the round, without the evaluation.
        bytes_moved: What the round would cost if clients were remote: the model down, the
            updates up.
        message_bytes: What went through the pipes to and from the workers; None if the cluster
            does not count it.
        evaluation: The evaluation after the round, or None.
        accepted: Clients whose updates count.
        skipped: Drawn clients without rows.
        examples: Rows of the accepted clients.
        epsilon: What all rounds so far have cost together under differential privacy, infinite
            without noise; None without ``privacy``.
        clip_norm: The L2 norm to which the changes of this round were clipped, or None.
        vectorized: Whether clients trained at once, see ``vectorize`` of the aggregator.
    """

    round: int
    clients: tuple[str, ...]
    failures: Mapping[str, BaseException]
    loss: float | None
    metrics: Mapping[str, float]
    seconds: float
    bytes_moved: int
    message_bytes: int | None
    evaluation: Evaluation | None = None
    accepted: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    examples: int = 0
    epsilon: float | None = None
    clip_norm: float | None = None
    vectorized: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as data for JSON; failures become their text."""
        evaluation = self.evaluation
        return {
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "clients": list(self.clients),
            "accepted": list(self.accepted),
            "skipped": list(self.skipped),
            "failures": {client: describe(error) for client, error in self.failures.items()},
            "metrics": dict(self.metrics),
            "evaluation": None
            if evaluation is None
            else {
                "loss": evaluation.loss,
                "accuracy": evaluation.accuracy,
                "examples": evaluation.examples,
                "metrics": {name: _plain(value) for name, value in evaluation.metrics.items()},
            },
        }


def describe(error: BaseException) -> str:
    """Returns class and first line of an error; a RemoteError has its tracebacks below that."""
    name = type(error).__name__.removeprefix("Remote") or type(error).__name__
    text = str(error).strip().partition("\n")[0]
    told = isinstance(error, RemoteError) or type(error) is FedprocError or text.startswith(name)
    return text if told else f"{name}: {text}"


def _plain(value: Any) -> Any:
    """Returns a metric as a number or list where it has that form."""
    return value.tolist() if hasattr(value, "tolist") else value


def _strict(value: Any) -> Any:
    """Returns data for JSON with None in place of numbers that JSON cannot say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _strict(part) for name, part in value.items()}
    return [_strict(part) for part in value] if isinstance(value, (list, tuple)) else value


class History(Sequence[RoundRecord]):
    """The records of all rounds so far, oldest first."""

    def __init__(self, records: Iterable[RoundRecord] = ()) -> None:
        """Starts with ``records``."""
        self._records = list(records)

    def __len__(self) -> int:
        """Returns the number of rounds."""
        return len(self._records)

    def __iter__(self) -> Iterator[RoundRecord]:
        """Iterates over the rounds, oldest first."""
        return iter(self._records)

    @overload
    def __getitem__(self, index: int) -> RoundRecord: ...
    @overload
    def __getitem__(self, index: slice) -> History: ...
    def __getitem__(self, index: int | slice) -> RoundRecord | History:
        """Returns a record, or the history of some rounds."""
        if isinstance(index, slice):
            return History(self._records[index])
        return self._records[index]

    def __repr__(self) -> str:
        """Shows the number of rounds and the last one's numbers."""
        if not self._records:
            return "<History: no rounds>"
        last = self._records[-1]
        loss = "" if last.loss is None else f", loss {last.loss:.4f}"
        accuracy = last.evaluation.accuracy if last.evaluation else None
        shown = "" if accuracy is None else f", accuracy {accuracy:.4f}"
        return f"<History: {len(self)} rounds, last {last.round}{loss}{shown}>"

    def append(self, record: RoundRecord) -> None:
        """Adds the record of a round."""
        self._records.append(record)

    def replace_last(self, record: RoundRecord) -> None:
        """Puts a completed record in the place of the last one."""
        self._records[-1] = record

    def to_dict(self) -> dict[str, Any]:
        """Returns ``{"rounds": [record, …]}`` as data for JSON; NaN and infinite stay as they are.

        JSON has no names for them: :meth:`to_json` writes null.
        """
        return {"rounds": [record.to_dict() for record in self._records]}

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes :meth:`to_dict` to a file, null for numbers that are NaN or infinite.

        So the epsilon of privacy without noise is null, as it is without privacy.
        """
        text = json.dumps(_strict(self.to_dict()), indent=2, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes one row per round; metrics have columns of their own."""
        rows = [csv_row(record) for record in self._records]
        columns = dict.fromkeys(key for row in [_CSV_COLUMNS, *rows] for key in row)
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(columns))
            writer.writeheader()
            writer.writerows(rows)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws loss and accuracy over the rounds into a picture file.

        Raises:
            ImportError: matplotlib is not installed (the extra ``fedproc[plot]``).
        """
        from fedproc.federated.plotting import plot_history

        plot_history(self, path)


_CSV_COLUMNS = dict.fromkeys(
    [
        "round",
        "clients",
        "accepted",
        "failures",
        "examples",
        "loss",
        "evaluation_loss",
        "evaluation_accuracy",
        "seconds",
        "bytes_moved",
        "message_bytes",
        "epsilon",
        "clip_norm",
    ]
)


def csv_row(record: RoundRecord) -> dict[str, Any]:
    """Returns what a line of the CSV file says of a round, by column."""
    evaluation = record.evaluation
    return {
        "round": record.round,
        "clients": len(record.clients),
        "accepted": len(record.accepted),
        "failures": len(record.failures),
        "examples": record.examples,
        "loss": record.loss,
        "evaluation_loss": None if evaluation is None else evaluation.loss,
        "evaluation_accuracy": None if evaluation is None else evaluation.accuracy,
        "seconds": record.seconds,
        "bytes_moved": record.bytes_moved,
        "message_bytes": record.message_bytes,
        "epsilon": record.epsilon,
        "clip_norm": record.clip_norm,
        **{f"metric_{name}": value for name, value in record.metrics.items()},
    }
