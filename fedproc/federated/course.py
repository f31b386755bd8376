"""The course of the rounds: what lasts from one to the next, and how a round is committed.

Runs in the parent. A round is computed elsewhere and committed here as a whole or not at all.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from fedproc.errors import QuorumError
from fedproc.events import RoundFinished, RoundStarted, Sink
from fedproc.federated import evaluation
from fedproc.federated.checkpoint import Identity, Saved
from fedproc.federated.history import History, RoundRecord
from fedproc.federated.passing import readable
from fedproc.federated.round import Outcome, Start
from fedproc.federated.rules import Rules
from fedproc.federated.sampling import draw_cohort
from fedproc.federated.traffic import Traffic

if TYPE_CHECKING:
    from torch import Tensor

    from fedproc.federated.crew import Crew
    from fedproc.federated.evaluation import EvaluationRows
    from fedproc.federated.global_model import GlobalModel
    from fedproc.federated.mechanism import Ledger
    from fedproc.federated.secure_aggregation import Play
    from fedproc.federated.strategies import State
    from fedproc.federated.timeline import Timeline

# The first draw in a while takes ten times as long as the next: its code is in no cache any more.
_DRAWN_TOGETHER: Final = 8


class Course:
    """Plays rounds one after the other.

    Attributes:
        round: Number of the last round.
        state: State of the strategy.
        kept: Client -> what it keeps.
        ledger: What differential privacy has cost; None without it.
        history: Records of all rounds.
    """

    def __init__(
        self,
        crew: Crew,
        model: GlobalModel,
        rules: Rules,
        cohort_size: int,
        ledger: Ledger | None,
        play: Play,
    ) -> None:
        """Stands before the first round."""
        self._crew, self._global = crew, model
        self._rules, self._cohort_size = rules, cohort_size
        self.round = 0
        self.state: State = rules.strategy.initial(model.layout.flat_trained(model.block()))
        self.kept: dict[str, dict[str, Any]] = {}
        self.ledger, self._play = ledger, play
        self.history = History()
        self._made: tuple[Start, Outcome, RoundRecord] | None = None  # not taken over yet
        self._ahead: dict[int, tuple[str, ...]] = {}  # rounds to come, and their cohorts
        self._block: Tensor | None = None  # what the model holds, if nobody can have changed it
        self._allocate = partial(readable, crew.data.cluster)

    def play(
        self,
        rows: EvaluationRows | None,
        sink: Sink,
        last: int,
        timeline: Timeline | None = None,
        *,
        alone: bool = False,
    ) -> RoundRecord:
        """Plays one round and commits it.

        Args:
            rows: What to evaluate the new model on; None does not.
            sink: Told what happens.
            last: Number of the last round of this run, for the sink.
            timeline: Notes who did what when.
            alone: Since ``release`` nothing ran but rounds, so nobody else changed the model: this
                one starts with what the one before has made. Looking at the module and putting its
                values into flat form again would cost small models a thirtieth of the round.

        Raises:
            QuorumError: Too few clients finished; the model is unchanged.
            PrivacyBudgetError: The round would cost too much; it was not begun.
        """
        grad = torch.is_grad_enabled()
        try:
            return self._played(rows, sink, last, timeline, alone=alone)
        finally:
            if not alone:
                self.release()
            # Ctrl-C at the end of a torch.no_grad() comes before that has put back what was
            torch._C._set_grad_enabled(grad)

    def _played(
        self,
        rows: EvaluationRows | None,
        sink: Sink,
        last: int,
        timeline: Timeline | None,
        *,
        alone: bool,
    ) -> RoundRecord:
        started, traffic = time.perf_counter(), Traffic(self._crew.data.cluster)
        if self._block is None or not alone:
            self.refresh()
        number = self.round + 1
        cohort = self._draw(number)
        sink(RoundStarted(number, last, len(cohort)))
        start = Start(
            number, cohort, self.block(), self.state, self.kept, self.ledger, self._allocate,
            self._look_ahead,
        )  # fmt: skip
        outcome = self._computed(start, sink, timeline)
        seconds, messages = time.perf_counter() - started, traffic.since()
        record = outcome.record(start, seconds=seconds, message_bytes=messages)
        self._made = (start, outcome, record)
        try:
            self._commit()
        except BaseException:  # Ctrl-C with half of it done: the round is whole, so it counts
            self._commit()
            raise
        if rows is not None:
            found = evaluation.evaluate(self._crew, self.block(), rows, None, None)
            record = replace(record, evaluation=found)
            self.history.replace_last(record)
        accuracy = record.evaluation.accuracy if record.evaluation else None
        sink(RoundFinished(record.round, record.loss, accuracy))
        return record

    def _computed(self, start: Start, sink: Sink, timeline: Timeline | None) -> Outcome:
        layout, rules = self._global.layout, self._rules
        try:
            return self._play(self._crew, layout, rules, start, sink, timeline)
        except Exception as error:
            self.round = start.number  # not after Ctrl-C: an interrupted round is played again
            if isinstance(error, QuorumError):
                self._crew.dismiss()  # a trainer that could not be made must not stay
            raise

    def block(self) -> Tensor:
        """Returns the model as it is now, in flat form, for all workers to read."""
        return self._global.block(self._allocate) if self._block is None else self._block

    def refresh(self) -> None:
        """Notices what the user did to the model since the last round."""
        self._commit()  # Ctrl-C twice may have left it undone
        self.release()
        if self._global.look_again() or self._crew.is_outdated():
            self._crew.dismiss()

    def release(self) -> None:
        """Lets go of the model in flat form: before the next round the module is looked at."""
        self._block = None

    def identity(self) -> Identity:
        """Returns what must be the same when a run continues."""
        mechanism = None if self.ledger is None else self.ledger.mechanism
        clients, rules = self._crew.data.clients, self._rules
        return Identity(clients, rules.seed, rules.strategy, mechanism)

    def saved(self) -> Saved:
        """Returns what changes from round to round, besides the model."""
        return Saved(self.round, self.state, self.kept, self.history, self.ledger)

    def resume(self, saved: Saved) -> None:
        """Goes on from what was saved."""
        self.round, self.state, self.kept = saved.round, saved.state, dict(saved.kept)
        self.history, self.ledger = saved.history, saved.ledger

    def _draw(self, number: int) -> tuple[str, ...]:
        clients = self._crew.data.clients
        if self.ledger is not None:
            return self.ledger.draw(clients)
        if number not in self._ahead:
            size, seed = self._cohort_size, self._rules.seed
            rounds = range(number, number + _DRAWN_TOGETHER)
            self._ahead = {later: draw_cohort(clients, size, seed, later) for later in rounds}
        return self._ahead[number]

    def _look_ahead(self) -> None:
        """Draws the next cohort; a private one is drawn when the round before was accounted for."""
        if self.ledger is None:
            self._draw(self.round + 2)

    def _commit(self) -> None:
        """Takes over what a round made. Interrupted anywhere, it can be done again."""
        if self._made is None:
            return
        start, outcome, record = self._made
        self.ledger = outcome.ledger  # first: what is released must be accounted for
        self._global.load(outcome.block, before=start.block)
        self._block = outcome.block
        self.state = outcome.state
        self.kept.update({client: kept for client, kept in outcome.kept.items() if kept})
        self.round = record.round
        if not self.history or self.history[-1].round < record.round:
            self.history.append(record)
        self._made = None
