"""When a round did what: a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open.

Runs in the parent. All processes of a machine share the clock, so what workers tell needs no
correction. One row is the parent, one row is each worker; what no work covers is shown as idle.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedproc.client.update import Update
from fedproc.federated.history import describe

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from fedproc.client.secure_trainer import MaskedUpdate

_PARENT: Final = "parent"


@dataclass(frozen=True, slots=True)
class _Span:
    """Something that took time: seconds of ``time.perf_counter``."""

    name: str
    kind: str
    began: float
    ended: float
    facts: dict[str, Any]


class Timeline:
    """Notes the spans of one round."""

    def __init__(self, workers: Sequence[str]) -> None:
        """Starts now; ``workers`` have their rows in this order."""
        self._began = time.perf_counter()
        self._rows: dict[str, list[_Span]] = {name: [] for name in (_PARENT, *workers)}

    def trained(
        self, client: str, worker: str, result: Update | MaskedUpdate | BaseException
    ) -> None:
        """Notes when a client trained; of a failed one it is not known."""
        if not isinstance(result, BaseException):
            facts: dict[str, Any] = {}
            if isinstance(result, Update):  # a masked update tells nothing but times
                facts = {"rows": result.examples, "steps": result.steps}
            span = _Span(client, "train", result.began, result.ended, facts)
            self._rows.setdefault(worker, []).append(span)

    def folded(self, client: str, began: float, error: BaseException | None) -> None:
        """Notes that the parent took a result from ``began`` until now."""
        facts = {} if error is None else {"error": describe(error)}
        kind = "fold" if error is None else "failure"
        self._note(f"{kind} {client}", kind, began, facts)

    def did(self, what: str, began: float) -> None:
        """Notes that the parent did something from ``began`` until now."""
        self._note(what, what, began, {})

    def _note(self, name: str, kind: str, began: float, facts: dict[str, Any]) -> None:
        self._rows[_PARENT].append(_Span(name, kind, began, time.perf_counter(), facts))

    def write(self, path: str | os.PathLike[str], title: str) -> None:
        """Writes the trace, which ends now.

        Args:
            path: A JSON file.
            title: Name of the whole.
        """
        ended = time.perf_counter()
        events = [_metadata("process_name", 0, name=title)]
        for row, (name, spans) in enumerate(self._rows.items()):
            events.append(_metadata("thread_name", row, name=name))
            events.append(_metadata("thread_sort_index", row, sort_index=row))
            events.extend(self._event(row, span) for span in self._filled(spans, ended))
        trace = {"traceEvents": events, "displayTimeUnit": "ms"}
        Path(path).write_text(json.dumps(trace) + "\n", encoding="utf-8")

    def _filled(self, spans: Sequence[_Span], ended: float) -> list[_Span]:
        """Puts idle spans between the spans of one row, from the start to the end."""
        filled, now = [], self._began
        for span in sorted(spans, key=lambda span: span.began):
            if span.began > now:
                filled.append(_Span("idle", "idle", now, span.began, {}))
            filled.append(span)
            now = max(now, span.ended)
        if ended > now:
            filled.append(_Span("idle", "idle", now, ended, {}))
        return filled

    def _event(self, row: int, span: _Span) -> dict[str, Any]:
        # whole nanoseconds: rounding must not let neighbours overlap, viewers drop such spans
        began, ended = (round((at - self._began) * 1e9) for at in (span.began, span.ended))
        return {
            "ph": "X",
            "name": span.name,
            "cat": span.kind,
            "pid": 0,
            "tid": row,
            "ts": began / 1000,
            "dur": (ended - began) / 1000,
            "args": span.facts,
        }


def _metadata(what: str, row: int, **facts: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": 0, "tid": row, "args": facts}
