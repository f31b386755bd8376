"""A round under secure aggregation: the same training, but the parent sees the sum alone.

Runs in the parent. A worker that is lost before the unmasking begins costs an attempt, because
keys end with their worker: the round starts again with fresh keys, at most ``retries`` times.
Then the clients of a lost worker have dropped out and are recovered. Once shares were released
there is no other attempt: two sums of one round would differ by single updates.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING

import torch

from fedproc.client.fixed_point import FixedPoint
from fedproc.client.seeding import torch_threads
from fedproc.client.summed import SummedVector, Totals
from fedproc.errors import QuorumError
from fedproc.events import ClientFinished
from fedproc.federated.commanding import Broadcast
from fedproc.federated.fold import Received, cast_into
from fedproc.federated.lane import Deadline
from fedproc.federated.master import next_parameters, without_master
from fedproc.federated.round import Outcome, causes, tasks_of
from fedproc.federated.secure_attempt import Attempt, KeysLostError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from fedproc.client.layout import Layout, Section
    from fedproc.client.secure_trainer import MaskedUpdate
    from fedproc.client.update import Task
    from fedproc.errors import FedprocError
    from fedproc.events import Sink
    from fedproc.federated.crew import Crew
    from fedproc.federated.round import Start
    from fedproc.federated.rules import Rules
    from fedproc.federated.strategies.contract import State
    from fedproc.federated.timeline import Timeline


def play(
    crew: Crew,
    layout: Layout,
    rules: Rules,
    start: Start,
    sink: Sink,
    timeline: Timeline | None = None,
) -> Outcome:
    """Plays one round, see :func:`fedproc.federated.round.play`.

    Raises:
        QuorumError: Fewer clients than the threshold or ``min_clients``; nothing was unmasked.
    """
    tasks = tasks_of(start, crew.data.sizes, rules.seed)
    form = _vector(layout, rules, len(tasks), private=start.ledger is not None)
    shared = rules.strategy.shared(without_master(start.state))
    begin = functools.partial(
        Attempt,
        crew,
        tasks,
        Broadcast(start.block, shared, {}),
        form,
        _needed(rules, start, len(tasks)),
        deadline=Deadline(rules.deadline),
        taken=_Listener(start.number, sink, timeline),
    )
    start.meanwhile()  # workers answer one step after the other: there is no better time
    # The workers have the cores: waking torch's other threads costs more than they help here.
    with torch_threads(1):
        attempt, total = _sum(begin, crew, rules, start)
    began = time.perf_counter()
    totals = form.read(total)
    block, state = _apply(layout, rules, start, totals, len(crew.data.clients))
    if timeline is not None:
        timeline.did("strategy", began)
    down = len(tasks) * (layout.payload_bytes + len(shared) * layout.trained_bytes)
    up = 8 * form.numel * len(attempt.sum.survivors) + attempt.relayed_bytes
    return _outcome(start, tasks, attempt, totals, (block, state, down + up))


def _outcome(
    start: Start,
    tasks: Mapping[str, Task],
    attempt: Attempt,
    totals: Totals,
    made: tuple[Tensor, State, int],
) -> Outcome:
    """Puts together what is known; ``made`` are the new block, the new state and bytes moved."""
    block, state, bytes_moved = made
    accepted = set(attempt.sum.survivors)
    return Outcome(
        block=block,
        state=state,
        kept={},
        accepted=tuple(client for client in tasks if client in accepted),
        skipped=tuple(client for client in start.cohort if client not in tasks),
        failures={c: attempt.failures[c] for c in tasks if c in attempt.failures},
        loss=totals.loss,
        metrics=totals.metrics,
        examples=totals.examples,
        bytes_moved=bytes_moved,
        ledger=start.ledger and start.ledger.after(_marks(len(accepted), totals.within)),
    )


def _marks(clients: int, within: int) -> list[bool]:
    return [place < within for place in range(clients)]


class _Listener:
    """Tells of every client once, whatever the number of attempts."""

    def __init__(self, number: int, sink: Sink, timeline: Timeline | None) -> None:
        self._number, self._sink, self._timeline = number, sink, timeline
        self._told: set[str] = set()

    def __call__(self, client: str, worker: str, result: MaskedUpdate | FedprocError) -> None:
        error = result if isinstance(result, BaseException) else None
        if self._timeline is not None:
            self._timeline.trained(client, worker, result)
            self._timeline.folded(client, time.perf_counter(), error)
        if client not in self._told:
            self._told.add(client)
            self._sink(ClientFinished(self._number, client, error is not None))


def _vector(layout: Layout, rules: Rules, clients: int, *, private: bool) -> SummedVector:
    assert rules.secure is not None
    uniform = rules.strategy.uniform or rules.weigh(1) == rules.weigh(2)
    return SummedVector(
        layout, FixedPoint(rules.secure.bits, clients, towards_zero=private), uniform
    )


def _needed(rules: Rules, start: Start, clients: int) -> int:
    assert rules.secure is not None
    needed = rules.secure.needed(clients)
    if needed < 2:
        raise QuorumError(
            f"round {start.number}: {clients} clients have rows; the sum of one would be its "
            "update, so nobody trained"
        )
    return needed


def _sum(
    begin: Callable[..., Attempt], crew: Crew, rules: Rules, start: Start
) -> tuple[Attempt, Tensor]:
    """Makes attempts until one ends with a sum."""
    for left in range(rules.retries, -1, -1):
        attempt = begin(last=left == 0)
        failures = attempt.failures
        cause: BaseException | None
        try:
            attempt.exchange_keys()
            attempt.collect()
            _require(attempt, rules.min_clients)
            return attempt, attempt.unmask()
        except KeysLostError as lost:
            if crew.restored():
                continue
            why, cause = "no worker is left", lost.error
            failures = dict.fromkeys(attempt.sum.setup.cohort, lost.error)
        except QuorumError as error:
            why, cause = str(error), error.__cause__
        text = f"round {start.number}: {why}; the model is unchanged{causes(failures)}"
        raise QuorumError(text, failures=failures) from cause
    raise AssertionError("the last attempt loses no keys")


def _require(attempt: Attempt, min_clients: int) -> None:
    survivors = len(attempt.sum.survivors)
    if survivors < min_clients:
        raise QuorumError(
            f"{survivors} of {len(attempt.sum.setup.cohort)} clients finished, {min_clients} are "
            "needed; nothing was unmasked"
        )


def _apply(
    layout: Layout, rules: Rules, start: Start, totals: Totals, population: int
) -> tuple[Tensor, State]:
    """Makes the new model from the mean change, or from the sum and the noise of a private run."""
    if start.ledger is not None:
        fold = start.ledger.fold(layout, start.block)
        fold.add_sum(totals.change[: layout.trained_numel])
        noisy = Received(fold.trained()[0], None, weights=(), step_norms=(), non_finite=0)
        new, state = next_parameters(layout, rules.strategy, start, noisy, {}, population)
        return fold.write(new, start.allocate), state
    x = layout.flat_trained(start.block)
    mean = totals.change / totals.weight
    change, of_buffers = mean[: len(x)], mean[len(x) :]
    received = Received(mean=x + change, rows=None, weights=(), step_norms=(), non_finite=0)
    new, state = next_parameters(layout, rules.strategy, start, received, {}, population)
    block = layout.room(start.allocate)
    cast_into(block, layout.of_kind("trained"), new)
    _add_into(block, layout.of_kind("mean"), start.block, of_buffers)
    _add_into(block, layout.of_kind("largest"), start.block, totals.growth)
    return block, state


def _add_into(block: Tensor, sections: Sequence[Section], before: Tensor, change: Tensor) -> None:
    if sections:
        flat = torch.cat([section.view(before).to(change.dtype) for section in sections])
        cast_into(block, sections, flat + change)
