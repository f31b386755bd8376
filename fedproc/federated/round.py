"""One round, from the cohort to the new model: reads like the paper, changes nothing.

Runs in the parent. The result is a value; the aggregator commits it as a whole or not at all.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedproc.client.evaluation import exact_sum
from fedproc.client.seeding import torch_threads
from fedproc.client.update import NO_BLOCK, Task, Update
from fedproc.errors import QuorumError
from fedproc.events import ClientFinished
from fedproc.federated.collecting import Collector
from fedproc.federated.commanding import Broadcast
from fedproc.federated.fold import Fold, Received
from fedproc.federated.history import RoundRecord, describe
from fedproc.federated.master import advance, without_master

if TYPE_CHECKING:
    from torch import Tensor

    from fedproc.client.layout import Layout
    from fedproc.events import Sink
    from fedproc.federated.crew import Crew
    from fedproc.federated.strategies.contract import State, Strategy
    from fedproc.federated.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Rules:
    """What does not change from round to round.

    Attributes:
        strategy: The server rule.
        weigh: Rows of a client -> its weight.
        seed: Seed of the run.
        min_clients: Fewest accepted updates.
        retries, deadline: See :class:`fedproc.federated.collecting.Collector`.
    """

    strategy: Strategy
    weigh: Callable[[int], float]
    seed: int
    min_clients: int
    retries: int
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """What a round starts from.

    Attributes:
        number: Number of the round, from 1.
        cohort: The clients that were drawn, in the order of all clients.
        block: The global model in flat form.
        state: State of the strategy, and the master of half-precision parameters.
        kept: Client -> what it keeps between rounds.
    """

    number: int
    cohort: tuple[str, ...]
    block: Tensor
    state: State
    kept: Mapping[str, dict[str, Any]]


def _floats() -> array[float]:
    return array("d")


@dataclass(slots=True)
class _Tally:
    """Numbers of the accepted updates in cohort order; an update itself does not outlive its turn.

    Attributes:
        first: The update that was accepted first, without its block.
        kept: Accepted client -> what it keeps.
        weights, step_norms, loss_sums: One of every accepted client.
        metrics: Name -> weights and values of those that returned it.
        examples, rows: Sums over the accepted clients.
        failures: Client -> why its update does not count.
    """

    first: Update | None = None
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights: array[float] = field(default_factory=_floats)
    step_norms: list[float | None] = field(default_factory=list)
    loss_sums: array[float] = field(default_factory=_floats)
    metrics: dict[str, tuple[array[float], array[float]]] = field(default_factory=dict)
    examples: int = 0
    rows: int = 0
    failures: dict[str, BaseException] = field(default_factory=dict)

    def accept(self, client: str, update: Update, weight: float) -> None:
        """Takes in an update that was folded."""
        update.block = NO_BLOCK
        if self.first is None:
            self.first = update
        self.kept[client] = update.state
        self.weights.append(weight)
        self.step_norms.append(update.step_norm)
        self.loss_sums.append(update.loss_sum)
        for name, value in update.metrics.items():
            weights, values = self.metrics.setdefault(name, (_floats(), _floats()))
            weights.append(weight)
            values.append(value)
        self.examples += update.examples
        self.rows += update.rows


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round made.

    Attributes:
        block, state: The new model in flat form, the new state of the strategy.
        kept: Accepted client -> what it keeps now.
        accepted, skipped: Clients whose updates count, and drawn ones without rows.
        failures: Client -> why its update does not count.
        loss, metrics: Mean training loss, weighted means of the returned numbers.
        examples: Rows of the accepted clients.
        bytes_moved, vectorized: Model down and updates up; whether clients trained at once.
    """

    block: Tensor
    state: State
    kept: Mapping[str, dict[str, Any]]
    accepted: tuple[str, ...]
    skipped: tuple[str, ...]
    failures: Mapping[str, BaseException]
    loss: float | None
    metrics: Mapping[str, float]
    examples: int
    bytes_moved: int
    vectorized: bool = False

    def record(self, start: Start, *, seconds: float, message_bytes: int | None) -> RoundRecord:
        """Makes the record of the round, without an evaluation."""
        return RoundRecord(
            round=start.number,
            clients=start.cohort,
            failures=self.failures,
            loss=self.loss,
            metrics=self.metrics,
            seconds=seconds,
            bytes_moved=self.bytes_moved,
            message_bytes=message_bytes,
            accepted=self.accepted,
            skipped=self.skipped,
            examples=self.examples,
            vectorized=self.vectorized,
        )


