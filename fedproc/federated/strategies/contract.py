"""What a strategy is. Runs in the parent; the local rule it names runs in the workers.

A strategy is immutable. What it remembers between rounds is a dict of tensors that the aggregator
keeps, saves and gives back. It sees trained parameters only, as float64 vectors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fedproc.client.training import LocalTraining

if TYPE_CHECKING:
    from fedproc.client.rules import LocalRule
    from fedproc.client.training import TrainFunction
    from fedproc.client.update import Update
    from fedproc.federated.fold import Received

State = Mapping[str, Tensor]


class Strategy(ABC):
    """A server rule, called once per round; subclass it to write your own."""

    keeps_rows: ClassVar[bool] = False
    """Whether :meth:`step` needs every update at once (``received.rows``) and not their mean."""

    uniform: ClassVar[bool] = False
    """Whether every client weighs 1, whatever the aggregator's ``weighting``."""

    @abstractmethod
    def step(self, x: Tensor, received: Received, state: State) -> tuple[Tensor, State]:
        """Computes the next model.

        Args:
            x: The global parameters at the start of the round: float64, shape (parameters,).
            received: The accepted updates, at least one.
            state: What the last round returned, or :meth:`initial`.

        Returns:
            The new parameters (float64, shape (parameters,)) and the new state.

        Raises:
            QuorumError: Too few updates for this rule; the model stays unchanged.
        """

    def initial(self, x: Tensor) -> State:  # noqa: ARG002 - for subclasses
        """Returns the state before the first round, for parameters like ``x``."""
        return {}

    def keeps_master(self) -> bool:
        """Whether float16 and bfloat16 parameters have a float32 master between rounds.

        Say True if :meth:`step` adds to ``x`` what may be too small for half precision: then the
        master moves by ``new - x``, and the model is the master, cast. A rule whose result is the
        new place whatever ``x`` was, such as a mean, says False: its result is cast.
        """
        return False

    def looks_at_x(self) -> bool:
        """Whether :meth:`step` looks at ``x``.

        Say False if the result is the same whatever ``x`` was: making a float64 vector of a large
        model takes as long as folding an update. Then ``x`` is NaN in every place.
        """
        return True

    def mean_weight(self, weight: float, update: Update, first: Update) -> float:  # noqa: ARG002 - for subclasses
        """Returns the weight of an update in ``received.mean``; ``first`` was accepted first."""
        return weight

    def local_rule(self) -> LocalRule | None:
        """Returns the gradient correction of the clients, or None."""
        return None

    def shared(self, state: State) -> dict[str, Tensor]:  # noqa: ARG002 - for subclasses
        """Returns what all clients of a round need besides the model."""
        return {}

    def after(
        self,
        state: State,
        before: Mapping[str, dict[str, Any]],  # noqa: ARG002 - for subclasses
        kept: Mapping[str, dict[str, Any]],  # noqa: ARG002 - for subclasses
        population: int,  # noqa: ARG002 - for subclasses
    ) -> State:
        """Updates the state from what the accepted clients kept.

        Args:
            state: As :meth:`step` returned it.
            before: Client -> what it kept before the round; clients without anything are missing.
            kept: Client -> what it keeps now, accepted clients only, in cohort order.
            population: Number of all clients.
        """
        return state

    def check(self, local: LocalTraining | TrainFunction, cohort: int) -> None:  # noqa: B027 - optional
        """Raises ValueError if the strategy cannot work with ``local`` and ``cohort`` clients."""


_BY_ROWS = Strategy.mean_weight


def weighs_by_rows(strategy: Strategy) -> bool:
    """Whether the weight of an update depends on nothing but the rows of its client."""
    return is_still(strategy.mean_weight, _BY_ROWS)


def is_still(method: Callable[..., Any], function: Callable[..., Any]) -> bool:
    """Whether a method is that function: no subclass, instance or patch has put in another."""
    return getattr(method, "__func__", None) is function


def require_local_epochs(strategy: str, local: LocalTraining | TrainFunction) -> LocalTraining:
    """Returns ``local`` if it is LocalTraining, which corrects gradients; raises ValueError."""
    if not isinstance(local, LocalTraining):
        raise ValueError(
            f"{strategy} corrects the gradients of local epochs: it needs LocalTraining"
        )
    return local


def mean_of(received: Received) -> Tensor:
    """Returns ``received.mean`` of a strategy that does not keep rows."""
    assert received.mean is not None
    return received.mean


def rows_of(received: Received) -> Tensor:
    """Returns ``received.rows`` in float64 of a strategy that keeps rows."""
    assert received.rows is not None
    return received.rows.to(torch.float64)
