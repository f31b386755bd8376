"""The aggregator: rounds of federated learning on a cluster, and one model that gets better.

Runs in the parent. Keeps what lasts from round to round: the model, the strategy's state, what
clients keep, the history. A round is computed elsewhere and committed here as a whole.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from fedproc.client.ranges import require_at_least, require_seed
from fedproc.errors import QuorumError
from fedproc.events import RoundFinished, RoundStarted, Sink, ignore
from fedproc.federated import checkpoint, evaluation
from fedproc.federated.crew import Crew
from fedproc.federated.evaluation import EvaluationRows
from fedproc.federated.global_model import GlobalModel
from fedproc.federated.history import History, RoundRecord
from fedproc.federated.round import Rules, Start, play
from fedproc.federated.sampling import cohort_size, draw_cohort
from fedproc.federated.strategies import FedAvg, State, Strategy
from fedproc.federated.timeline import Timeline
from fedproc.federated.traffic import Traffic
from fedproc.federated.validation import (
    require_choices,
    require_deadline,
    require_parts,
    require_reachable,
)
from fedproc.progress import ProgressBar

if TYPE_CHECKING:
    import os

    from torch import nn

    from fedproc.client.training import LocalTraining, Loss, TrainFunction
    from fedproc.federated.data import FederatedDataset
    from fedproc.federated.evaluation import Metric
    from fedproc.federated.history import Evaluation
    from fedproc.federated.stacking import Vectorize

Callback = Callable[["Aggregator", RoundRecord], Any]
Weighting = Literal["examples", "uniform"]


class Aggregator:
    """Trains one model on the data of many clients.

    Args:
        model: Where to start; it stays as it is.
        data: The clients and their rows.
        local: :class:`fedproc.LocalTraining`, or ``train(model, x, y, ctx) -> metrics``.
        strategy: How updates become the next model.
        clients_per_round: A fraction (float) or a number (int) of all clients.
        weighting: ``"examples"``: by rows; ``"uniform"``: all alike.
        seed: Decides every draw of cohorts and clients.
        min_clients: Fewest accepted updates of a round.
        deadline: Seconds of a round; who is not done then has failed, and a worker that still
            trains is replaced. None waits for everybody.
        retries: How often a client trains again whose worker was lost while it trained.
        callbacks: Called as ``callback(aggregator, record)`` after every round; returning True
            ends :meth:`run`.
        vectorize: True trains many clients at once, which changes the last bits; "auto" does so
            if the first round finds it faster (see ``record.vectorized``).

    Attributes:
        data, local, strategy: As given.
        history: Records of all rounds so far.

    Raises:
        ValueError: A value is outside of its range, or the strategy cannot work with the others.
    """

    def __init__(
        self,
        model: nn.Module,
        data: FederatedDataset,
        local: LocalTraining | TrainFunction,
        *,
        strategy: Strategy = FedAvg(),  # noqa: B008 - immutable
        clients_per_round: float = 1.0,
        weighting: Weighting = "examples",
        seed: int = 0,
        min_clients: int = 1,
        deadline: float | None = None,
        retries: int = 1,
        callbacks: Sequence[Callback] = (),
        vectorize: Vectorize = False,
    ) -> None:
        """Checks everything and copies the model; workers get it with the first round."""
        require_parts(model, data, local, strategy)
        require_choices(weighting, callbacks)
        self._cohort_size = cohort_size(clients_per_round, len(data.clients))
        require_reachable(min_clients, self._cohort_size)
        strategy.check(local, self._cohort_size)
        self.data, self.local, self.strategy = data, local, strategy
        self._global = GlobalModel(model)
        self._rules = Rules(
            strategy=strategy,
            weigh=float if weighting == "examples" else lambda _: 1.0,
            seed=require_seed(seed),
            min_clients=min_clients,
            retries=require_at_least("retries", retries, 0),
            deadline=require_deadline(deadline, data.cluster),
        )
        self._callbacks = tuple(callbacks)
        self._crew = Crew(data, self._global.module, local, strategy.local_rule(), vectorize)
        self._round = 0
        self._state: State = strategy.initial(
            self._global.layout.flat_trained(self._global.block())
        )
        self._kept: dict[str, dict[str, Any]] = {}
        self.history = History()

    @property
    def model(self) -> nn.Module:
        """The averaged model: one object for life, updated in place after every whole round."""
        return self._global.module

    def run(
        self,
        rounds: int,
        *,
        evaluate_on: object = None,
        evaluate_every: int = 1,
        progress: bool | None = None,
    ) -> History:
        """Plays rounds; called again, it continues.

        Args:
            rounds: How many to play.
            evaluate_on: Rows to evaluate the model on, a pair (x, y) or a dataset; None does not.
            evaluate_every: Evaluate after rounds whose number is a multiple of this.
            progress: Show a bar on standard error; None shows it on a terminal.

        Returns:
            The whole history.

        Raises:
            QuorumError: A round failed; the model is as it was before that round.
            ValueError: A value is outside of its range.
        """
        require_at_least("rounds", rounds, 0)
        require_at_least("evaluate_every", evaluate_every, 1)
        rows = None if evaluate_on is None else EvaluationRows(evaluate_on)
        last = self._round + rounds
        bar = ProgressBar() if (sys.stderr.isatty() if progress is None else progress) else None
        try:
            while self._round < last:
                due = rows if (self._round + 1) % evaluate_every == 0 else None
                record = self._play(due, bar or ignore, last)
                if self._stopped_by(record):
                    break
        finally:
            if bar is not None:
                bar.close()
        return self.history

    def run_round(self) -> RoundRecord:
        """Plays one round without an evaluation.

        Raises:
            QuorumError: Too few clients finished; the model is unchanged.
        """
        record = self._play(None, ignore, self._round + 1)
        self._stopped_by(record)
        return record

    def profile(self, path: str | os.PathLike[str]) -> RoundRecord:
        """Plays one round and writes a trace of it, for ui.perfetto.dev or chrome://tracing.

        Args:
            path: The JSON file: which worker trained which client when, fold, strategy, idle.

        Raises:
            QuorumError: Too few clients finished; nothing is written.
        """
        timeline = Timeline([worker.name for worker in self.data.cluster.workers])
        record = self._play(None, ignore, self._round + 1, timeline)
        timeline.write(path, f"round {record.round}")
        self._stopped_by(record)
        return record

    def evaluate(
        self,
        data: object,
        loss: Loss | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> Evaluation:
        """Evaluates the model on rows, in eval mode without gradients, on all workers.

        Args:
            data: A pair (x, y) of tensors or arrays, or a map-style dataset.
            loss: ``loss(outputs, targets)`` -> mean over the rows; by default LocalTraining's.
            metrics: Name -> ``metric(outputs, targets)``, called here once with all rows.

        Raises:
            RemoteError: The model or the loss failed.
            ValueError: There are no rows.
        """
        self._refresh()
        return evaluation.evaluate(
            self._crew, self._global.block(), EvaluationRows(data), loss, metrics
        )

    def evaluate_clients(self) -> dict[str, Evaluation]:
        """Evaluates the model on every client's own rows, where they are.

        Returns:
            Client -> evaluation; loss and accuracy of a client without rows are None.
        """
        self._refresh()
        return evaluation.evaluate_clients(self._crew, self._global.block())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a checkpoint; an older file is replaced as a whole, or stays as it is.

        Raises:
            TypeError: A client keeps something that cannot be saved.
        """
        saved = checkpoint.Saved(self._round, self._state, self._kept, self.history)
        checkpoint.save(path, self.model, self._identity(), saved)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        data: FederatedDataset,
        local: LocalTraining | TrainFunction,
        **keywords: Any,
    ) -> Aggregator:
        """Continues from a checkpoint, on any number of workers, with the same bits.

        Args:
            path: What :meth:`save` wrote.
            model: Gives the architecture; its values are ignored, and it stays as it is.
            data: As at construction.
            local: As at construction.
            **keywords: As at construction.

        Raises:
            CheckpointError: The file is damaged.
            ValueError: It is of another model, strategy, seed, or of other clients.
        """
        aggregator = cls(model, data, local, **keywords)
        saved = checkpoint.load(path, aggregator.model, aggregator._identity())
        aggregator._round, aggregator._state = saved.round, saved.state
        aggregator._kept, aggregator.history = dict(saved.kept), saved.history
        return aggregator

    def _play(
        self, rows: EvaluationRows | None, sink: Sink, last: int, timeline: Timeline | None = None
    ) -> RoundRecord:
        started, traffic = time.perf_counter(), Traffic(self.data.cluster)
        self._refresh()
        self._round += 1
        size, seed = self._cohort_size, self._rules.seed
        cohort = draw_cohort(self.data.clients, size, seed, self._round)
        sink(RoundStarted(self._round, last, len(cohort)))
        start = Start(self._round, cohort, self._global.block(), self._state, self._kept)
        try:
            outcome = play(self._crew, self._global.layout, self._rules, start, sink, timeline)
        except QuorumError:
            self._crew.dismiss()  # a trainer that could not be made must not stay
            raise
        self._global.load(outcome.block)
        self._state = outcome.state
        self._kept.update({client: kept for client, kept in outcome.kept.items() if kept})
        record = outcome.record(
            start,
            seconds=time.perf_counter() - started,
            message_bytes=traffic.since(),
        )
        self.history.append(record)
        if rows is not None:
            found = evaluation.evaluate(self._crew, self._global.block(), rows, None, None)
            record = replace(record, evaluation=found)
            self.history.replace_last(record)
        accuracy = record.evaluation.accuracy if record.evaluation else None
        sink(RoundFinished(record.round, record.loss, accuracy))
        return record

    def _refresh(self) -> None:
        """Notices what the user did to the model since the last round."""
        if self._global.frozen_changed():
            self._crew.dismiss()

    def _stopped_by(self, record: RoundRecord) -> bool:
        answers = [callback(self, record) for callback in self._callbacks]
        return any(answer is True for answer in answers)

    def _identity(self) -> checkpoint.Identity:
        return checkpoint.Identity(self.data.clients, self._rules.seed, self.strategy)