def play(
    crew: Crew,
    layout: Layout,
    rules: Rules,
    start: Start,
    sink: Sink,
    timeline: Timeline | None = None,
) -> Outcome:
    """Plays one round.

    Raises:
        QuorumError: Fewer than ``min_clients`` updates, or too few for the strategy.
    """
    sizes = crew.data.sizes
    tasks = _tasks(start, sizes, rules.seed)
    shared = rules.strategy.shared(without_master(start.state))
    fold = Fold(layout, keep_rows=rules.strategy.keeps_rows)
    broadcast = Broadcast(start.block, shared, start.kept)
    collector = Collector(crew, broadcast, tasks, rules.retries, rules.deadline)
    tally = _fold_all(collector, rules, fold, sink, timeline)
    _require_quorum(start, tally, rules.min_clients)
    began = time.perf_counter()
    new, state = _apply(layout, rules, start, fold, tally, len(crew.data.clients))
    if timeline is not None:
        timeline.did("strategy", began)
    payload_bytes = layout.payload_bytes + len(shared) * layout.trained_bytes
    return Outcome(
        block=new,
        state=state,
        kept=tally.kept,
        accepted=tuple(tally.kept),
        skipped=tuple(client for client in start.cohort if not sizes[client]),
        failures=tally.failures,
        loss=_loss(tally),
        metrics=_metrics(tally),
        examples=tally.examples,
        bytes_moved=(len(tasks) + len(tally.kept)) * payload_bytes,
        vectorized=bool(crew.stacking.on),
    )


def _tasks(start: Start, sizes: Mapping[str, int], seed: int) -> dict[str, Task]:
    """Makes the tasks of clients with rows, in cohort order."""
    return {
        client: Task(client, start.number, seed, place)
        for place, client in enumerate(start.cohort)
        if sizes[client]
    }


def _fold_all(
    collector: Collector, rules: Rules, fold: Fold, sink: Sink, timeline: Timeline | None
) -> _Tally:
    """Takes what the clients return, in cohort order."""
    tally = _Tally()
    # The workers have the cores: waking torch's other threads costs more than they help here.
    with torch_threads(1):
        for task, result in collector.updates():
            client, began = task.client, time.perf_counter()
            _take(client, result, rules, fold, tally)
            if timeline is not None:
                timeline.trained(client, collector.home(client), result)
                timeline.folded(client, began, tally.failures.get(client))
            sink(ClientFinished(task.round, client, client in tally.failures))
    return tally


def _take(
    client: str, result: Update | BaseException, rules: Rules, fold: Fold, tally: _Tally
) -> None:
    """Folds an update, or notes why it does not count."""
    if isinstance(result, BaseException):
        tally.failures[client] = result
        return
    weight = 1.0 if rules.strategy.uniform else rules.weigh(result.examples)
    try:
        mean_weight = rules.strategy.mean_weight(weight, result, tally.first or result)
    except ValueError as error:  # the strategy cannot use this update; the others count
        tally.failures[client] = error
        return
    fold.add(result.block, weight, mean_weight)
    tally.accept(client, result, weight)


def _apply(
    layout: Layout, rules: Rules, start: Start, fold: Fold, tally: _Tally, population: int
) -> tuple[Tensor, State]:
    mean, rows = fold.trained()
    received = Received(
        mean=mean,
        rows=rows,
        weights=tuple(tally.weights),
        step_norms=tuple(tally.step_norms),
        non_finite=sum(isinstance(e, FloatingPointError) for e in tally.failures.values()),
    )
    x = layout.flat_trained(start.block)
    try:
        new, state = rules.strategy.step(x, received, without_master(start.state))
    except QuorumError as error:
        message = f"round {start.number}: {error}{_causes(tally.failures)}"
        raise QuorumError(message, failures=tally.failures) from error
    state = rules.strategy.after(state, start.kept, tally.kept, population)
    if rules.strategy.keeps_master():
        new, master = advance(layout, x, new, start.state)
        state = {**state, **master}
    return fold.write(new), state


def _require_quorum(start: Start, tally: _Tally, min_clients: int) -> None:
    accepted = len(tally.kept)
    if accepted >= min_clients:
        return
    message = (
        f"round {start.number}: {accepted} of {len(start.cohort)} clients finished, "
        f"{min_clients} are needed; the model is unchanged{_causes(tally.failures)}"
    )
    raise QuorumError(message, failures=tally.failures)


def _causes(failures: Mapping[str, BaseException]) -> str:
    shown = [f"\n  {client}: {describe(error)}" for client, error in list(failures.items())[:10]]
    more = f"\n  and {len(failures) - 10} more" if len(failures) > 10 else ""
    return "".join(shown) + more


def _loss(tally: _Tally) -> float | None:
    """Mean loss over all rows processed; a custom function's own numbers otherwise."""
    if tally.rows:
        return exact_sum(tally.loss_sums) / tally.rows
    return _metrics(tally).get("loss")


def _metrics(tally: _Tally) -> dict[str, float]:
    """Weighted means; a number that only some clients returned is averaged over those."""
    return {
        name: exact_sum([weight * value for weight, value in zip(*column, strict=True)])
        / exact_sum(column[0])
        for name, column in tally.metrics.items()
    }
