"""One round, from the cohort to the new model: reads like the paper, changes nothing.

Runs in the parent. The result is a value; the aggregator commits it as a whole or not at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedproc.client.seeding import torch_threads
from fedproc.client.update import Task, Update
from fedproc.errors import QuorumError
from fedproc.events import ClientFinished, ignore
from fedproc.federated.collecting import Collector
from fedproc.federated.commanding import Broadcast
from fedproc.federated.fold import Fold, Received, Weighted
from fedproc.federated.history import RoundRecord, describe
from fedproc.federated.master import next_parameters, without_master
from fedproc.federated.tally import Tally

if TYPE_CHECKING:
    from torch import Tensor

    from fedproc.client.layout import Layout
    from fedproc.events import Sink
    from fedproc.federated.crew import Crew
    from fedproc.federated.mechanism import Ledger
    from fedproc.federated.private_fold import PrivateFold
    from fedproc.federated.rules import Rules, Weigh
    from fedproc.federated.strategies.contract import State
    from fedproc.federated.timeline import Timeline

    AnyFold = Fold | PrivateFold


@dataclass(frozen=True, slots=True)
class Start:
    """What a round starts from.

    Attributes:
        number: Number of the round, from 1.
        cohort: The clients that were drawn, in the order of all clients.
        block: The global model in flat form.
        state: State of the strategy, and the master of half-precision parameters.
        kept: Client -> what it keeps between rounds.
        ledger: Clips and adds noise; None does neither.
        allocate: Gives memory for the new model, see ``Layout.room``.
        meanwhile: Called once, when the workers have something to do.
    """

    number: int
    cohort: tuple[str, ...]
    block: Tensor
    state: State
    kept: Mapping[str, dict[str, Any]]
    ledger: Ledger | None = None
    allocate: Callable[[int], Tensor] | None = None
    meanwhile: Callable[[], None] = lambda: None


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
        ledger: What privacy has cost with this round; None without it.
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
    ledger: Ledger | None = None

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
            epsilon=None if self.ledger is None else self.ledger.epsilon,
            clip_norm=None if start.ledger is None else start.ledger.clip_norm,
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
    tasks = tasks_of(start, sizes, rules.seed, rules.weight_ahead(crew.stacking))
    shared = rules.strategy.shared(without_master(start.state))
    broadcast = Broadcast(start.block, shared, start.kept)
    collector = Collector(crew, broadcast, tasks, rules, start.meanwhile)
    fold = _fold(layout, rules, start)
    tally = _fold_all(collector, rules, fold, sink, timeline)
    _require_quorum(start, tally, rules.min_clients)
    began = time.perf_counter()
    new, state = _apply(layout, rules, start, fold, tally, len(sizes))
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
        loss=tally.loss(),
        metrics=tally.means(),
        examples=tally.examples,
        bytes_moved=(len(tasks) + len(tally.kept)) * payload_bytes,
        vectorized=bool(crew.stacking.on),
        ledger=None if start.ledger is None else start.ledger.after(tally.within),
    )


def _fold(layout: Layout, rules: Rules, start: Start) -> AnyFold:
    if start.ledger is not None:
        return start.ledger.fold(layout, start.block)
    return Fold(layout, keep_rows=rules.strategy.keeps_rows)


def tasks_of(
    start: Start, sizes: Mapping[str, int], seed: int, weigh: Weigh | None = None
) -> dict[str, Task]:
    """Makes the tasks of the drawn clients that have rows, in cohort order.

    Args:
        start: What the round starts from.
        sizes: Rows of each client.
        seed: Seed of the run.
        weigh: Rows of a client -> its weight in the mean that clients trained at once return; None:
            they return their own models.
    """
    clip_norm = None if start.ledger is None else start.ledger.clip_norm
    return {
        client: Task(client, start.number, seed, place, clip_norm, weigh and weigh(sizes[client]))
        for place, client in enumerate(start.cohort)
        if sizes[client]
    }


def _fold_all(
    collector: Collector, rules: Rules, fold: AnyFold, sink: Sink, timeline: Timeline | None
) -> Tally:
    """Takes what the clients return, in cohort order."""
    tally, is_watched = Tally(), timeline is not None or sink is not ignore
    # The workers have the cores: waking torch's other threads costs more than they help here.
    with torch_threads(1):
        for run in collector.runs():
            # a trace shows each client by itself
            for part in [run] if timeline is None else [[pair] for pair in run]:
                began = time.perf_counter()
                fold.add(_accepted(part, rules, tally))
                for task, result in part if is_watched else ():
                    client, failure = task.client, tally.failures.get(task.client)
                    if timeline is not None:
                        timeline.trained(client, collector.home(client), result)
                        timeline.folded(client, began, failure)
                    sink(ClientFinished(task.round, client, failure is not None))
    return tally


def _accepted(
    part: Sequence[tuple[Task, Update | BaseException]], rules: Rules, tally: Tally
) -> list[Weighted]:
    """Takes in the numbers of updates, or notes why one does not count."""
    clients: list[str] = []
    updates: list[Update] = []
    weights: list[float] = []
    found: list[Weighted] = []
    for task, result in part:
        if isinstance(result, BaseException):
            tally.failures[task.client] = result
            continue
        weight = rules.weight(result.examples)
        if result.block_weight is None:
            first = tally.first or (updates[0] if updates else result)
            try:
                mean_weight = rules.strategy.mean_weight(weight, result, first)
            except ValueError as error:  # the strategy cannot use this update; the others count
                # the history keeps it, not the round
                tally.failures[task.client] = error.with_traceback(None)
                continue
            found.append(Weighted(result.block, weight, mean_weight))
        elif result.block_weight:  # of all that trained at once
            found.append(Weighted(result.block, result.block_weight, result.block_weight))
        clients.append(task.client)
        updates.append(result)
        weights.append(weight)
    tally.accept(clients, updates, weights)
    return found


def _apply(
    layout: Layout, rules: Rules, start: Start, fold: AnyFold, tally: Tally, population: int
) -> tuple[Tensor, State]:
    received = _received(start, fold, tally)
    try:
        new, state = next_parameters(
            layout, rules.strategy, start, received, tally.kept, population
        )
    except QuorumError as error:
        message = f"round {start.number}: {error}{causes(tally.failures)}"
        raise QuorumError(message, failures=tally.failures) from error
    return fold.write(new, start.allocate), state


def _received(start: Start, fold: AnyFold, tally: Tally) -> Received:
    mean, rows = fold.trained()
    if start.ledger is not None:  # the mean has noise, nothing else does
        return Received(mean, rows, weights=(), step_norms=(), non_finite=0)
    return Received(
        mean=mean,
        rows=rows,
        weights=tuple(tally.weights),
        step_norms=tuple(tally.step_norms),
        non_finite=sum(isinstance(e, FloatingPointError) for e in tally.failures.values()),
    )


def _require_quorum(start: Start, tally: Tally, min_clients: int) -> None:
    accepted = len(tally.kept)
    if accepted >= min_clients:
        return
    message = (
        f"round {start.number}: {accepted} of {len(start.cohort)} clients finished, "
        f"{min_clients} are needed; the model is unchanged{causes(tally.failures)}"
    )
    raise QuorumError(message, failures=tally.failures)


def causes(failures: Mapping[str, BaseException]) -> str:
    """Returns the first failures as lines of an error."""
    shown = [f"\n  {client}: {describe(error)}" for client, error in list(failures.items())[:10]]
    more = f"\n  and {len(failures) - 10} more" if len(failures) > 10 else ""
    return "".join(shown) + more
