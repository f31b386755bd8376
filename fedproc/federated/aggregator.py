"""The aggregator: rounds of federated learning on a cluster, and one model that gets better.

Runs in the parent. The face of the federated layer; :mod:`fedproc.federated.course` plays.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fedproc.errors import PrivacyBudgetError
from fedproc.events import ignore
from fedproc.federated import checkpoint, evaluation
from fedproc.federated.course import Course
from fedproc.federated.crew import Crew, copied
from fedproc.federated.evaluation import EvaluationRows
from fedproc.federated.history import History, RoundRecord
from fedproc.federated.privacy import open_ledger, warn_of_weakness
from fedproc.federated.rules import Rules
from fedproc.federated.sampling import cohort_size
from fedproc.federated.secure_aggregation import how_to_play
from fedproc.federated.strategies import FedAvg, Strategy
from fedproc.federated.timeline import Timeline
from fedproc.federated.validation import (
    callables,
    require_alone,
    require_deadline,
    require_metrics,
    require_open,
    require_parts,
    require_reachable,
    weight_of,
)
from fedproc.progress import ProgressBar
from fedproc.ranges import require_at_least, require_whole

if TYPE_CHECKING:
    import os

    from torch import nn

    from fedproc.client.gradients import Loss
    from fedproc.client.training import LocalTraining, TrainFunction
    from fedproc.events import Sink
    from fedproc.federated.data import FederatedDataset
    from fedproc.federated.evaluation import Metric
    from fedproc.federated.history import Evaluation
    from fedproc.federated.privacy import DifferentialPrivacy
    from fedproc.federated.secure_aggregation import SecureAggregation
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
        privacy: Clips what clients send and adds noise; needs ``weighting="uniform"`` and a
            fraction for ``clients_per_round``. ``min_clients`` does not apply then.
        callbacks: Called as ``callback(aggregator, record)`` after every round; returning True
            ends :meth:`run`.
        secure: The parent sees masked updates only and learns their sum.
        vectorize: True trains many clients at once, which changes the last bits; "auto" does so
            if the first round finds it faster (see ``record.vectorized``). Not with ``privacy``
            or ``secure``.

    Attributes:
        data, local, strategy: As given.

    Raises:
        ValueError: A value is outside of its range, or the strategy cannot work with the others.
        NotShippableError: The model holds what cannot be copied.
        ClosedError: The cluster of the data is closed, here and in all that needs the workers.
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
        privacy: DifferentialPrivacy | None = None,
        secure: SecureAggregation | None = None,
        vectorize: Vectorize = False,
    ) -> None:
        """Checks everything and copies the model; workers get it with the first round."""
        require_parts(model, data, local, strategy)
        size = cohort_size(clients_per_round, len(data.clients))
        ledger = open_ledger(privacy, len(data.clients), clients_per_round, weighting, strategy)
        if ledger is None:
            min_clients = require_reachable(min_clients, size)
        strategy.check(local, size)
        self.data, self.local, self.strategy = data, local, strategy
        self._callbacks = callables(callbacks)
        self._global = copied(model)
        rules = Rules(
            strategy=strategy,
            weigh=weight_of(weighting),
            seed=require_whole("seed", seed),
            min_clients=min_clients if ledger is None else 0,
            retries=require_at_least("retries", retries, 0),
            deadline=require_deadline(deadline, data.cluster),
            secure=secure,
        )
        require_alone(vectorize, privacy, secure)
        trainer, play = how_to_play(rules, self._global.layout, size)
        rule = strategy.local_rule()
        self._crew = Crew(data, self._global, local, rule, trainer, vectorize)
        self._course = Course(self._crew, self._global, rules, size, ledger, play)
        warn_of_weakness(privacy, model, len(data.clients))

    @property
    def history(self) -> History:
        """Records of all rounds so far."""
        return self._course.history

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
            The whole history. A spent privacy budget ends the run early, with a UserWarning.

        Raises:
            QuorumError: A round failed; the model is as it was before that round.
            ValueError: A value is outside of its range.
        """
        require_open(self.data.cluster, "run")
        rounds = require_at_least("rounds", rounds, 0)
        evaluate_every = require_at_least("evaluate_every", evaluate_every, 1)
        rows = None if evaluate_on is None else EvaluationRows(evaluate_on)
        last = self._course.round + rounds
        bar = ProgressBar() if (sys.stderr.isatty() if progress is None else progress) else None
        try:
            self._course.release()
            self._play_until(last, rows, evaluate_every, bar or ignore)
        except PrivacyBudgetError as error:
            warnings.warn(f"run ended early: {error}", UserWarning, stacklevel=2)
        finally:
            self._course.release()
            if bar is not None:
                bar.close()
        return self.history

    def run_round(self) -> RoundRecord:
        """Plays one round without an evaluation.

        Raises:
            QuorumError: Too few clients finished; the model is unchanged.
        """
        require_open(self.data.cluster, "run_round")
        record = self._course.play(None, ignore, self._course.round + 1)
        self._stopped_by(record)
        return record

    def profile(self, path: str | os.PathLike[str]) -> RoundRecord:
        """Plays one round and writes a trace of it, for ui.perfetto.dev or chrome://tracing.

        Args:
            path: The JSON file: which worker trained which client when, fold, strategy, idle.

        Raises:
            QuorumError: Too few clients finished; nothing is written.
        """
        require_open(self.data.cluster, "profile")
        timeline = Timeline([worker.name for worker in self.data.cluster.workers])
        record = self._course.play(None, ignore, self._course.round + 1, timeline)
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
            loss: ``loss(outputs, targets)`` -> mean over the rows, or their sum if it has
                ``reduction="sum"``; by default LocalTraining's.
            metrics: Name -> ``metric(outputs, targets)``, called here once with all rows.

        Raises:
            RemoteError: The model or the loss failed.
            ValueError: There are no rows, or metrics without names.
        """
        require_open(self.data.cluster, "evaluate")
        require_metrics(metrics)
        self._course.refresh()
        return evaluation.evaluate(
            self._crew, self._course.block(), EvaluationRows(data), loss, metrics
        )

    def evaluate_clients(self) -> dict[str, Evaluation]:
        """Evaluates the model on every client's own rows, where they are.

        Returns:
            Client -> evaluation; loss and accuracy of a client without rows are None.
        """
        require_open(self.data.cluster, "evaluate_clients")
        self._course.refresh()
        return evaluation.evaluate_clients(self._crew, self._course.block())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a checkpoint; an older file is replaced as a whole, or stays as it is.

        Raises:
            TypeError: A client keeps something that cannot be saved.
            OSError: The file cannot be written: its folder is missing, or it is no regular file.
        """
        checkpoint.save(path, self.model, self._course.identity(), self._course.saved())

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
        course = aggregator._course
        course.resume(checkpoint.load(path, aggregator.model, course.identity()))
        return aggregator

    def _play_until(
        self, last: int, rows: EvaluationRows | None, evaluate_every: int, sink: Sink
    ) -> None:
        while self._course.round < last:
            due = rows if (self._course.round + 1) % evaluate_every == 0 else None
            # callbacks may do anything to the model
            record = self._course.play(due, sink, last, alone=not self._callbacks)
            if self._stopped_by(record):
                break

    def _stopped_by(self, record: RoundRecord) -> bool:
        answers = [callback(self, record) for callback in self._callbacks]
        return any(answer is True for answer in answers)
