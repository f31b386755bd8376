"""Whether the clients of a round train at once, and how many of them.

Runs in the parent. With ``vectorize="auto"`` the first round decides: a worker trains its first
clients both ways, and the faster way is taken from then on.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Literal

from fedproc.client.row_loss import NotVectorizableError
from fedproc.client.vectorizable import MOST_CLIENTS, require_vectorizable, stack_size
from fedproc.errors import CommandTimeoutError, FedprocError, WorkerLostError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from fedproc.client.rules import LocalRule
    from fedproc.client.training import LocalTraining, TrainFunction
    from fedproc.client.update import Updates

Vectorize = bool | Literal["auto"]

_log = logging.getLogger("fedproc")


class Stacking:
    """The choice of one aggregator.

    Attributes:
        on: Whether clients train at once; None while ``"auto"`` has not decided.
        affine: Whether the mean of clients that take one step each needs one backward pass; None
            while no trainer was asked.
    """

    def __init__(self, on: bool | None) -> None:
        """Starts with a choice, or with None, which :meth:`decide` makes."""
        self.on = on
        self.affine: bool | None = None

    @classmethod
    def of(
        cls,
        wanted: object,
        model: nn.Module,
        local: LocalTraining | TrainFunction,
        rule: LocalRule | None,
    ) -> Stacking:
        """Checks ``vectorize=wanted``.

        Raises:
            ValueError: It is none of True, False and "auto", or it is True and these clients
                cannot be trained at once.
        """
        if wanted not in (True, False, "auto") or isinstance(wanted, int | float) is not isinstance(
            wanted, bool
        ):
            raise ValueError(f"vectorize must be True, False or 'auto', got {wanted!r}")
        if wanted is False:
            return cls(on=False)
        try:
            require_vectorizable(model, local, rule)
        except NotVectorizableError as error:
            if wanted is True:
                raise
            _log.info("vectorize='auto' trains clients one by one: %s", str(error))
            return cls(on=False)
        return cls(on=True if wanted is True else None)

    def size(self, nbytes: int, *, together: bool = False) -> int:
        """Returns how many clients train at once whose blocks have ``nbytes``.

        It depends on model and rows only, so that equal runs have equal stacks.

        Args:
            nbytes: Bytes of the model.
            together: They share one step: there are no copies of the model.
        """
        return MOST_CLIENTS if together else stack_size(nbytes)

    def is_affine(self, ask: Callable[[], bool]) -> bool:
        """Tells what a trainer says of first steps; if it cannot tell now, the next is asked.

        Args:
            ask: Asks a trainer and waits for its answer.
        """
        if self.affine is None:
            with contextlib.suppress(FedprocError):  # what is wrong comes up when clients train
                self.affine = ask()
        return bool(self.affine)

    def decide(self, train: Callable[[str], Updates]) -> None:
        """Measures both ways and chooses; does nothing if there is a choice.

        Args:
            train: Name of a method of a trainer -> the updates of the first clients of one worker.
        """
        if self.on is not None:
            return
        try:
            train("train_stack")  # the first one loads what torch needs for it
            stacked, alone = (_seconds(train(method)) for method in ("train_stack", "train_some"))
        except NotVectorizableError as error:
            self.on = False
            _log.info("vectorize='auto' trains clients one by one: %s", str(error))
        except (WorkerLostError, CommandTimeoutError) as error:
            self.on = False
            _log.warning(
                "vectorize='auto' trains clients one by one: measuring failed: %s", str(error)
            )
        else:
            self.on = stacked < alone
            _log.info(
                "vectorize='auto' trains clients %s: %.2f ms a client at once, %.2f ms one by one",
                "at once" if self.on else "one by one",
                stacked * 1e3,
                alone * 1e3,
            )


def _seconds(updates: Updates) -> float:
    """Returns how long a client took, of those that did not fail."""
    done = [update for update in updates.unpacked(0) if update is not None]
    return sum((update.ended - update.began for update in done), 0.0) / max(1, len(done))
